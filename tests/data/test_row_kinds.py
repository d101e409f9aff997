"""Rows that other tools write: what each holds is trained, or the row or the whole source is refused with advice that works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from orpo.data.formats import load_preferences
from orpo.data.types import Dropped, Preference
from orpo.errors import DataError


def turn(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def call(**arguments: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    return turn("assistant", "", tool_calls=calls)


def followed(rows: list[dict[str, Any]], **options: Any) -> tuple[DataError, list[Preference]]:
    """The refusal of some rows, and the preferences that its first `column_map` makes of them."""
    with pytest.raises(DataError) as caught:
        load_preferences(rows, **options)
    advised = re.search(r"column_map: (\{[^}]*\})", caught.value.mend or "")
    assert advised is not None, caught.value.mend
    preferences, dropped, _ = load_preferences(rows, **{**options, "column_map": yaml.safe_load(advised[1])})
    assert not dropped
    return caught.value, preferences


CALLS = [{"city": "Oslo"}, {"a": 0, "b": 1}, {"where": {"x": 1.5}}, {"where": {"y": [{"k": 1}, {"l": 2}]}}]
MIXED = [
    {"prompt": [turn("user", f"Case {n}")], "chosen": [call(**arguments)], "rejected": [turn("assistant", "No.")]}
    for n, arguments in enumerate(CALLS)
]


@pytest.mark.parametrize("place", ["parquet", "arrow", "folder", "dataset", "stream", "table"])
@pytest.mark.parametrize("is_typed", [True, False], ids=["merged schema", "JSON type"])
def test_keys_of_other_rows_are_not_in_a_row(place: str, is_typed: bool, tmp_path: Path) -> None:
    """Arrow has one set of keys for all rows; `datasets`' Json type keeps each row's own, as text."""
    table = pa.Table.from_pylist(MIXED)
    data = datasets.Dataset(table)
    if not is_typed:
        if not hasattr(datasets, "Json"):
            pytest.skip("this version of datasets has no such type")
        features = data.features.copy()
        message = {"role": datasets.Value("string"), "content": datasets.Value("string"), "tool_calls": datasets.Json()}
        features["chosen"] = datasets.List(message)
        data = datasets.Dataset.from_list(MIXED, features=features)
        table = data.data.table
    sources: dict[str, Any] = {"dataset": data, "table": table, "stream": data.to_iterable_dataset()}
    if place == "parquet":
        pq.write_table(table, tmp_path / "rows.parquet")
    elif place == "arrow":
        with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as file:
            file.write_table(table)
    elif place == "folder":
        data.save_to_disk(str(tmp_path / "rows.folder"))
    source = sources.get(place, str(tmp_path / f"rows.{place}"))
    preferences, dropped, _ = load_preferences(source)
    assert not dropped
    assert [item.responses[0][0]["tool_calls"][0]["function"]["arguments"] for item in preferences] == CALLS


@pytest.mark.parametrize("column", ["image", "images", "Images", "audio", "videos"])
@pytest.mark.parametrize("value", ["p.png", ["p.png"], {"bytes": "…", "path": None}])
def test_what_is_no_text_is_dropped_with_its_reason(column: str, value: Any) -> None:
    row = {"prompt": "<image>What is this?", "chosen": "A boat.", "rejected": "Nothing."}
    rows = [{**row, column: value}, {**row, column: None}, {**row, column: []}, row]
    preferences, dropped, _ = load_preferences(rows)
    assert len(preferences) == 3
    assert [(item.reason, item.where.row) for item in dropped] == [("not_text", 0)]
    assert column in dropped[0].detail


@pytest.mark.parametrize(
    ("good", "bad"),
    [("text", "rejected_text"), ("good_answer", "bad_answer"), ("winning_response", "losing_response"), ("answer", "answer_rejected")],
)
@pytest.mark.parametrize("sft_rows", [False, True])
def test_a_second_answer_under_a_name_of_its_own(good: str, bad: str, sft_rows: bool) -> None:
    rows = [{"prompt": f"Name a fruit, {n}.", good: "An apple.", bad: "A chair."} for n in range(4)]
    error, preferences = followed(rows, sft_rows=sft_rows)
    assert repr(bad) in error.what
    assert {item.responses for item in preferences} == {("An apple.", "A chair.")}
    assert {item.pairs for item in preferences} == {((0, 1),)}


@pytest.mark.parametrize("rejected", ["A chair.", [turn("assistant", "A chair.")]])
@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_conversation_and_the_answer_to_reject(rejected: Any, column: str, is_mapped: bool) -> None:
    talk = [
        turn("system", "Be brief."),
        turn("user", "Hi."),
        turn("assistant", "Hi."),
        turn("user", "A fruit?"),
        turn("assistant", "An apple."),
    ]
    rows = [{column: talk, "rejected_response": rejected}] * 3
    column_map = {"chosen": column, "rejected": "rejected_response"} if is_mapped else None
    preferences, dropped, shape = load_preferences(rows, column_map=column_map)
    assert not dropped, shape
    assert preferences[0].prompt == tuple(talk[:-1])
    assert [answer[-1]["content"] for answer in preferences[0].responses] == ["An apple.", "A chair."]


def test_lists_of_turns_as_json_text(tmp_path: Path) -> None:
    """Kaggle's LMSYS file: one turn is that turn, several are conversations that part at the first answer."""
    lines = ["prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie"]
    for turns, flags in [(["Q?"], "1,0,0"), (["Q 2?", "And?"], "1,0,0"), (["Q 3?"], "0,1,0"), ([None], "0,1,0")]:
        cells = [json.dumps(turns), json.dumps([f"a{t}" for t in turns]), json.dumps([f"b{t}" for t in turns])]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "," + flags)
    path = tmp_path / "lmsys.csv"
    path.write_text("\n".join(lines) + "\n")
    preferences, dropped, _ = load_preferences(str(path))
    assert [(item.prompt, item.responses) for item in preferences] == [("Q?", ("aQ?", "bQ?")), ("Q 3?", ("bQ 3?", "aQ 3?"))]
    assert [(item.reason, item.where.row) for item in dropped] == [("prompts_differ", 1), ("missing_field", 3)]


