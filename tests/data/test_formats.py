"""Every row shape, one by one: what is recognised, what becomes prompt, chosen and rejected, what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from orpo.data.formats import detect_shape, load_preferences, to_preference
from orpo.data.rows.messages import plain_text
from orpo.data.types import Dropped, Preference, Where
from orpo.errors import DataError

HERE = Where("memory", 0)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def read(row: Any, *more: Any, **options: Any) -> Preference | Dropped:
    """The row as its own shape (found from it and the rows beside it) reads it."""
    shape = detect_shape([row, *more], **options)
    return to_preference(row, shape, HERE)


def kept(row: Any, *more: Any, **options: Any) -> Preference:
    preference = read(row, *more, **options)
    assert isinstance(preference, Preference), preference
    return preference


PLAIN_PAIR = ("Q?", ("good", "bad"))
CHAT_PAIR = ((user("Q?"),), ((assistant("good"),), (assistant("bad"),)))
CHAT_PAIR_WITH_SYSTEM = ((system("Be brief."), user("Q?")), ((assistant("good"),), (assistant("bad"),)))
PARTS = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]

ONE_PAIR_SHAPES = {
    "strings": ({"prompt": "Q?", "chosen": "good", "rejected": "bad"}, PLAIN_PAIR),
    "question and system": ({"system": "Be brief.", "question": "Q?", "chosen": "good", "rejected": "bad"}, CHAT_PAIR_WITH_SYSTEM),
    "question and blank system": ({"system": " ", "question": "Q?", "chosen": "good", "rejected": "bad"}, PLAIN_PAIR),
    "instruction and input": ({"instruction": "Q", "input": "?", "chosen": "good", "rejected": "bad"}, ("Q\n\n?", ("good", "bad"))),
    "instruction, no input": ({"instruction": "Q?", "input": "", "chosen": "good", "rejected": "bad"}, PLAIN_PAIR),
    "instruction, null input": ({"instruction": "Q?", "input": None, "chosen": "good", "rejected": "bad"}, PLAIN_PAIR),
    "messages": ({"prompt": [user("Q?")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, CHAT_PAIR),
    "string prompt, message answers": ({"prompt": "Q?", "chosen": [assistant("good")], "rejected": [assistant("bad")]}, CHAT_PAIR),
    "message prompt, string answers": ({"prompt": [user("Q?")], "chosen": "good", "rejected": "bad"}, CHAT_PAIR),
    "implicit prompts": ({"chosen": [user("Q?"), assistant("good")], "rejected": [user("Q?"), assistant("bad")]}, CHAT_PAIR),
    "UltraFeedback, binarized": (
        {
            "prompt": "Q?",
            "prompt_id": "x",
            "chosen": [user("Q?"), assistant("good")],
            "rejected": [user("Q?"), assistant("bad")],
            "messages": [user("Q?"), assistant("good")],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        CHAT_PAIR,
    ),
    "message prompt repeated in the answers": (
        {"prompt": [user("Q?")], "chosen": [user("Q?"), assistant("good")], "rejected": [user("Q?"), assistant("bad")]},
        CHAT_PAIR,
    ),
    "HH transcripts": ({"chosen": "\n\nHuman: Q?\n\nAssistant: good", "rejected": "\n\nHuman: Q?\n\nAssistant: bad"}, CHAT_PAIR),
    "HH transcripts beside their prompt": (
        {
            "prompt": "\n\nHuman: Q?\n\nAssistant:",
            "chosen": "\n\nHuman: Q?\n\nAssistant: good",
            "rejected": "\n\nHuman: Q?\n\nAssistant: bad",
        },
        CHAT_PAIR,
    ),
    "HH prompt, plain answers": ({"prompt": "\n\nHuman: Q?\n\nAssistant:", "chosen": "good", "rejected": "bad"}, CHAT_PAIR),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Q?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        CHAT_PAIR,
    ),
    "ShareGPT, system column": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Q?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        CHAT_PAIR_WITH_SYSTEM,
    ),
    "OpenAI": (
        {
            "input": {"messages": [user("Q?")]},
            "preferred_output": [assistant("good")],
            "non_preferred_output": [assistant("bad")],
        },
        CHAT_PAIR,
    ),
    "typed parts": (
        {
            "chosen": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": [{"type": "text", "value": "good"}]}],
            "rejected": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": [{"type": "text", "value": "bad"}]}],
        },
        CHAT_PAIR,
    ),
    "Alpaca history": (
        {"instruction": "Q?", "history": [["A?", "B."]], "chosen": "good", "rejected": "bad"},
        ((user("A?"), assistant("B."), user("Q?")), CHAT_PAIR[1]),
    ),
    "datasets' dict of lists": (
        {
            "prompt": {"role": ["user"], "content": ["Q?"]},
            "chosen": {"role": ["assistant"], "content": ["good"]},
            "rejected": {"role": ["assistant"], "content": ["bad"]},
        },
        CHAT_PAIR,
    ),
    "messages as JSON text": (
        {
            key: json.dumps(value)
            for key, value in (("prompt", [user("Q?")]), ("chosen", [assistant("good")]), ("rejected", assistant("bad")))
        },
        CHAT_PAIR,
    ),
    "other names": ({"Prompt": "Q?", "Chosen Response": "good", "rejected-response": "bad"}, PLAIN_PAIR),
}


@pytest.mark.parametrize(("row", "expected"), ONE_PAIR_SHAPES.values(), ids=ONE_PAIR_SHAPES)
def test_one_pair(row: dict[str, Any], expected: tuple[Any, Any]) -> None:
    preference = kept(row)
    assert (preference.prompt, preference.responses) == expected
    assert preference.pairs == ((0, 1),)


VERDICTS = {
    "winner by column name": ({"prompt": "Q?", "response_a": "bad", "response_b": "good", "winner": "response_b"}, []),
    "winner by letter": ({"prompt": "Q?", "response_a": "bad", "response_b": "good", "winner": "B"}, []),
    "arena": (
        {
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "conversation_a": [user("Q?"), assistant("bad")],
            "conversation_b": [user("Q?"), assistant("good")],
        },
        [],
    ),
    "winner by model": ({"prompt": "Q?", "model_a": "x", "model_b": "y", "response_a": "bad", "response_b": "good", "winner": "y"}, []),
    "label counts from 1": ({"prompt": "Q?", "response1": "good", "response2": "bad", "label": 1}, []),
    "label as text": ({"prompt": "Q?", "response1": "bad", "response2": "good", "label": "2"}, []),
    "label counts from 0": ({"prompt": "Q?", "response_0": "bad", "response_1": "good", "better_response_id": 1}, []),
    "votes": ({"instruction": "Q?", "response1": "bad", "response2": "good", "annotator1": 2, "annotator2": 2, "annotator3": 0}, []),
    "signed strength": ({"prompt": "Q?", "response_1": "good", "response_2": "bad", "preference_strength": -2}, []),
    "overall preference": ({"context": [user("Q?")], "response1": "bad", "response2": "good", "overall_preference": 3}, []),
    "one flag per model": (
        {"prompt": "Q?", "response_a": "bad", "response_b": "good", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        [],
    ),
    "two scores": ({"prompt": "Q?", "answer_0": "bad", "answer_1": "good", "score_0": -0.5, "score_1": 0.5}, []),
    "scored list": (
        {"instruction": "Q?", "completions": [{"response": "bad", "overall_score": 2.0}, {"response": "good", "overall_score": 7.5}]},
        [],
    ),
    "score as text": ({"prompt": "Q?", "completions": [{"text": "bad", "rating": "2"}, {"text": "good", "rating": "4"}]}, []),
    "parallel scores": ({"prompt": "Q?", "responses": ["bad", "good"], "scores": [0.1, 0.9]}, []),
    "ranks": ({"prompt": "\n\nHuman: Q?\n\nAssistant: ", "answers": [{"answer": "bad", "rank": 2}, {"answer": "good", "rank": 1}]}, []),
    "parallel ranks": ({"prompt": "Q?", "responses": ["bad", "good"], "ranks": [2, 1]}, []),
    "best first": ({"prompt": "Q?", "ranked_responses": ["good", "bad"]}, []),
    "number of the best, from 0": (
        {"prompt": "Q?", "responses": ["bad", "good"], "best": 1},
        [{"prompt": "R?", "responses": ["x", "y"], "best": 0}],
    ),
    "number of the best, from 1": ({"prompt": "Q?", "responses": ["bad", "good"], "winner": 2}, []),
    "text of the best": ({"prompt": "Q?", "responses": ["bad", "good"], "best_response": "good"}, []),
    "choice among objects": (
        {"post": "Q?", "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1},
        [{"post": "R?", "summaries": [{"text": "x"}, {"text": "y"}], "choice": 0}],
    ),
    "list of votes": ({"prompt": "Q?", "response_a": "bad", "response_b": "good", "votes": ["b", "a", "b"]}, []),
    "list of votes in numbers": ({"prompt": "Q?", "response_1": "bad", "response_2": "good", "votes": [2, 0, 2]}, []),
    "counted votes": ({"prompt": "Q?", "response_a": "bad", "response_b": "good", "votes_a": 1, "votes_b": 2}, []),
    "Stack Exchange": ({"question": "Q?", "answers": [{"text": "bad", "pm_score": 1}, {"text": "good", "pm_score": 4}]}, []),
    "a label with two readings beside scores": (
        {"history": "Q?", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 3, "score_B": 9},
        [],
    ),
    "whole conversations with scores": (
        {"prompt": "Q?", "responses": [[user("Q?"), assistant("bad")], [user("Q?"), assistant("good")]], "scores": [1, 2]},
        [],
    ),
}


@pytest.mark.parametrize(("row", "more"), VERDICTS.values(), ids=VERDICTS)
def test_the_better_response_is_chosen(row: dict[str, Any], more: list[Any]) -> None:
    preference = kept(row, *more)
    assert plain_text(preference.prompt) == "Q?"
    (chosen, rejected) = preference.pairs[0]
    assert plain_text(preference.responses[chosen]) == "good"
    assert plain_text(preference.responses[rejected]) == "bad"


TIES = {
    "tie": {"prompt": "Q?", "response_a": "x", "response_b": "y", "winner": "tie"},
    "tie (bothbad)": {"prompt": "Q?", "response_a": "x", "response_b": "y", "winner": "tie (bothbad)"},
    "no majority": {"prompt": "Q?", "response1": "x", "response2": "y", "annotator1": 1, "annotator2": 2, "annotator3": 0},
    "half is no majority": {"prompt": "Q?", "response1": "x", "response2": "y", "annotator1": 2, "annotator2": 0},
    "list of votes without a majority": {"prompt": "Q?", "response_a": "x", "response_b": "y", "votes": ["a", "b"]},
    "no vote": {"prompt": "Q?", "response_a": "x", "response_b": "y", "votes": ["tie", None]},
    "strength 0": {"prompt": "Q?", "response_1": "x", "response_2": "y", "preference_strength": 0},
    "equal scores": {"prompt": "Q?", "completions": [{"text": "x", "score": 3}, {"text": "y", "score": 3}]},
    "one judged": {"prompt": "Q?", "completions": [{"text": "x", "score": 3}, {"text": "y", "score": "N/A"}]},
    "NaN": {"prompt": "Q?", "completions": [{"text": "x", "score": 3}, {"text": "y", "score": float("nan")}]},
}


@pytest.mark.parametrize("row", TIES.values(), ids=TIES)
def test_ties_are_dropped_with_their_reason(row: dict[str, Any]) -> None:
    result = read(row)
    assert isinstance(result, Dropped)
    assert result.reason == "no_preference"


def test_a_null_label_is_a_row_without_preference() -> None:
    row = {"prompt": "Q?", "response_a": "x", "response_b": "y", "winner": None}
    result = read(row, {**row, "winner": "a"})
    assert isinstance(result, Dropped)
    assert result.reason == "no_preference"


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [("response_a", "response_b", [0, 1]), ("response1", "response2", [0, 1]), ("response1", "response2", [True, False])],
)
def test_a_label_with_two_readings_is_refused(first: str, second: str, values: list[Any]) -> None:
    rows = [{"prompt": "Q?", first: "x", second: "y", "label": value} for value in values]
    with pytest.raises(DataError, match="do not say which of the responses"):
        detect_shape(rows)


@pytest.mark.parametrize("values", [[1, 1], [0, 2], [5, 5]])
def test_the_number_of_the_best_is_refused_where_it_may_count_from_0_or_1(values: list[int]) -> None:
    rows = [{"prompt": "Q?", "responses": ["x", "y"], "best": value} for value in values]
    with pytest.raises(DataError, match="may be counted from 0 or from 1" if values == [1, 1] else "names no response"):
        detect_shape(rows)


def test_a_winner_that_names_no_response_drops_its_row() -> None:
    rows = [{"prompt": "Q?", "responses": ["x", "y", "y"], "best": value} for value in (0, 1, "x", "y", "z", None, True, 2.0)]
    preferences, dropped, _ = load_preferences(rows, pairs="all")
    assert [[(p.responses[i], p.responses[j]) for i, j in p.pairs] for p in preferences] == [
        [("x", "y")] * 2,
        [("y", "x")],
        [("x", "y")] * 2,
        [("y", "x")],
    ]
    assert {(d.reason, d.where.row) for d in dropped} == {("no_preference", row) for row in (3, 4, 5, 6)}


FOUR = [{"text": text, "score": score} for text, score in (("a", 1), ("b", 4), ("c", 4), ("d", 2))]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("best_worst", [("b", "a")]),
        ("all", [("b", "a"), ("b", "d"), ("c", "a"), ("c", "d"), ("d", "a")]),
        ("adjacent", [("b", "d"), ("c", "d"), ("d", "a")]),
        ("margin:3", [("b", "a"), ("c", "a")]),
        ("margin:2", [("b", "a"), ("b", "d"), ("c", "a"), ("c", "d")]),
    ],
)
def test_pair_policies(policy: str, expected: list[tuple[str, str]]) -> None:
    preference = kept({"prompt": "Q?", "completions": FOUR}, pairs=policy)
    pairs = [(preference.responses[i], preference.responses[j]) for i, j in preference.pairs]
    assert sorted(pairs) == expected
    assert {index for pair in preference.pairs for index in pair} == set(range(len(preference.responses)))  # none is computed for nothing


@pytest.mark.parametrize("policy", ["best", "margin", "margin:-1", "margin:nan", "margin:inf", "margin:0", ""])
def test_an_unknown_pair_policy_is_refused(policy: str) -> None:
    with pytest.raises(DataError, match="no pair policy"):
        detect_shape([{"prompt": "Q?", "completions": FOUR}], pairs=policy)


def test_pairwise_votes() -> None:
    row = {"question": "Q?", **{f"prediction {i}": f"p{i}" for i in range(1, 5)}, "preference": [1, 1, 1, 0, 2, 2]}
    # 1 beats all; 2 = 3; 4 beats 2 and 3: scores 3, -2, -2, 1
    best = kept(row)
    assert [best.responses[i] for i in best.pairs[0]] == ["p1", "p2"]
    every = kept(row, pairs="all")
    assert sorted((every.responses[i], every.responses[j]) for i, j in every.pairs) == [
        ("p1", "p2"),
        ("p1", "p3"),
        ("p1", "p4"),
        ("p4", "p2"),
        ("p4", "p3"),
    ]


def test_a_vote_against_the_scores_makes_no_pair() -> None:
    # 1 wins most, but directly loses to 2, which has the fewest: the widest pair that no vote contradicts is taken.
    row = {"question": "Q?", **{f"prediction {i}": f"p{i}" for i in range(1, 5)}, "preference": [2, 1, 1, 2, 2, 0]}
    preference = kept(row)
    assert [preference.responses[i] for i in preference.pairs[0]] == ["p1", "p3"]


def test_rated_rows_of_one_prompt_are_one_group() -> None:
    rows = [
        {"prompt": "Q?", "response": "ok", "helpfulness": 2, "verbosity": 1},
        {"prompt": "Q?", "response": "good", "helpfulness": 4, "verbosity": 1},
        {"prompt": "Q?", "response": "bad", "helpfulness": 0, "verbosity": 1},
        {"prompt": "alone", "response": "x", "helpfulness": 3, "verbosity": 1},
        {"prompt": "R?", "response": "tie", "helpfulness": 3, "verbosity": 1},
        {"prompt": "R?", "response": "tied", "helpfulness": 3, "verbosity": 1},
    ]
    preferences, dropped, shape = load_preferences(rows)
    assert shape.name == "one rated response per row"
    assert [(p.prompt, p.responses, p.pairs, p.where.row) for p in preferences] == [("Q?", ("good", "bad"), ((0, 1),), 0)]
    assert [(d.reason, d.where.row) for d in dropped] == [("unpaired", 3), ("no_preference", 4)]


def test_multi_turn_system_and_tools() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
    row = {
        "input": {"messages": [system("S"), user("A?"), assistant("B."), user("Q?")], "tools": tools},
        "preferred_output": [call],
        "non_preferred_output": [assistant("noon")],
    }
    preference = kept(row)
    assert preference.prompt == (system("S"), user("A?"), assistant("B."), user("Q?"))
    assert preference.tools == tuple(tools)
    assert preference.responses[0] == ({**call, "content": ""},)


def test_tool_runs_after_a_common_beginning_are_answers() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
    tool = {"role": "tool", "content": "12:00"}
    row = {"chosen": [user("Q?"), call, tool, assistant("noon")], "rejected": [user("Q?"), assistant("no idea")]}
    preference = kept(row)
    assert preference.prompt == (user("Q?"),)
    assert preference.responses == ((call, tool, assistant("noon")), (assistant("no idea"),))


def test_a_function_call_of_sharegpt_becomes_a_tool_call() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Q?"},
            {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
        ],
        "tools": '[{"name": "clock"}]',
        "chosen": {"from": "gpt", "value": "noon"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    preference = kept(row)
    assert preference.tools == ({"name": "clock"},)
    assert preference.prompt[1]["tool_calls"][0]["function"] == {"name": "clock", "arguments": {"zone": "UTC"}}
    assert preference.prompt[2] == {"role": "tool", "content": "12:00"}


def test_text_is_never_changed() -> None:
    preference = kept({"prompt": " Q?\n", "chosen": " good\u2028", "rejected": "\tbad "})
    assert (preference.prompt, preference.responses) == (" Q?\n", (" good\u2028", "\tbad "))


def test_other_columns_travel_along_if_small() -> None:
    row = {"prompt": "Q?", "chosen": "good", "rejected": "bad", "scenario": "refund", "id": 7, "notes": "x" * 1000, "meta": {"a": 1}}
    assert kept(row).columns == {"scenario": "refund", "id": 7}


def test_column_map_renames_and_reaches_into_objects() -> None:
    row = {"q": {"text": "Q?"}, "good": "good", "poor": "bad", "prompt": "not this one"}
    preference = kept(row, column_map={"prompt": "q.text", "chosen": "good", "rejected": "poor"})
    assert (preference.prompt, preference.responses) == PLAIN_PAIR


@pytest.mark.parametrize(
    ("column_map", "message"),
    [
        ({"prompt": "questoin"}, "did you mean 'question'"),
        ({"promt": "question"}, "did you mean 'prompt'"),
        ({"prompt": "a.b"}, "no row has"),
    ],
)
def test_a_wrong_column_map_is_refused(column_map: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect_shape([{"question": "Q?", "chosen": "good", "rejected": "bad"}], column_map)


def test_a_column_map_takes_answers_out_of_a_list() -> None:
    row = {"instruction": "Q?", "output": ["good", "bad"]}
    with pytest.raises(DataError, match=r"column_map: \{chosen: output\.0, rejected: output\.1\}"):
        detect_shape([row])
    preference = kept(row, {"instruction": "R?", "output": ["one"]}, column_map={"chosen": "output.0", "rejected": "output.1"})
    assert (preference.prompt, preference.responses) == PLAIN_PAIR


def test_plain_text_is_refused_with_and_without_sft_rows() -> None:
    for sft_rows in (False, True):
        with pytest.raises(DataError, match="nothing that says where a prompt ends"):
            detect_shape([{"text": "Hello there."}], sft_rows=sft_rows)


def test_messages_as_json_text_are_messages() -> None:
    chat = json.dumps([user("Q?")])
    shape = detect_shape([{"prompt": chat, "chosen": "good", "rejected": "bad"}])
    assert "JSON text in 'prompt'" in str(shape)
    result = to_preference({"prompt": "[not a conversation]", "chosen": "good", "rejected": "bad"}, shape, HERE)
    assert isinstance(result, Dropped)
    assert result.reason == "bad_messages"
    # One text among others that quotes a conversation is text.
    preference = kept({"prompt": chat, "chosen": "good", "rejected": "bad"}, {"prompt": "R?", "chosen": "good", "rejected": "bad"})
    assert preference.prompt == chat


def test_messages_as_python_text_are_refused() -> None:
    row = {"prompt": str([user("Q?")]), "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match=r"json\.dumps instead of str"):
        detect_shape([row, row])


def test_sft_only_rows_are_mixed_in_on_request() -> None:
    pairs = [{"prompt": "Q?", "chosen": "good", "rejected": "bad"}, {"prompt": "R?", "chosen": "only", "rejected": None}]
    _, dropped, _ = load_preferences(pairs)
    assert [(d.reason, d.where.row) for d in dropped] == [("missing_field", 1)]
    preferences, dropped, _ = load_preferences(pairs, sft_rows=True)
    assert not dropped
    assert [(p.responses, p.pairs) for p in preferences] == [(("good", "bad"), ((0, 1),)), (("only",), ())]


@pytest.mark.parametrize(
    "row",
    [{"instruction": "Q", "input": "?", "output": "A."}, {"prompt": "Q\n\n?", "completion": "A."}, {"question": "Q\n\n?", "answer": "A."}],
)
def test_instruction_only_rows(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="instruction-only rows") as caught:
        detect_shape([row])
    assert "sft_rows: true" in str(caught.value)
    preference = kept(row, sft_rows=True)
    assert (preference.prompt, preference.responses, preference.pairs) == ("Q\n\n?", ("A.",), ())


def test_instruction_only_conversations() -> None:
    row = {"messages": [user("Q?"), assistant("A.")]}
    with pytest.raises(DataError, match="instruction-only rows"):
        detect_shape([row])
    preference = kept(row, sft_rows=True)
    assert (preference.prompt, preference.responses, preference.pairs) == ((user("Q?"),), ((assistant("A."),),), ())


def test_of_kto_rows_only_the_good_ones_become_sft_rows() -> None:
    rows = [{"prompt": "Q?", "completion": "good", "label": True}, {"prompt": "R?", "completion": "bad", "label": False}]
    preferences, dropped, _ = load_preferences(rows, sft_rows=True)
    assert [p.responses for p in preferences] == [("good",)]
    assert [d.reason for d in dropped] == ["unpaired"]


LABELLED = [{"prompt": f"Q{n}?", "completion": f"{word} {n}", "label": word == "good"} for n in range(5) for word in ("good", "bad")]
LONELY = {"prompt": "Q9?", "completion": "good 9", "label": True}


@pytest.mark.parametrize(
    "rows",
    [
        LABELLED,
        sorted(LABELLED, key=lambda row: row["label"]),
        sorted(LABELLED, key=lambda row: row["completion"][-1:] + str(row["label"]), reverse=True),
        random.Random(3).sample(LABELLED, len(LABELLED)),
        LABELLED[::2] + LABELLED[1::2],
    ],
)
def test_labelled_rows_are_paired_wherever_they_stand(rows: list[dict[str, Any]]) -> None:
    preferences, dropped, shape = load_preferences([*rows, LONELY], column_map={"score": "label"})
    found = [(p.prompt, *(p.responses[i] for i in p.pairs[0])) for p in preferences]
    assert sorted(found) == [(f"Q{n}?", f"good {n}", f"bad {n}") for n in range(5)]
    assert [d.reason for d in dropped] == ["unpaired"]
    assert [p.where.row for p in preferences] == sorted(p.where.row for p in preferences), "in the order of each prompt's first row"
    assert "rows of one prompt together" in str(shape)


def test_labelled_rows_of_which_the_first_thousand_show_no_pair() -> None:
    rows = [{"prompt": f"Q{n}?", "completion": word, "label": word == "good"} for word in ("good", "bad") for n in range(1200)]
    with pytest.raises(DataError, match=r"0 of 1000 prompts of the first 1000 rows .*\n.*\n.*column_map: \{score: label\}"):
        load_preferences(rows)
    preferences, dropped, _ = load_preferences(rows, column_map={"score": "label"})
    assert (len(preferences), len(dropped)) == (1200, 0)


def test_rated_rows_that_follow_each_other_are_not_all_held() -> None:
    rows = [{"prompt": f"Q{n}?", "response": f"{score} {n}", "score": score} for n in range(4) for score in (1, 5)]
    assert "neighbouring rows of one prompt together" in str(detect_shape(rows))
    assert "all rows of one prompt together" in str(detect_shape(rows[::2] + rows[1::2]))


def test_the_shape_is_named_in_one_line() -> None:
    shape = detect_shape([{"instruction": "Q", "input": "?", "output": "A.", "chosen": "good", "rejected": "bad"}])
    line = str(shape)
    assert "\n" not in line
    for column in ("instruction", "input", "chosen", "rejected", "output"):
        assert repr(column) in line
    assert "not trained on: 'output'" in line


def test_a_scored_group_leaves_out_pairs_of_equal_answers() -> None:
    row = {"prompt": "Q?", "completions": [{"text": "x", "score": 3}, {"text": "x ", "score": 2}, {"text": "y", "score": 1}]}
    preference = kept(row, pairs="all")
    assert {(preference.responses[i], preference.responses[j]) for i, j in preference.pairs} == {("x", "y"), ("x ", "y")}
    result = read({"prompt": "Q?", "completions": row["completions"][:2]})
    assert isinstance(result, Dropped)
    assert result.reason == "identical_answers"
