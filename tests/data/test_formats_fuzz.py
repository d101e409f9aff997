"""Whatever a row is: a preference or a reason. Whatever a source is: a shape or a user error. Never anything else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo.data.formats import Stream, detect_shape, load_preferences, to_preference
from orpo.data.reading.sources import Source
from orpo.data.rows.messages import is_blank, plain_text
from orpo.data.rows.recognise import Shape
from orpo.data.types import REASONS, Dropped, Preference, Where
from orpo.errors import DataError

from .test_formats import ONE_PAIR_SHAPES, VERDICTS

WELL_FORMED: list[dict[str, Any]] = [row for row, _ in (*ONE_PAIR_SHAPES.values(), *VERDICTS.values())]
QA = {"question": "Q?", **{f"prediction {i}": f"p{i}" for i in range(1, 5)}, "preference": [1, 1, 1, 0, 2, 2]}
SHAPES: list[Shape] = [detect_shape([row]) for row, _ in ONE_PAIR_SHAPES.values()]
SHAPES += [detect_shape([row, *more]) for row, more in VERDICTS.values()] + [detect_shape([QA])]
SHAPES += [detect_shape([{"prompt": "Q?", "completion": "A.", "label": True}], sft_rows=True)]
SHAPES += [detect_shape([{"prompt": "Q", "response": "a", "score": 1}, {"prompt": "Q", "response": "b", "score": 2}])]

# Words of the shapes and plain text, odd ones included: blank, zero-width, lone surrogate, control and special-token text.
WORDS = st.sampled_from(
    [
        "",
        " ",
        "\u200b",
        "\n\nHuman: Q?\n\nAssistant: A",
        "\n\nAssistant:",
        "tie",
        "a",
        "1",
        "\ud800",
        "\x00",
        "<|im_end|>",
        "[]",
        "[{}]",
        "model_a",
        '[{"role": "user", "content": "Q?"}]',
        '{"from": "gpt", "value": 3}',
    ]
)
TEXTS = WORDS | st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
KEYS = st.sampled_from(
    sorted(
        {key for row in WELL_FORMED for key in row}
        | {"role", "from", "content", "value", "type", "text", "tool_calls", "tools", "messages"}
    )
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "narrator", "", None, 3])
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "from": ROLES, "content": SCALARS, "value": SCALARS, "tool_calls": SCALARS | st.just([{"a": 1}])}
)
JSON = st.recursive(
    SCALARS | MESSAGES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXTS, inner, max_size=5), max_leaves=20
)

POLICIES = st.sampled_from(["best_worst", "all", "adjacent", "margin:1"])


def mutated(row: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A well-formed row with some fields replaced by anything, or absent."""
    changes = st.dictionaries(st.sampled_from(sorted(row)), JSON, min_size=1, max_size=3)
    absent = st.sets(st.sampled_from(sorted(row)), max_size=1)
    return st.builds(lambda new, gone: {key: value for key, value in {**row, **new}.items() if key not in gone}, changes, absent)


ROWS = JSON | st.sampled_from(WELL_FORMED).flatmap(mutated)


def check(result: Preference | Dropped) -> None:
    if isinstance(result, Dropped):
        assert result.reason in REASONS
        return
    assert isinstance(result, Preference)
    texts = [result.prompt, *result.responses]
    for text in texts:
        plain_text(text).encode("utf-8")
        if not isinstance(text, str):
            assert all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in text)
    for text in texts:
        if isinstance(text, str):
            assert not is_blank(text)
    assert len({isinstance(text, str) for text in texts}) == 1
    assert all(i != j and max(i, j) < len(result.responses) for i, j in result.pairs)
    assert result.pairs or len(result.responses) == 1


@settings(max_examples=1000)
@given(row=ROWS, shape=st.sampled_from(SHAPES))
def test_any_row_under_any_shape(row: Any, shape: Shape) -> None:
    check(to_preference(row, shape, Where("fuzz", 0)))


@settings(max_examples=500)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=4),
    sft_rows=st.booleans(),
    pairs=POLICIES,
)
def test_any_rows_as_a_source(rows: list[Any], sft_rows: bool, pairs: str) -> None:
    try:
        stream = Stream(Source(rows), sft_rows=sft_rows, pairs=pairs)
    except DataError:
        return
    items = [to_preference(row, stream.shape, where) for where, row in stream]
    assert items
    for item in items:
        check(item)
    if any(isinstance(item, Preference) for item in items):
        preferences, dropped, _ = load_preferences(Source(rows), sft_rows=sft_rows, pairs=pairs)
        assert len(preferences) + len(dropped) == len(items)
    else:
        with pytest.raises(DataError, match="no row can be trained on"):
            load_preferences(Source(rows), sft_rows=sft_rows, pairs=pairs)


@pytest.mark.parametrize("value", [True, False, 0, 1, 2.5, [], ["x"], {}, {"a": 1}, None])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_wrong_types_are_never_made_into_text(field: str, value: Any) -> None:
    row = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
    result = to_preference({**row, field: value}, detect_shape([row]), Where("memory", 3))
    assert isinstance(result, Dropped)
    assert result.where.row == 3
    if value is None:
        assert result.reason == "missing_field"
    elif value in ([], {}):
        assert result.reason in {"empty_prompt", "empty_answer", "bad_messages"}
    else:
        assert result.reason in {"wrong_type", "bad_messages"}


def test_a_deeply_nested_row_is_dropped() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    row = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
    for field in row:
        result = to_preference({**row, field: deep}, detect_shape([row]), Where("memory", 0))
        assert isinstance(result, Dropped)
