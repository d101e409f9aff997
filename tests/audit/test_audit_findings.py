"""Each kind of finding on rows made for it: exactly the rows that show it, and nothing on rows that do not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo.audit import Audit, AuditOptions, Finding, run_audit
from orpo.audit.duplicates import near_copies
from orpo.audit.inspect import InspectOptions, Inspector
from orpo.audit.shortcuts import NUM_FOLDS, folds_of
from orpo.audit.surface import language_of, looks_cut, similarity, text_flags, words_of
from orpo.data.formats import detect_shape
from orpo.data.types import Where
from orpo.errors import DataError

BEGINNINGS, ENDS = ["ka", "lo", "mi", "nu", "pe", "ra", "so", "tu", "vi", "wo"], ["ban", "dor", "fin", "gul", "hem", "jas", "kit"]
WORDS = [beginning + end for beginning in BEGINNINGS for end in ENDS]
SIDES = ("prompt", "chosen", "rejected")


def words(rng: random.Random, number: int) -> str:
    return " ".join(rng.choices(WORDS, k=number)).capitalize() + "."


def plain_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random words with nothing to find: answers of both sides from one distribution."""
    rng = random.Random(seed)
    lengths = ((12, rng.randint(10, 30), rng.randint(10, 30)) for _ in range(number))
    return [dict(zip(SIDES, (words(rng, length) for length in row), strict=True)) for row in lengths]


def places(audit: Audit, code: str) -> list[int]:
    """Row numbers of a finding."""
    return [int(place.rpartition(" ")[2]) for found in audit.findings if found.code == code for place in found.places]


def finding(audit: Audit, code: str) -> Finding:
    (found,) = [found for found in audit.findings if found.code == code]
    return found


def codes(audit: Audit) -> set[str]:
    return {found.code for found in audit.findings}


def test_nothing_is_found_where_there_is_nothing() -> None:
    audit = run_audit(plain_rows(400))
    assert codes(audit) == set()
    assert audit.is_clean
    assert (audit.num_rows, audit.num_usable, audit.num_pairs) == (400, 400, 400)
    assert "Nothing found" in "\n".join(audit.lines())


def test_every_finding_says_how_many_which_why_and_what_to_do() -> None:
    rows = plain_rows(60)
    rows[3]["chosen"] = ""
    rows[8] = dict(rows[7])
    audit = run_audit(rows)
    assert codes(audit) == {"empty_answer", "duplicates"}
    for found in audit.findings:
        assert found.num_rows == 1
        assert found.kind.why
        assert found.kind.mend
        assert found.places
    text = "\n".join(audit.lines())
    for part in ("the data set row 3", "the data set row 8", "why:", "do:"):
        assert part in text
    facts = json.loads(json.dumps(audit.to_dict()))
    assert {item["code"]: item["num_rows"] for item in facts["findings"]} == {"empty_answer": 1, "duplicates": 1}
    assert not audit.is_clean


def test_exact_duplicates_are_the_later_copies() -> None:
    rows = plain_rows(50)
    rows += [dict(rows[4]), {**rows[9], "chosen": rows[9]["chosen"] + " \n"}, {**rows[4], "note": "other columns do not matter"}]
    audit = run_audit(rows)
    assert places(audit, "duplicates") == [50, 51, 52]
    assert "near_duplicates" not in codes(audit)


def test_near_duplicates_are_near_in_answers_and_prompt() -> None:
    rng = random.Random(1)
    rows = [{"prompt": words(rng, 40), "chosen": words(rng, 60), "rejected": words(rng, 60)} for _ in range(60)]

    def change_one(text: str) -> str:
        parts = text.split()
        parts[len(parts) // 2] = "zzz"
        return " ".join(parts)

    rows.append({key: change_one(value) for key, value in rows[5].items()})  # near in all
    rows.append({**rows[6], "chosen": words(rng, 60), "rejected": words(rng, 60)})  # the same prompt, other answers
    rows.append({**rows[7], "prompt": words(rng, 40)})  # the same answers, another prompt
    audit = run_audit(rows)
    assert places(audit, "near_duplicates") == [60]
    assert "row 60 like the data set row 5" in finding(audit, "near_duplicates").note
    assert places(audit, "repeated_prompts") == [6, 61]
    assert places(audit, "repeated_chosen") == [7, 62]


def test_minhash_agrees_with_the_jaccard_similarity_it_estimates() -> None:
    rng = random.Random(2)
    inspector = Inspector(detect_shape([{"prompt": "a", "chosen": "b", "rejected": "c"}]), InspectOptions())
    errors = []
    for share in (0.0, 0.3, 0.6, 0.8, 0.95):
        for _ in range(20):
            first = rng.choices(WORDS, k=200)
            second = [word if rng.random() < share ** (1 / 5) else "other" + word for word in first]
            runs = [{tuple(some[i : i + 5]) for i in range(len(some) - 4)} for some in (first, second)]
            exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
            a, b = (inspector.prompt_signature(" ".join(some)) for some in (first, second))
            errors.append(float(np.mean(a == b)) - exact)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.07  # sqrt(J (1 - J) / 64) is at most 0.0625


def test_a_thousand_variations_of_one_row_take_as_many_look_ups() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**32, 64, dtype=np.uint32)
    signatures = np.tile(base, (3000, 1))
    signatures[np.arange(3000), rng.integers(0, 64, 3000)] = 7
    found = near_copies(signatures, signatures, np.arange(3000))
    assert len(found) == 2999
    assert set(found.values()) == {0}


