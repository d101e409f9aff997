"""The known defects of the real files, found by the audit."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from orpo.audit import Audit, AuditOptions, run_audit, write_clean


@cache
def audit_of(path: Path) -> Audit:
    return run_audit(path)


def found(audit: Audit) -> dict[str, int]:
    return {finding.code: finding.num_rows for finding in audit.findings}


def lines_of(audit: Audit, code: str) -> list[int]:
    return [int(place.rpartition(":")[2]) for finding in audit.findings if finding.code == code for place in finding.places]


def test_pandalm_dirty(shared_data: Path) -> None:
    path = shared_data / "pandalm_dirty" / "testset-v1.json"
    audit = audit_of(path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    counts = found(audit)
    assert counts["empty_answer"] == 52
    assert counts["wrong_type"] == 6
    assert counts["no_preference"] == 105
    assert counts["duplicates"] == 106
    # The same by a plain reading: what a majority prefers, both answers being text, seen before.
    seen: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        votes = [row[f"annotator{k}"] for k in (1, 2, 3)]
        first, second = row["response1"], row["response2"]
        if isinstance(first, str) and isinstance(second, str) and max(votes.count(1), votes.count(2)) > 1:
            chosen, rejected = (first, second) if votes.count(1) > 1 else (second, first)
            seen[row["instruction"], row["input"], chosen, rejected] += 1
    assert sum(number - 1 for number in seen.values()) == 106
    text = path.read_text(encoding="utf-8").split("\n")
    for line in lines_of(audit, "wrong_type"):
        assert any(f'"response{k}": true' in part for part in text[line - 1 : line + 9] for k in (1, 2))


def test_orca_dpo_rewards_short_answers(shared_data: Path) -> None:
    audit = audit_of(shared_data / "orca_dpo" / "validation.jsonl")
    words = next(shortcut for shortcut in audit.shortcuts if shortcut.feature == "words")
    assert words.direction == "less"
    assert words.accuracy == pytest.approx(0.83, abs=0.015)
    note = next(finding.note for finding in audit.findings if finding.code == "shortcut")
    assert "words (less on the chosen side)" in note
    assert audit.chosen_longer < 0.2


def test_rasbt_polite_is_neutral_in_length(shared_data: Path) -> None:
    audit = audit_of(shared_data / "rasbt_polite" / "instruction-data-with-preference.json")
    assert found(audit)["identical_answers"] == 6
    words = next(shortcut for shortcut in audit.shortcuts if shortcut.feature == "words")
    assert not words.is_warned_of
    assert 0.45 < audit.chosen_longer < 0.52


def test_dpo_zh_demo_has_lost_characters(shared_data: Path) -> None:
    path = shared_data / "sharegpt_demo" / "dpo_zh_demo.json"
    audit = audit_of(path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert found(audit)["replacement_character"] == sum("\ufffd" in json.dumps(row, ensure_ascii=False) for row in rows) == 6
    assert found(audit)["duplicates"] == 11


def test_dpo_en_demo_has_duplicates(shared_data: Path) -> None:
    assert found(audit_of(shared_data / "sharegpt_demo" / "dpo_en_demo.json"))["duplicates"] == 5


def test_hh_harmless(shared_data: Path) -> None:
    counts = found(audit_of(shared_data / "hh_harmless" / "harmless-base-test.jsonl.gz"))
    assert counts["empty_answer"] == 4
    assert counts["prompts_differ"] == 5
    assert counts["turn_in_answer"] > 20


def test_qa_feedback(shared_data: Path) -> None:
    audit = audit_of(shared_data / "qa_feedback" / "dev_feedback.json")
    assert found(audit)["no_preference"] == 12
    assert audit.num_pairs == 488


@pytest.mark.parametrize(
    "name",
    [
        "pandalm_dirty/testset-v1.json",
        "rasbt_polite/instruction-data-with-preference.json",
        "sharegpt_demo/dpo_zh_demo.json",
        "hh_harmless/harmless-base-test.jsonl.gz",
        "qa_feedback/dev_feedback.json",
    ],
)
def test_the_cleaned_set_is_clean_and_the_log_is_complete(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / name
    audit = audit_of(path)
    cleaned = write_clean(audit, path, AuditOptions(), tmp_path / "clean.jsonl")
    lines = (tmp_path / "clean.jsonl").read_bytes().splitlines()
    log = [json.loads(line) for line in (tmp_path / "clean.jsonl.log.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert (len(lines), len(log)) == (cleaned.num_written, cleaned.num_left)
    assert cleaned.num_written + cleaned.num_left == audit.num_rows
    left_rows = {item["row"] for item in log}
    assert all(item["codes"] and item["why"] for item in log)
    again = run_audit(tmp_path / "clean.jsonl")
    assert not {finding.code for finding in again.findings if finding.kind.leaves}
    assert again.num_usable == again.num_rows == cleaned.num_written
    if not name.endswith(".gz"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert [json.loads(line) for line in lines] == [row for i, row in enumerate(rows) if i not in left_rows]
