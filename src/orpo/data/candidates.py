"""The judged responses of one prompt, in whichever columns and notation a row holds them: texts, scores, votes.

Every function here makes, once per source, a reader of rows; the reader raises `BadRow` where a row is at fault.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from orpo.data.messages import BadRow, looks_like_messages, type_name
from orpo.data.pairs import scores_of_votes
from orpo.data.verdicts import winner_in_list

TEXT_KEYS = ("response", "text", "content", "answer", "completion", "output", "value", "message", "messages", "generation")
SCORE_KEYS = (
    *("overall_score", "score", "rating", "reward", "average_rating", "fine-grained_score", "helpfulness", "quality", "pm_score", "value"),
)
RANK_KEYS = ("rank",)

Candidates = tuple[list[Any], list[float | None], dict[tuple[int, int], int | None]]
"""Responses as found, their scores (higher is better), and direct votes."""


def read_score(value: Any) -> float | None:
    """A score as a number; None where the response was not judged ("N/A", null).

    Raises:
        BadRow: a boolean, list or object.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("wrong_type", f"a score is a {type_name(value)}")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _list_at(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if value is None:
        raise BadRow("missing_field", f"{column} is absent or null")
    if isinstance(value, Mapping) and value and all(isinstance(item, (list, tuple)) for item in value.values()):
        sizes = {len(item) for item in value.values()}  # `datasets`' form of a list of objects
        if len(sizes) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong_type", f"{column} is a {type_name(value)}, not a list")
    return list(value)


def of_list(column: str, scores: str | None, *, lower_is_better: bool) -> Callable[[Mapping[str, Any]], Candidates]:
    """Candidates in one list: texts or messages with a parallel list of scores, or objects that hold their own score or rank."""

    def candidates(row: Mapping[str, Any]) -> Candidates:
        items = _list_at(row, column)
        if scores is not None:
            marks = [read_score(value) for value in _list_at(row, scores)]
            if len(marks) != len(items):
                raise BadRow("missing_field", f"{len(items)} responses but {len(marks)} {scores}")
            return [_text_of_candidate(item) for item in items], _signed(marks, lower_is_better), {}
        found = [_own_score(item) for item in items]
        return [_text_of_candidate(item) for item in items], found, {}

    return candidates


def of_order(column: str) -> Callable[[Mapping[str, Any]], Candidates]:
    """Candidates in one list, the best first."""

    def candidates(row: Mapping[str, Any]) -> Candidates:
        items = _list_at(row, column)
        return [_text_of_candidate(item) for item in items], [-float(place) for place in range(len(items))], {}

    return candidates


def of_winner(column: str, label: str, first: int) -> Callable[[Mapping[str, Any]], Candidates]:
    """Candidates in one list, and a column that names the best of them by its number (counted from `first`) or by its text."""

    def candidates(row: Mapping[str, Any]) -> Candidates:
        texts = [_text_of_candidate(item) for item in _list_at(row, column)]
        best = winner_in_list(row.get(label), texts, first, label)
        return texts, [float(place == best) for place in range(len(texts))], {}

    return candidates


def _signed(marks: list[float | None], lower_is_better: bool) -> list[float | None]:
    return [-mark if mark is not None and lower_is_better else mark for mark in marks]


def _text_of_candidate(item: Any) -> Any:
    if not isinstance(item, Mapping) or looks_like_messages(item):
        return item
    return next((item[key] for key in TEXT_KEYS if item.get(key) is not None), None)


def own_score_key(item: Any) -> str | None:
    """The key under which a candidate carries its score or rank."""
    if not isinstance(item, Mapping):
        return None
    text_key = next((key for key in TEXT_KEYS if item.get(key) is not None), None)
    return next((key for key in (*RANK_KEYS, *SCORE_KEYS) if key in item and key != text_key), None)


def _own_score(item: Any) -> float | None:
    key = own_score_key(item)
    if key is None:
        return None
    mark = read_score(item[key])
    return -mark if mark is not None and key in RANK_KEYS else mark


def of_columns(
    columns: tuple[str, ...], scores: tuple[str, ...], *, lower_is_better: bool = False
) -> Callable[[Mapping[str, Any]], Candidates]:
    """Candidates in numbered columns, with a numbered column of scores for each."""

    def candidates(row: Mapping[str, Any]) -> Candidates:
        marks = [read_score(row.get(name)) for name in scores]
        return [row.get(name) for name in columns], _signed(marks, lower_is_better), {}

    return candidates


def of_votes(columns: tuple[str, ...], votes: str) -> Callable[[Mapping[str, Any]], Candidates]:
    """Candidates in numbered columns, with one vote per pair in the order (1,2), (1,3), … : 1 first, 2 second, 0 tie."""
    order = list(itertools.combinations(range(len(columns)), 2))

    def candidates(row: Mapping[str, Any]) -> Candidates:
        marks = _list_at(row, votes)
        if len(marks) != len(order):
            raise BadRow("missing_field", f"{len(marks)} votes for {len(order)} pairs")
        decided: dict[tuple[int, int], int | None] = {}
        for (i, j), mark in zip(order, marks, strict=True):
            if isinstance(mark, bool) or mark not in (0, 1, 2):
                raise BadRow("wrong_type", f"a vote that is not 0, 1 or 2 in {votes}")
            decided[i, j] = None if mark == 0 else i if mark == 1 else j
        scores: list[float | None] = list(scores_of_votes(len(columns), decided))
        return [row.get(name) for name in columns], scores, decided

    return candidates