def test_contradictions_name_all_their_rows() -> None:
    rows = plain_rows(40)
    rows.append({"prompt": rows[3]["prompt"].upper(), "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"] + " "})
    audit = run_audit(rows)
    assert places(audit, "contradictions") == [3, 40]
    assert finding(audit, "contradictions").severity == "error"


def test_overlap_with_evaluation_data(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = [{"prompt": words(rng, 40), "chosen": words(rng, 20), "rejected": words(rng, 20)} for _ in range(40)]
    near = rows[7]["prompt"].replace(rows[7]["prompt"].split()[0], "Zzz", 1)
    evaluation = [
        {**rows[5], "prompt": rows[5]["prompt"].upper() + " !"},
        {**rows[6], "prompt": near},
        {**rows[8], "prompt": words(rng, 40)},
    ]
    audit = run_audit(rows, AuditOptions(evaluation=evaluation))
    assert places(audit, "evaluation_overlap") == [5, 7]
    prompts_alone = tmp_path / "prompts.jsonl"
    prompts_alone.write_text(json.dumps({"prompt": rows[9]["prompt"]}), encoding="utf-8")
    assert places(run_audit(rows, AuditOptions(evaluation=str(prompts_alone))), "evaluation_overlap") == [9]


def test_overlap_with_benchmarks(tmp_path: Path) -> None:
    rng = random.Random(4)
    rows = [{"prompt": words(rng, 40), "chosen": words(rng, 20), "rejected": words(rng, 20)} for _ in range(40)]
    inside = " ".join(rows[11]["prompt"].split()[5:25])  # a run of 20 words of row 11, in another surrounding
    (tmp_path / "a.jsonl").write_text(json.dumps({"turns": [f"Please: {inside} What follows?", "And then?"]}), encoding="utf-8")
    (tmp_path / "b.txt").write_text(f"\n{rows[12]['prompt'].lower()}\n", encoding="utf-8")
    (tmp_path / "short.jsonl").write_text(json.dumps({"prompt": " ".join(rows[13]["prompt"].split()[:12])}), encoding="utf-8")
    options = AuditOptions(benchmarks=[tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "short.jsonl"])
    audit = run_audit(rows, options)
    assert places(audit, "benchmark_overlap") == [11, 12]
    assert finding(audit, "benchmark_overlap").numbers["num_reference_prompts"] == 4
    (tmp_path / "none.jsonl").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="no prompts found"):
        run_audit(rows, AuditOptions(benchmarks=[tmp_path / "none.jsonl"]))


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("a \ufffd b", "replacement_character"),
        ("It’s fine".encode().decode("cp1252"), "mojibake"),
        ("für".encode().decode("latin-1"), "mojibake"),
        ("a\x00b", "control_characters"),
        ("a\x1b[31mb", "control_characters"),
        ("x <|im_end|> y", "special_token_text"),
        ("x </s>", "special_token_text"),
        ("[INST] x", "special_token_text"),
        ("<start_of_turn>model", "special_token_text"),
    ],
)
def test_damaged_and_special_text(text: str, flag: str) -> None:
    assert text_flags(text) == {flag}


@pytest.mark.parametrize(
    "text", ["plain", "naïve café “quoted” – 100 °C £5 São Paulo Ångström", "a < b and c > d [1]", "<b>bold</b>", "日本語。\n\t"]
)
def test_good_text_is_not_flagged(text: str) -> None:
    assert text_flags(text) == set()


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_flags_are_found_on_every_side(side: str) -> None:
    rows = plain_rows(30)
    rows[17][side] += " \ufffd"
    rows[19][side] += " <|im_start|>"
    audit = run_audit(rows)
    assert places(audit, "replacement_character") == [17]
    assert places(audit, "special_token_text") == [19]


