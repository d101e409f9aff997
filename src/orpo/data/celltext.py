"""Messages that stand in a cell as JSON text, as csv files have to hold them.

Taken as plain text they would be trained brackets and all, so they are looked for in every source. A column counts only if all of its first
values are conversations: a text that merely quotes one stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.messages import BadRow, is_blank, looks_like_messages
from orpo.errors import DataError

_NUM_LOOKED_AT = 50
_PYTHON_TEXT = re.compile(r"\s*\[?\s*\{'(?:role|from|content|value)':")


def json_columns(rows: Sequence[Mapping[Any, Any]], where: str) -> frozenset[str]:
    """The columns whose values are conversations written as JSON text.

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
    return frozenset(column for column, texts in found.items() if all(_messages_of(text) is not None for text in texts))


def _messages_of(text: str) -> Any:
    """The conversation that a text is in JSON, or None."""
    if text.lstrip()[:1] not in {"[", "{"}:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if looks_like_messages(value) else None


def decode(row: Mapping[Any, Any], columns: frozenset[str]) -> Mapping[Any, Any]:
    """The row with the conversations of these columns as values.

    Raises:
        BadRow: a text in one of them is no conversation.
    """
    texts = {column: row[column] for column in columns if isinstance(row.get(column), str) and not is_blank(row[column])}
    decoded = {column: _messages_of(text) for column, text in texts.items()}
    for column, value in decoded.items():
        if value is None:
            raise BadRow("bad_messages", f"{column} holds text where the other rows have messages as JSON")
    return {**row, **decoded} if decoded else row
