"""Nested values of Arrow columns as the JSON values that were meant: without the nulls of a merged schema, JSON types read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Read = Callable[[Any], Any]


def cell_readers(schema: Any, *, is_decoded: bool = False) -> dict[str, Read]:
    """Column -> what its values have to go through; only for columns that are nested.

    A struct has one set of keys for all rows, so a tool call `{"city": "Oslo"}` comes back as `{"city": "Oslo", "a": null, "b": null}`
    where another row called with `a` and `b`. Those nulls are taken away; a null that somebody wrote cannot be told from them.

    Args:
        schema: a pyarrow schema.
        is_decoded: the JSON type is read already, as `datasets` does for its rows.
    """
    found = {field.name: _reader(field.type, is_decoded) for field in schema}
    return {name: read for name, read in found.items() if read is not None}


def read_cells(row: Mapping[str, Any], readers: Mapping[str, Read]) -> dict[str, Any]:
    """The row with the values of these columns read."""
    return {name: readers[name](value) if name in readers else value for name, value in row.items()}


def _reader(kind: Any, is_decoded: bool) -> Read | None:
    import pyarrow as pa

    if getattr(kind, "extension_name", None) == "arrow.json":  # `datasets`' Json; what is inside has no schema that could be merged
        return None if is_decoded else _json
    if pa.types.is_struct(kind):
        inner = {field.name: _reader(field.type, is_decoded) for field in kind}
        return lambda value: _struct(value, inner)
    if pa.types.is_map(kind):
        return lambda value: dict(value) if isinstance(value, list) else value
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):
        item = _reader(kind.value_type, is_decoded)
        return None if item is None else lambda value: [item(one) for one in value] if isinstance(value, list) else value
    return None


def _struct(value: Any, readers: Mapping[str, Read | None]) -> Any:
    if not isinstance(value, Mapping):  # null, or what `datasets` decodes into an object of its own (an image)
        return value
    read = {key: reader(value[key]) if (reader := readers.get(key)) else value[key] for key in value}
    return {key: item for key, item in read.items() if item is not None}


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