def test_another_turn_inside_an_answer() -> None:
    rows = plain_rows(30)
    rows[4]["chosen"] += "\n\nHuman: and then?"
    rows[5]["rejected"] = "### Response: " + rows[5]["rejected"]
    rows[6]["prompt"] += "\nHuman: fine in a prompt"
    rows[7]["chosen"] = "The human: a study. As the user: put it"
    assert places(run_audit(rows), "turn_in_answer") == [4, 5]


def test_low_contrast() -> None:
    rows = plain_rows(30)
    long = " ".join(f"word{i}" for i in range(60))
    rows[4] |= {"chosen": long + " yes", "rejected": long + " no"}
    assert places(run_audit(rows), "low_contrast") == [4]
    assert similarity(["a", "b", "b"], ["b", "a", "b"]) == 1
    assert similarity(["a", "b"], ["c"]) == 0
    assert similarity(["a", "a"], ["a"]) == pytest.approx(0.5)


def test_answers_that_stop_in_the_middle() -> None:
    rows = plain_rows(40)
    for row in rows[:10]:
        row["chosen"] = " ".join(["word"] * 40)
    audit = run_audit(rows)
    assert finding(audit, "looks_cut").num_rows == 10
    assert not looks_cut("word " * 40 + "end.", 41)
    assert not looks_cut("short answer", 2)
    assert not looks_cut("这是一个很长的句子" * 10, 90)


def shortcut_of(audit: Audit, feature: str) -> Any:
    return next(shortcut for shortcut in audit.shortcuts if shortcut.feature == feature)


@pytest.mark.parametrize("direction", ["more", "less"])
def test_length_bias_is_measured(direction: str) -> None:
    rng = random.Random(5)
    rows = []
    for i in range(400):
        short, long = words(rng, 12), words(rng, 24)
        wins_long = (i % 10 < 8) == (direction == "more")  # four fifths
        rows.append({"prompt": words(rng, 10), "chosen": long if wins_long else short, "rejected": short if wins_long else long})
    audit = run_audit(rows)
    shortcut = shortcut_of(audit, "words")
    assert shortcut.accuracy == pytest.approx(0.8, abs=1e-9)
    assert shortcut.direction == direction
    assert 0.03 < shortcut.error < 0.05  # 1.96 * sqrt(0.8 * 0.2 / 400)
    assert "words" in finding(audit, "shortcut").note
    assert audit.chosen_longer == pytest.approx(0.8 if direction == "more" else 0.2)


@pytest.mark.parametrize(
    ("feature", "mark"),
    [
        ("exclamations", lambda text: text + " Great!"),
        ("refusal", lambda text: "I'm sorry, but I cannot help with that. " + text),
        ("bullets", lambda text: "- " + text.replace(" ", "\n- ", 2)),
        ("opening phrase", lambda text: "Sure thing " + text),
        ("language", lambda text: "der die und das nicht ist " + text),
    ],
)
def test_tells_of_the_rejected_side_are_found(feature: str, mark: Any) -> None:
    rows = plain_rows(300, seed=6)
    for row in rows[:240]:
        row["rejected"] = mark(row["rejected"])
    shortcut = shortcut_of(run_audit(rows), feature)
    assert shortcut.accuracy > 0.75
    assert shortcut.is_warned_of


def test_a_rare_but_sure_tell_is_found_too() -> None:
    rows = plain_rows(1000, seed=7)
    for row in rows[:50]:
        row["rejected"] += " Nice!"
    shortcut = shortcut_of(run_audit(rows), "exclamations")
    assert shortcut.accuracy == pytest.approx(0.525)
    assert (shortcut.coverage, shortcut.rule_accuracy) == (pytest.approx(0.05), 1.0)
    assert shortcut.is_warned_of


def test_nothing_is_told_from_a_few_pairs() -> None:
    rows = plain_rows(40)
    for row in rows:
        row["chosen"] += " !"
    audit = run_audit(rows)
    assert audit.shortcuts == []


def test_all_pairs_of_a_prompt_are_in_one_fold() -> None:
    keys = np.asarray([1, 2, 1, 3, 2, 9, 9, 9] * 20, dtype=np.uint64)
    folds = folds_of(keys)
    assert all(len(set(folds[keys == key].tolist())) == 1 for key in set(keys.tolist()))
    assert set(folds.tolist()) <= set(range(NUM_FOLDS))


def test_scenarios_by_column() -> None:
    rng = random.Random(8)
    rows = []
    for scenario, number in (("refund", 150), ("booking", 140), ("rare", 6)):
        for row in plain_rows(number, seed=len(scenario)):
            rows.append({**row, "scenario": scenario})
    for row in rows[:150]:
        row["chosen"] = f"Thank you for your message, we are sorry and will refund you within five days {rng.choice(WORDS)}."
    audit = run_audit(rows)
    assert audit.scenario_column == "scenario"
    assert [(s.name, s.num_pairs) for s in audit.scenarios] == [("refund", 150), ("booking", 140), ("rare", 6)]
    assert finding(audit, "thin_scenarios").numbers["scenarios"][0]["name"] == "rare"
    assert [s["name"] for s in finding(audit, "flat_chosen").numbers["scenarios"]] == ["refund"]
    assert finding(audit, "thin_scenarios").severity == "warning"
    with pytest.raises(DataError, match="no column 'scenaro'"):
        run_audit(rows, AuditOptions(scenario_column="scenaro"))


