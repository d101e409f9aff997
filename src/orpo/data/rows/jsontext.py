"""Columns whose values are JSON written as text: conversations, and lists of texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.rows.columns import LISTS, RANKED, RANKS, SCORES, normal_name
from orpo.data.rows.messages import BadRow, is_blank, looks_like_messages
from orpo.errors import DataError

_NUM_LOOKED_AT = 50
_PYTHON_TEXT = re.compile(r"\s*\[?\s*\{'(?:role|from|content|value)':")
_FEWEST_TURN_COLUMNS = 3
"""A prompt and two answers. Fewer columns that look like lists may be answers that are meant to be JSON."""


def json_columns(rows: Sequence[Mapping[Any, Any]], where: str) -> frozenset[str]:
    """The columns whose values are conversations, or lists of texts, written as JSON text.

    Raises:
        DataError: conversations written with Python's `str()`, which nothing can read back for certain.
    """
    found: dict[str, list[str]] = {}
    for row in rows[:_NUM_LOOKED_AT]:
        for column, value in row.items():
            if isinstance(column, str) and isinstance(value, str) and not is_blank(value):
                found.setdefault(column, []).append(value)
    for column, texts in found.items():
        if all(map(_PYTHON_TEXT.match, texts)):
            raise DataError(
                f"the messages in {column!r} were written as Python text: {texts[0].strip()[:40]} …",
                where=where,
                expected='JSON, such as [{"role": "user", "content": "…"}]',
                mend="write the column with json.dumps instead of str, or save the data as jsonl or parquet",
            )
    messages = {column for column, texts in found.items() if all(looks_like_messages(_json(text)) for text in texts)}
    lists = {column for column, texts in found.items() if all(_is_list(_json(text), column) for text in texts)}
    several = {column for column in lists if _holds_responses(column)}
    if not any(normal_name(column) in (*LISTS, *RANKED) for column in several):
        several = set()
    turns = _columns_of_turns(rows[:_NUM_LOOKED_AT], sorted(lists - several))
    return frozenset(messages | several | turns)


def _holds_responses(column: str) -> bool:
    """Whether a column by this name holds the responses of one prompt, or a mark for each."""
    return normal_name(column) in (*LISTS, *RANKED, *SCORES, *RANKS)


def _is_list(value: Any, column: str) -> bool:
    """A list of texts; of numbers, where the column is one of scores. A turn may be null: nothing was answered."""
    if not isinstance(value, list) or not value:
        return False
    kinds: tuple[type, ...] = (int, float) if normal_name(column) in (*SCORES, *RANKS) else (str,)
    return all(item is None or isinstance(item, kinds) for item in value)


def _columns_of_turns(rows: Sequence[Mapping[Any, Any]], columns: Sequence[str]) -> set[str]:
    """The columns that hold the turns of conversations: a prompt and at least two answers, as many turns in each."""
    if len(columns) < _FEWEST_TURN_COLUMNS:
        return set()
    for row in rows:
        lists = [_json(row[column]) for column in columns if isinstance(row.get(column), str)]
        if len({len(value) for value in lists if isinstance(value, list)}) > 1:
            return set()
    return set(columns)


def _json(text: str) -> Any:
    """A list or an object from JSON text; None for anything else."""
    if text.lstrip()[:1] not in {"[", "{"}:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def decode(row: Mapping[Any, Any], columns: frozenset[str]) -> Mapping[Any, Any]:
    """The row with the JSON text of these columns as values. A list of one turn is that turn.

    Raises:
        BadRow: a text in one of them is no such JSON; or several turns, whose answers are each to another conversation.
    """
    texts = {column: row[column] for column in columns if isinstance(row.get(column), str) and not is_blank(row[column])}
    decoded = {column: _json(text) for column, text in texts.items()}
    for column, value in decoded.items():
        if looks_like_messages(value):
            continue
        if not _is_list(value, column):
            raise BadRow("bad_messages", f"{column} holds text where the other rows have messages as JSON")
        if not _holds_responses(column):
            if len(value) > 1:
                raise BadRow("prompts_differ", f"{len(value)} turns, and the answers before the last one differ")
            decoded[column] = value[0]
    return {**row, **decoded} if decoded else row
