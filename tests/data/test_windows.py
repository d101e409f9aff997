"""Streams by windows: no row twice in a pass and none lost, the same from any position, everything counted once."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo.data.dataset import fingerprint, prepare_groups
from orpo.data.formats import stream_preferences
from orpo.data.settings import DataSettings
from orpo.data.stored.measures import prompt_hash
from orpo.data.stored.tokenise import Means
from orpo.data.stored.windows import StreamPosition, WindowedGroups
from orpo.data.template import TemplateEncoder, make_encoder
from orpo.data.types import Dropped, Preference, Where
from orpo.errors import DataError
from tinymodels import build_tiny_tokenizer

SETTINGS = DataSettings.of(
    {
        "pairs": "best_worst",
        "sft_rows": False,
        "strict_data": False,
        "max_length": 200,
        "truncation": "drop",
        "special_tokens_in_text": "warn",
    }
)


@pytest.fixture(scope="module")
def encoder() -> TemplateEncoder:
    return make_encoder(build_tiny_tokenizer(), SETTINGS)


def rows_of(number: int, bad: tuple[int, ...] = (), changed: int | None = None) -> Iterator[Preference | Dropped]:
    for row in range(number):
        where = Where("rows", row)
        if row in bad:
            yield Dropped("empty_answer", where)
        else:
            yield Preference(f"Question {row}?", (f"good {row}", "bad" if row != changed else "worse"), ((0, 1),), where)


def stream(encoder: TemplateEncoder, number: int, bad: tuple[int, ...] = (), **options: Any) -> WindowedGroups:
    given_options = {"window_rows": 5, "seed": 1, "means": Means(), **options}
    changed = given_options.pop("changed", None)
    return WindowedGroups(lambda: rows_of(number, bad, changed), encoder, **given_options)


def taken(found: WindowedGroups, num_steps: int, rows_per_step: int = 4, position: StreamPosition | None = None) -> list[Any]:
    steps = found.steps(rows_per_step, position or StreamPosition())
    return [([group.where.row for group in groups], after) for groups, after in itertools.islice(steps, num_steps)]


@settings(max_examples=40)
@given(
    number=st.integers(1, 30),
    window_rows=st.integers(1, 12),
    rows_per_step=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    chance=st.randoms(),
)
def test_a_pass_holds_every_row_once_and_goes_on_from_any_position(
    encoder: TemplateEncoder, number: int, window_rows: int, rows_per_step: int, seed: int, chance: Any
) -> None:
    bad = tuple(row for row in range(1, number) if chance.random() < 0.2)
    usable = [row for row in range(number) if row not in bad]
    if not set(range(window_rows)) & set(usable):
        return
    steps_of_a_pass = -(-len(usable) // rows_per_step)
    whole = taken(stream(encoder, number, bad, window_rows=window_rows, seed=seed), 3 * steps_of_a_pass, rows_per_step)
    for first in range(0, len(whole), steps_of_a_pass):
        rows = [row for step, _ in whole[first : first + steps_of_a_pass] for row in step]
        assert Counter(rows) == Counter(usable)
        sizes = [len(step) for step, _ in whole[first : first + steps_of_a_pass]]
        assert sizes[:-1] == [rows_per_step] * (steps_of_a_pass - 1)  # the tail of a pass is a smaller step
        windows = [row // window_rows for row in rows]
        assert windows == sorted(windows)  # shuffled inside of a window alone
    cut = chance.randrange(len(whole))
    position = StreamPosition(**json.loads(json.dumps(whole[cut][1].to_state())))
    resumed = stream(encoder, number, bad, window_rows=window_rows, seed=seed)
    assert taken(resumed, len(whole) - cut - 1, rows_per_step, position) == whole[cut + 1 :]
    report = resumed.report
    if len(whole) - cut - 1 > steps_of_a_pass:  # the whole source was read: each row is counted once
        assert [report.num_rows, report.num_groups, dict(report.dropped)] == [
            number,
            len(usable),
            {"empty_answer": len(bad)} if bad else {},
        ]


def test_each_pass_and_seed_has_an_order_of_its_own(encoder: TemplateEncoder) -> None:
    orders = [[row for step, _ in taken(stream(encoder, 40, window_rows=20, seed=seed), 20) for row in step] for seed in (1, 2)]
    assert len({tuple(order[start : start + 40]) for order in orders for start in (0, 40)}) == 4


def test_the_groups_are_those_that_are_made_of_the_whole_source(encoder: TemplateEncoder, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{row}?", "chosen": f"good {row}", "rejected": "bad " * (row % 60)} for row in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    groups, report = prepare_groups(stream_preferences(str(path)), encoder)
    for num_processes in (1, 2):
        found = WindowedGroups(
            lambda: stream_preferences(str(path)), encoder, window_rows=70, seed=0, means=Means(num_processes, rows_alone=64)
        )
        steps = found.steps(10, StreamPosition())
        seen = [group for step, _ in itertools.islice(steps, -(-len(groups) // 10)) for group in step]
        steps.close()
        assert fingerprint(sorted(seen, key=lambda group: group.where.row)) == fingerprint(groups)
        assert found.report.to_dict()["dropped"] == report.to_dict()["dropped"]
        assert found.report.lengths == report.lengths


def test_several_sources_with_weights(encoder: TemplateEncoder, tmp_path: Path) -> None:
    """The mix that is made without a stream, once in each pass: three rows of one to one of the other, until the first has none left."""
    places = []
    for name, number, weight in (("a", 30, 3), ("b", 25, 1)):
        rows = [{"prompt": f"{name}{row}?", "chosen": f"good {row}", "rejected": f"bad {row}"} for row in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        places.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    whole, _ = prepare_groups(stream_preferences(places), encoder)
    found = WindowedGroups(lambda: stream_preferences(places), encoder, window_rows=8, seed=0, means=Means())
    num_steps = -(-len(whole) // 4)
    seen = [group.where for step, _ in itertools.islice(found.steps(4, StreamPosition()), 2 * num_steps) for group in step]
    assert len(whole) > 36
    assert Counter(seen) == Counter(2 * [group.where for group in whole])
    assert Counter(seen[: len(whole)]) == Counter(group.where for group in whole)


def test_a_source_is_read_no_further_than_is_asked(encoder: TemplateEncoder) -> None:
    last = 0

    def endless() -> Iterator[Preference | Dropped]:
        nonlocal last
        while True:
            last += 1
            yield next(iter(rows_of(1)))

    found = WindowedGroups(endless, encoder, window_rows=100, seed=0, means=Means())
    next(found.steps(8, StreamPosition()))
    assert last < 1000


def test_rows_whose_prompt_is_evaluated_on_are_left_out_and_counted(encoder: TemplateEncoder) -> None:
    plain = stream(encoder, 20)
    held_out = [group for step, _ in taken_groups(plain, 5) for group in step if group.where.row in (3, 11)]
    found = stream(encoder, 20, set_aside=frozenset(prompt_hash(group.prompt_ids) for group in held_out))
    rows = [row for step, _ in taken(found, 5, 4) for row in step]
    assert sorted(rows[:18]) == [row for row in range(20) if row not in (3, 11)]
    assert found.report.dropped == {"held_out": 2}


def taken_groups(found: WindowedGroups, num_steps: int) -> list[Any]:
    return list(itertools.islice(found.steps(4, StreamPosition()), num_steps))


def test_duplicates_are_looked_for_inside_a_window(encoder: TemplateEncoder) -> None:
    same = Preference("Question?", ("good", "bad"), ((0, 1),), Where("rows", 0))
    found = WindowedGroups(lambda: iter([same] * 6), encoder, window_rows=3, seed=0, means=Means())
    taken(found, 2, 6)
    assert found.report.num_duplicates == 4
    assert found.report.num_rows == 6


def test_a_source_that_has_changed_is_refused(encoder: TemplateEncoder) -> None:
    position = taken(stream(encoder, 20), 3)[-1][1]
    assert taken(stream(encoder, 20), 2, position=position)
    for options in ({"number": 20, "changed": position.start}, {"number": position.start}):
        with pytest.raises(DataError, match=rf"the rows from {position.start} on are not those"):
            taken(stream(encoder, **options), 2, position=position)


def test_nothing_usable_stops(encoder: TemplateEncoder) -> None:
    with pytest.raises(DataError, match=r"(?s)no row of the first 5 rows of the stream can be trained on.*empty_answer"):
        stream(encoder, 9, bad=tuple(range(5)))


def test_the_fingerprint_is_of_what_the_stream_is(encoder: TemplateEncoder) -> None:
    first = fingerprint(stream(encoder, 20, source={"path": "a"}))
    assert first == fingerprint(stream(encoder, 30, source={"path": "a"}))
    others = [{"source": {"path": "b"}}, {"source": {"path": "a"}, "window_rows": 6}, {"source": {"path": "a"}, "seed": 2}]
    assert len({first, *(fingerprint(stream(encoder, 20, **options)) for options in others)}) == 4