def test_a_dominant_scenario() -> None:
    rows = [{**row, "topic": "a" if i % 10 else "b"} for i, row in enumerate(plain_rows(200))]
    assert "a (180 pairs)" in finding(run_audit(rows), "dominant_scenario").note


def test_without_a_column_similar_prompts_are_grouped() -> None:
    rng = random.Random(9)
    topics = {
        "cooking": ["recipe", "oven", "flour", "butter", "simmer"],
        "travel": ["airport", "luggage", "passport", "flight", "hotel"],
        "law": ["contract", "court", "clause", "tenant", "lawyer"],
    }
    rows = []
    for i, row in enumerate(plain_rows(300, seed=10)):
        name = list(topics)[i % 3]
        row["prompt"] = " ".join(rng.choices(topics[name], k=10))
        rows.append(row)
    audit = run_audit(rows)
    assert audit.scenario_column is None
    named = " ".join(scenario.name for scenario in audit.scenarios)
    assert sum(any(word in named for word in some) for some in topics.values()) == 3
    assert sum(scenario.share for scenario in audit.scenarios) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat is on the mat and it is not ours", "en"),
        ("Der Hund ist nicht auf dem Sofa und die Katze auch", "de"),
        ("Le chat est dans la maison avec une souris", "fr"),
        ("这是一个中文句子", "zh"),
        ("これは日本語です", "ja"),
        ("이것은 한국어", "ko"),
        ("это русский текст", "ru"),
        ("xyzzy 12", "?"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text, words_of(text)) == language


def test_groups_rated_rows_and_sft_rows_are_audited() -> None:
    rng = random.Random(11)
    groups = [
        {"prompt": words(rng, 9), "completions": [{"text": words(rng, 20), "score": score} for score in (1, 2, 3)]} for _ in range(20)
    ]
    audit = run_audit(groups, AuditOptions(pairs="all"))
    assert (audit.num_usable, audit.num_pairs) == (20, 60)
    single = [{"prompt": words(rng, 9), "completion": words(rng, 20)} for _ in range(20)]
    audit = run_audit(single, AuditOptions(sft_rows=True))
    assert (audit.num_usable, audit.num_pairs) == (20, 0)


def test_a_row_that_is_dropped_still_counts_as_a_copy() -> None:
    rows = plain_rows(30)
    rows += [{**rows[2], "rejected": ""}, {**rows[2], "rejected": ""}]
    audit = run_audit(rows)
    assert places(audit, "duplicates") == [31]
    assert "1 of them cannot be trained on anyway" in finding(audit, "duplicates").note


def test_several_sources_and_max_rows(tmp_path: Path) -> None:
    first, second = plain_rows(20, seed=1), plain_rows(20, seed=2)
    second[3] = dict(first[5])
    for name, rows in (("a.jsonl", first), ("b.jsonl", second)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    audit = run_audit([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert finding(audit, "duplicates").places == [f"{tmp_path / 'b.jsonl'}:4"]
    assert run_audit([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], AuditOptions(max_rows=23)).num_rows == 23


def test_a_one_time_iterator_is_held() -> None:
    audit = run_audit(row for row in plain_rows(25))
    assert audit.num_rows == 25


def test_processes_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plain_rows(500)
    rows[410] = dict(rows[3])
    rows[300]["chosen"] = " "
    rows[301] |= {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"], "prompt": rows[2]["prompt"]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr("orpo.audit.inspect.CHUNK_ROWS", 50)
    alone, together = (run_audit(path, AuditOptions(num_workers=number)).to_dict() for number in (1, 2))
    for facts in (alone, together):
        del facts["seconds"]
    assert together == alone
    assert {item["code"] for item in alone["findings"]} == {"duplicates", "empty_answer", "contradictions", "repeated_prompts"}


def test_where_survives_the_way_through_the_table() -> None:
    rows = plain_rows(3)
    inspector = Inspector(detect_shape(rows), InspectOptions())
    chunk = inspector.inspect([(Where("f", i, i + 1), row) for i, row in enumerate(rows)], 1 << 64)
    assert [where.line for where in chunk.wheres] == [1, 2, 3]
    assert len(chunk.samples) == 3
    assert inspector.inspect([(Where("f", 0, 1), rows[0])], 0).samples == []
