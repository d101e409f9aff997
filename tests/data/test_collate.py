"""Whole data sets: streams, the report, fingerprints and overlaps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from chattemplates import build_tokenizer
from orpo.data.dataset import DataReport, find_overlap, fingerprint, prepare_groups
from orpo.data.template import TemplateEncoder
from orpo.data.types import NOTES, REASONS, Dropped, Preference, TokenGroup, Where
from orpo.errors import DataError


@pytest.fixture(scope="module")
def encoder() -> TemplateEncoder:
    return TemplateEncoder(build_tokenizer(), max_length=40)


def row(line: int, prompt: str = "Hello", *answers: str) -> Preference:
    return Preference(prompt, answers or ("Yes", "No"), ((0, 1),), Where("rows.jsonl", line - 1, line))


def group(prompt: list[int], *responses: list[int], pairs: Any = ((0, 1),), line: int = 1) -> TokenGroup:
    return TokenGroup(
        np.asarray(prompt, np.int32),
        tuple(np.asarray(ids, np.int32) for ids in responses),
        pairs,
        (True,) * len(responses),
        Where("rows.jsonl", line - 1, line),
    )


def test_every_row_is_accounted_for(encoder: TemplateEncoder) -> None:
    rows: list[Preference | Dropped] = [
        row(1),
        row(2, "", "a", "b"),
        Dropped("missing_field", Where("rows.jsonl", 2, 3), "chosen is null"),
        row(4, "Hi", "word " * 50, "no"),
        row(5, "Hi", "same", "same"),
        row(6, "Hi", "<s>x", "y"),
        row(7),
        Preference("Hi", ("only",), (), Where("rows.jsonl", 7, 8)),
    ]
    groups, report = prepare_groups(iter(rows), encoder)
    assert [g.where.line for g in groups] == [1, 6, 7, 8]
    assert report.num_rows == len(rows) == report.num_groups + report.dropped.total()
    assert report.dropped == {"empty_prompt": 1, "missing_field": 1, "too_long": 1, "identical_answers": 1}
    assert report.notes == {"special_tokens_in_text": 1}
    assert (report.num_groups, report.num_pairs, report.num_sft_only, report.num_duplicates) == (4, 3, 1, 1)
    assert set(report.dropped) <= set(REASONS)
    assert set(report.notes) <= set(NOTES)
    text = "\n".join(report.lines())
    for expected in ("4 of 8 rows, 3 pairs, 1 SFT-only rows, 1 exact duplicates", "rows.jsonl:3 (chosen is null)", "dropped 1: too_long"):
        assert expected in text
    facts = report.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["examples"]["too_long"][0]["where"] == "rows.jsonl:4"


def test_lengths_are_those_of_the_groups(encoder: TemplateEncoder) -> None:
    groups, report = prepare_groups([row(i, "Hello " * (i % 7 + 1), "Yes " * (i % 5 + 1), "No") for i in range(1, 50)], encoder)
    prompts = sorted(len(g.prompt_ids) for g in groups)
    assert report.lengths["prompt"]["max"] == prompts[-1]
    assert report.lengths["prompt"]["p50"] in prompts
    assert report.lengths["sequence"]["max"] == max(g.longest_tokens for g in groups)
    assert report.lengths["response"]["mean"] == pytest.approx(np.mean([len(ids) for g in groups for ids in g.response_ids]), abs=0.05)
    assert DataReport().lengths == {}


def test_the_rows_are_read_as_a_stream(encoder: TemplateEncoder) -> None:
    seen: list[int] = []
    steps: list[tuple[int, int]] = []

    def rows() -> Iterator[Preference]:
        for line in range(1, 1001):
            seen.append(line)
            yield row(line, f"Hello {line}")

    groups, report = prepare_groups(rows(), encoder, progress=lambda done: steps.append((done, len(seen))))
    assert len(groups) == report.num_rows == 1000
    assert steps[-1][0] == 1000
    assert all(read == done for done, read in steps)  # no more rows are read than are worked on
    assert len(steps) > 2


def test_progress_may_stop_the_work(encoder: TemplateEncoder) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_groups((row(i) for i in range(1, 10_000)), encoder, progress=stop)


@pytest.mark.parametrize("bad", [row(2, "", "a", "b"), Dropped("missing_field", Where("rows.jsonl", 1, 2), "chosen is null")])
def test_strict_stops_at_the_first_dropped_row(encoder: TemplateEncoder, bad: Preference | Dropped) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: ") as caught:
        prepare_groups([row(1), bad, row(3)], encoder, strict=True)
    assert caught.value.mend
    strict = TemplateEncoder(build_tokenizer(), strict=True)
    if isinstance(bad, Preference):
        with pytest.raises(DataError, match=r"rows\.jsonl:2"):
            strict.encode(bad)


def test_only_the_first_examples_are_kept(encoder: TemplateEncoder) -> None:
    _, report = prepare_groups([row(i, "") for i in range(1, 500)], encoder)
    assert report.dropped["empty_prompt"] == 499
    assert [where.line for where, _ in report.examples["empty_prompt"]] == [1, 2, 3]


@pytest.mark.parametrize(("num_same", "is_warned"), [(1, False), (2, True)])
def test_identical_pairs_are_warned_above_one_percent(
    encoder: TemplateEncoder, num_same: int, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(i, f"Hello {i}") for i in range(1, 101 - num_same)] + [row(200 + i, "Hi", "same", "same") for i in range(num_same)]
    with caplog.at_level(logging.WARNING):
        _, report = prepare_groups(rows, encoder)
    assert bool(report.warnings()) == is_warned
    assert any("identical answers" in record.message for record in caplog.records) == is_warned


def test_check_tells_what_to_do(encoder: TemplateEncoder) -> None:
    def told(report: DataReport, minimum: int = 1) -> str:
        with pytest.raises(DataError) as caught:
            report.check(minimum, name="rows.jsonl")
        return str(caught.value)

    assert "the source is empty" in told(prepare_groups([], encoder)[1])
    assert "raise max_length" in told(prepare_groups([row(1, "Hi", "word " * 80, "no")], encoder)[1])
    assert "lower per_device_train_batch_size" in told(prepare_groups([row(1)], encoder)[1], 4)
    assert "orpo audit" in told(prepare_groups([row(1, "")], encoder)[1])
    assert "no row of rows.jsonl" in told(prepare_groups([row(1, "")], encoder)[1])
    assert "too few rows of rows.jsonl" in told(prepare_groups([row(1)], encoder)[1], 2)


def test_fingerprint_tells_apart_what_trains_differently() -> None:
    one, two = group([1, 2], [3], [4]), group([1, 2], [4], [3])
    variants = [
        [one, two],
        [two, one],
        [one],
        [group([1], [2, 3], [4]), two],
        [group([1, 2], [3], [4], pairs=((1, 0),)), two],
        [group([1, 2, 3], [4]), two],
        [group([1, 2], [3], [4], pairs=()), two],
        [],
    ]
    prints = [fingerprint(groups) for groups in variants]
    assert len(set(prints)) == len(prints)
    assert fingerprint([group([1, 2], [3], [4], line=9), two]) == prints[0]  # where a row came from trains nothing
    assert fingerprint(iter([one, two])) == prints[0]
    wide = TokenGroup(one.prompt_ids.astype(np.int64), one.response_ids, one.pairs, one.is_ended, one.where)
    assert fingerprint([wide, two]) == prints[0]


def test_overlap_stops_unless_allowed(caplog: pytest.LogCaptureFixture) -> None:
    train = [group([1, 2], [3], [4], line=1), group([5], [6], [7], line=2)]
    evaluation = [group([5], [8], [9], line=11), group([1], [2], [3], line=12), group([5], [1], [2], line=13)]
    overlap = find_overlap(train, evaluation)
    assert (overlap.num_shared, overlap.num_eval) == (2, 3)
    with pytest.raises(DataError, match=r"2 of 3 evaluation rows.*rows\.jsonl:2 and rows\.jsonl:11"):
        overlap.check()
    overlap.check(allow=True)
    assert "2 of 3 evaluation rows" in caplog.text
    find_overlap(train[:1], evaluation).check()


def test_a_real_data_set(shared_data: Any, chat_tokenizer: Any) -> None:
    """`rasbt_polite`: 1,100 rows, 6 of them with the same text on both sides."""
    records = json.loads(next((shared_data / "rasbt_polite").glob("*.json")).read_text(encoding="utf-8"))
    rows = [
        Preference(f"{r['instruction']}\n{r['input']}".strip(), (r["chosen"], r["rejected"]), ((0, 1),), Where("rasbt", i))
        for i, r in enumerate(records)
    ]
    groups, report = prepare_groups(rows, TemplateEncoder(chat_tokenizer))
    assert report.num_rows == len(rows)
    assert report.dropped["identical_answers"] == sum(r["chosen"].strip() == r["rejected"].strip() for r in records)
    assert report.num_groups == len(groups) == len(rows) - report.dropped.total()
    for i in (0, len(groups) // 2, len(groups) - 1):
        chosen = chat_tokenizer.decode(groups[i].response_ids[0])
        assert chosen == rows[groups[i].where.row].responses[0] + "<|im_end|>"


def test_fingerprint_sees_every_change_of_the_data() -> None:
    def made(prompt: list[int], first: list[int], second: list[int], is_ended: bool = True) -> TokenGroup:
        ids = [np.array(part, dtype=np.int32) for part in (prompt, first, second)]
        return TokenGroup(ids[0], (ids[1], ids[2]), ((0, 1),), (is_ended, True), Where("f", 0))

    variants = [
        [made([1, 2], [3], [4])],
        [made([1], [2, 3], [4])],
        [made([1, 2], [4], [3])],
        [made([1, 2], [3], [4], is_ended=False)],
        [made([1, 2], [3], [4]), made([1], [2], [3])],
        [made([1], [2], [3]), made([1, 2], [3], [4])],
        [],
    ]
    assert len({fingerprint(groups) for groups in variants}) == len(variants)
    assert fingerprint(variants[0]) == fingerprint([made([1, 2], [3], [4])])