def test_a_list_of_responses_as_json_text() -> None:
    rows = [{"prompt": f"Q{n}?", "responses": json.dumps(["a", "b"]), "scores": json.dumps([1, 2])} for n in range(3)]
    preferences, _, _ = load_preferences(rows)
    assert preferences[0].responses[preferences[0].pairs[0][0]] == "b"


def test_answers_that_are_meant_to_be_json_stay_text() -> None:
    rows = [{"prompt": f"List {n} names as JSON.", "chosen": '["Ann", "Bo"]', "rejected": '["Ann"]'} for n in range(4)]
    preferences, dropped, _ = load_preferences(rows)
    assert not dropped
    assert preferences[0].responses == ('["Ann", "Bo"]', '["Ann"]')


@pytest.mark.parametrize(
    "row",
    [
        {"question": {"id": "7", "full_text": "Why is that?"}, "answer_0": "So.", "answer_1": "No.", "score_0": 1, "score_1": -1},
        {"prompt": {"id": 3, "text": "Why is that?"}, "chosen": "So.", "rejected": "No."},
        {"prompt": "Why is that?", "chosen": {"body": "So.", "n": 1}, "rejected": "No."},
        {"prompt": "Why is that?", "chosen": "So.", "rejected": {"body": "No.", "n": 1}},
    ],
)
def test_an_object_where_text_is_needed(row: dict[str, Any]) -> None:
    error, preferences = followed([row] * 3)
    assert "holds objects" in error.what
    assert preferences[0].prompt == "Why is that?"
    assert preferences[0].responses == ("So.", "No.")


@pytest.mark.parametrize("labels", [(True, False), (1, 0)])
@pytest.mark.parametrize("is_in_order", [True, False])
def test_rated_answers_to_the_same_prompt_can_be_paired(labels: tuple[Any, Any], is_in_order: bool) -> None:
    good, bad = labels
    rows = [
        {"prompt": f"Q{n}?", "completion": f"{word} {n}", "label": label}
        for n in range(4)
        for word, label in (("good", good), ("bad", bad))
    ]
    if not is_in_order:
        rows.sort(key=lambda row: row["completion"])
    error, preferences = followed(rows)
    assert "4 of 4 prompts" in error.what
    assert [item.prompt for item in preferences] == [f"Q{n}?" for n in range(4)]
    assert all(item.responses[item.pairs[0][0]].startswith("good") for item in preferences)


def test_no_pairing_is_offered_where_there_is_nothing_to_pair() -> None:
    rows = [{"prompt": f"Q{n}?", "completion": f"answer {n}", "label": bool(n % 2)} for n in range(6)]
    with pytest.raises(DataError) as caught:
        load_preferences(rows)
    assert "column_map" not in str(caught.value.mend)
    preferences, dropped, _ = load_preferences(rows, sft_rows=True)
    assert len(preferences) == len(dropped) == 3
    assert all(isinstance(item, Dropped) and item.reason == "unpaired" for item in dropped)
