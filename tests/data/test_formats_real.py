"""The real files of ../shared/data, row by row against a plain reading of each file."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from orpo.data.formats import load_preferences
from orpo.data.types import Preference
from orpo.errors import DataError

Plain = dict[int, tuple[Any, Any, Any]]
"""row -> (prompt, chosen, rejected), for the rows that a plain reading keeps."""


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_lines(path: Path) -> list[Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.split(b"\n") if line.strip()]


def only_answer(preference: Preference, index: int) -> str:
    response = preference.responses[index]
    if isinstance(response, str):
        return response
    (message,) = response
    assert message["role"] == "assistant"
    return message["content"]


def check(path: Path, plain: Plain, reasons: dict[str, int], num_rows: int) -> list[Preference]:
    preferences, dropped, _ = load_preferences(path)
    assert Counter(item.reason for item in dropped) == reasons
    assert len(preferences) + len(dropped) == num_rows
    assert sorted(item.where.row for item in (*preferences, *dropped)) == list(range(num_rows))
    assert {p.where.row: (p.prompt, only_answer(p, p.pairs[0][0]), only_answer(p, p.pairs[0][1])) for p in preferences} == plain
    return preferences


def test_rasbt_polite(shared_data: Path) -> None:
    path = shared_data / "rasbt_polite" / "instruction-data-with-preference.json"
    rows = load_json(path)
    plain = {
        i: (row["instruction"] + (f"\n\n{row['input']}" if row["input"] else ""), row["chosen"], row["rejected"])
        for i, row in enumerate(rows)
        if row["chosen"].strip() != row["rejected"].strip()
    }
    check(path, plain, {"identical_answers": 6}, 1100)
    assert len(plain) == 1094


def test_hh_harmless(shared_data: Path) -> None:
    path = shared_data / "hh_harmless" / "harmless-base-test.jsonl.gz"
    mark = "\n\nAssistant:"
    plain: Plain = {}
    num_empty = num_differ = 0
    for i, row in enumerate(load_lines(path)):
        (prompt, chosen), (other, rejected) = (row[side].rsplit(mark, 1) for side in ("chosen", "rejected"))
        if prompt != other:
            num_differ += 1
        elif not chosen.strip() or not rejected.strip():
            num_empty += 1
        else:
            plain[i] = (prompt, chosen.strip(), rejected.strip())
    assert (num_empty, num_differ) == (4, 5)
    preferences, dropped, shape = load_preferences(path)
    assert shape.name == "HH transcripts"
    assert Counter(item.reason for item in dropped) == {"empty_answer": 4, "prompts_differ": 5}
    assert {p.where.row for p in preferences} == plain.keys()
    for preference in preferences:
        prompt, chosen, rejected = plain[preference.where.row]
        assert (only_answer(preference, 0), only_answer(preference, 1)) == (chosen, rejected)
        assert preference.where.line == preference.where.row + 1
        names = {"user": "Human", "assistant": "Assistant"}
        rebuilt = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in preference.prompt if isinstance(m, dict))
        assert rebuilt.split() == prompt.split()


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_sharegpt(shared_data: Path, name: str) -> None:
    path = shared_data / "sharegpt_demo" / name
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    plain = {
        i: (
            tuple({"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]),
            row["chosen"]["value"],
            row["rejected"]["value"],
        )
        for i, row in enumerate(load_json(path))
    }
    check(path, plain, {}, 300)


def test_typed_parts(shared_data: Path) -> None:
    path = shared_data / "sharegpt_demo" / "v1_dpo_demo.jsonl"

    def turns(messages: list[Any]) -> tuple[Any, ...]:
        return tuple({"role": m["role"], "content": m["content"][0]["value"]} for m in messages)

    plain = {
        i: (turns(row["chosen_messages"][:-1]), *(turns(row[f"{side}_messages"])[-1]["content"] for side in ("chosen", "rejected")))
        for i, row in enumerate(load_lines(path))
    }
    assert all(len(m["content"]) == 1 for row in load_lines(path) for m in row["chosen_messages"])
    check(path, plain, {}, 10)


def test_unpaired_rows_are_refused_with_what_is_needed(shared_data: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_preferences(shared_data / "sharegpt_demo" / "kto_en_demo.json")
    message = str(caught.value)
    for part in ("kto_en_demo.json", "unpaired rows (KTO)", "'label'", "two answers to the same prompt", "second answer", "sft_rows: true"):
        assert part in message
    preferences, dropped, _ = load_preferences(shared_data / "sharegpt_demo" / "kto_en_demo.json", sft_rows=True)
    rows = load_json(shared_data / "sharegpt_demo" / "kto_en_demo.json")
    good = [i for i, row in enumerate(rows) if row["label"] is True]
    assert [p.where.row for p in preferences] == good
    assert {item.reason for item in dropped} == {"unpaired"}
    for preference in preferences:
        messages = rows[preference.where.row]["messages"]
        assert [m["content"] for m in preference.prompt if isinstance(m, dict)] == [m["content"] for m in messages[:-1]]
        assert only_answer(preference, 0) == messages[-1]["content"]


def test_orca_dpo(shared_data: Path) -> None:
    path = shared_data / "orca_dpo" / "validation.jsonl"
    plain = {
        i: (tuple(row["input"]["messages"]), row["preferred_output"][0]["content"], row["non_preferred_output"][0]["content"])
        for i, row in enumerate(load_lines(path))
    }
    preferences = check(path, plain, {}, 284)
    assert sum(len(only_answer(p, 0).split()) < len(only_answer(p, 1).split()) for p in preferences) / 284 == pytest.approx(0.83, abs=0.01)


def test_pandalm_dirty(shared_data: Path) -> None:
    path = shared_data / "pandalm_dirty" / "testset-v1.json"
    plain: Plain = {}
    reasons: Counter[str] = Counter()
    for i, row in enumerate(load_json(path)):
        votes = [row[f"annotator{k}"] for k in (1, 2, 3)]
        first, second = row["response1"], row["response2"]
        if not isinstance(first, str) or not isinstance(second, str):
            reasons["wrong_type"] += 1
        elif votes.count(1) < 2 and votes.count(2) < 2:
            reasons["no_preference"] += 1
        elif not first.strip() or not second.strip():
            reasons["empty_answer"] += 1
        else:
            prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
            plain[i] = (prompt, first, second) if votes.count(1) > 1 else (prompt, second, first)
    assert reasons["wrong_type"] == 6
    check(path, plain, dict(reasons), 999)


@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_qa_feedback(shared_data: Path, pairs: str) -> None:
    path = shared_data / "qa_feedback" / "dev_feedback.json"
    rows = load_json(path)
    preferences, dropped, _ = load_preferences(path, pairs=pairs)
    found = {p.where.row: {(only_answer(p, i), only_answer(p, j)) for i, j in p.pairs} for p in preferences}
    assert len(found) + len(dropped) == 500
    num_votes = 0
    for i, row in enumerate(rows):
        answers = [row[f"prediction {k}"] for k in range(1, 5)]
        wins = Counter[int]()
        won: set[tuple[str, str]] = set()
        for (a, b), vote in zip(combinations(range(4), 2), row["preference"], strict=True):
            if vote:
                winner, loser = (a, b) if vote == 1 else (b, a)
                wins[winner] += 1
                wins[loser] -= 1
                won.add((answers[winner], answers[loser]))
        num_votes += len(won)
        if pairs == "all":
            assert found.get(i, set()) == won
        elif i in found:
            ((chosen, rejected),) = found[i]
            margin = wins[answers.index(chosen)] - wins[answers.index(rejected)]
            assert (rejected, chosen) not in won
            assert margin == max(wins[a] - wins[b] for a in range(4) for b in range(4) if (answers[b], answers[a]) not in won)
        else:
            assert not won
    assert num_votes == 3000 - 384


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ifeval/input_data.jsonl", "prompts without answers"),
        ("mtbench/question.jsonl", "no columns that hold a prompt and two answers"),
        ("mtbench/reference_answer_gpt-4.jsonl", "no columns that hold a prompt and two answers"),
        ("mtbench/judge_prompts.jsonl", "no columns that hold a prompt and two answers"),
        ("paper_outputs/Mistral-ORPO-beta.json", "instruction-only rows"),
        ("paper_outputs/mtbench_Mistral-ORPO-beta.jsonl", "no columns that hold a prompt and two answers"),
    ],
)
def test_files_without_preferences_are_refused(shared_data: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_preferences(shared_data / name)
    assert name in str(caught.value)
    assert "expected:" in str(caught.value)
    assert "to mend it:" in str(caught.value)
