"""The judged responses of one prompt, in whichever columns and notation a row holds them: texts, scores, votes.

Every function here makes, once per source, a reader of rows; the reader raises `BadRow` where a row is at fault.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orpo.data.rows.messages import BadRow, looks_like_messages, type_name
from orpo.data.rows.pairs import scores_of_votes
from orpo.errors import DataError

Verdict = Callable[[Mapping[str, Any]], int | None]
"""0 or 1 for the winning response, None for a tie. Raises BadRow."""
_TIES = frozenset({"tie", "tie (bothbad)", "both", "bothbad", "neither", "equal", "same", "none", "draw", "c"})
_ORDINALS = ({"first", "left", "one"}, {"second", "right", "two"})

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


def _as_int(value: Any) -> int | None:
    """A whole number, also as text or as a float; None for anything else, booleans included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() and len(value) < 10:
        return int(value)
    return value if isinstance(value, int) else None


def _of_word(value: Any, suffixes: tuple[str, str], row: Mapping[str, Any]) -> int | None:
    """A winner written in words: the response's suffix, its column's name, first/second, or the model's name. Raises BadRow."""
    word = value.strip().lower()
    for index, suffix in enumerate(suffixes):
        model = next((row[key] for key in (f"model_{suffix}", f"model{suffix}") if isinstance(row.get(key), str)), None)
        if word in _ORDINALS[index] or word == suffix or word.endswith((f"_{suffix}", f" {suffix}")) or value == model:
            return index
    stem = word.rstrip("0123456789ab")
    if stem and word != stem and word[len(stem) :] in suffixes:
        return suffixes.index(word[len(stem) :])
    if word in _TIES:
        return None
    raise BadRow("no_preference", f"the verdict {value[:40]!r} names no response")


def verdict_of_label(label: str, suffixes: tuple[str, str], values: Sequence[Any], where: str) -> Verdict:
    """How to read a column of verdicts, settled by the values that a sample of it holds.

    Whole numbers name the response by its suffix (1/2 with `response_1`, `response_2`; 0/1 with `answer_0`, `answer_1`), 0 beside 1 and 2
    being a tie.

    Raises:
        DataError: numbers that could mean either response.
    """
    numbers = {number for value in values if (number := _as_int(value)) is not None}
    table: dict[int, int | None] = {}
    if suffixes == ("1", "2"):
        table = {1: 0, 2: 1}
        if 0 in numbers and 2 not in numbers:
            raise _ambiguous(label, suffixes, numbers, where)
        table[0] = None
    elif suffixes == ("0", "1"):
        table = {0: 0, 1: 1}
    if numbers and not numbers <= table.keys():
        raise _ambiguous(label, suffixes, numbers, where)
    if any(isinstance(value, bool) for value in values):
        raise _ambiguous(label, suffixes, {value for value in values if isinstance(value, bool)}, where)

    def verdict(row: Mapping[str, Any]) -> int | None:
        value = row.get(label)
        if value is None:
            raise BadRow("no_preference", f"{label} is absent or null")
        number = _as_int(value)
        if number is not None and number in table:
            return table[number]
        if not isinstance(value, str):
            raise BadRow("wrong_type", f"{label} is a {type_name(value)} that names no response")
        return _of_word(value, suffixes, row)

    return verdict


def _ambiguous(label: str, suffixes: tuple[str, str], numbers: set[Any], where: str) -> DataError:
    shown = ", ".join(str(number) for number in sorted(numbers)[:6])
    return DataError(
        f"the values of {label!r} ({shown}) do not say which of the responses {suffixes[0]} and {suffixes[1]} they mean",
        where=where,
        expected=f"the name of the winner, such as {suffixes[0]!r}, {suffixes[1]!r} or 'tie'",
        mend=f"rewrite {label!r}, or make columns chosen and rejected from it",
    )


def verdict_of_vote_list(label: str, suffixes: tuple[str, str], values: Sequence[Any], where: str) -> Verdict:
    """One column that holds a list of votes, each written as `verdict_of_label` reads it; as `verdict_of_votes`.

    Raises:
        DataError: numbers that could mean either response.
    """
    one = verdict_of_label(label, suffixes, [vote for value in values if isinstance(value, (list, tuple)) for vote in value], where)

    def verdict(row: Mapping[str, Any]) -> int | None:
        votes = row.get(label)
        if not isinstance(votes, (list, tuple)):
            raise BadRow("no_preference" if votes is None else "wrong_type", f"{label} is not a list of votes")
        return verdict_of_votes([_cast(one, label, vote) for vote in votes])(row)

    return verdict


def _cast(one: Verdict, label: str, vote: Any) -> Verdict:
    return lambda row: one({**row, label: vote})


def first_index(label: str, values: Sequence[Any], sizes: Sequence[int], where: str) -> int:
    """Whether the winners of lists of responses, given by number, are counted from 0 or from 1, settled by a sample.

    Raises:
        DataError: the numbers fit both, or neither.
    """
    numbers = [(number, size) for value, size in zip(values, sizes, strict=True) if (number := _as_int(value)) is not None]
    fits = [first for first in (0, 1) if all(first <= number < size + first for number, size in numbers)]
    if numbers and len(fits) != 1:
        shown = ", ".join(str(number) for number in sorted({number for number, _ in numbers})[:6])
        raise DataError(
            f"the values of {label!r} ({shown}) may be counted from 0 or from 1" if fits else f"{label!r} ({shown}) names no response",
            where=where,
            expected="the number or the text of the winner, both kinds of counting being told apart by a 0 or by the number of responses",
            mend=f"rewrite {label!r}, or make columns chosen and rejected from it",
        )
    return fits[0]


def winner_in_list(value: Any, texts: Sequence[Any], first: int, label: str) -> int:
    """The place of a winner given by its number (counted from `first`) or by its text. Raises BadRow."""
    number = _as_int(value)
    if number is not None and first <= number < len(texts) + first:
        return number - first
    if isinstance(value, str) and texts.count(value) == 1:
        return list(texts).index(value)
    raise BadRow("no_preference", f"{label} names no response")


def verdict_of_strength(column: str) -> Verdict:
    """A signed strength of preference (HelpSteer 2 and 3): below 0 the first, above 0 the second, 0 a tie."""

    def verdict(row: Mapping[str, Any]) -> int | None:
        number = _as_int(row.get(column))
        if number is None:
            raise BadRow("no_preference", f"{column} is absent or not a whole number")
        return None if number == 0 else int(number > 0)

    return verdict


def verdict_of_flags(flags: tuple[str, str]) -> Verdict:
    """One flag per response (`winner_model_a`, `winner_model_b`): the one that is set; neither or both is a tie."""

    def verdict(row: Mapping[str, Any]) -> int | None:
        marks = [row.get(column) in (1, "1", "true", "True") for column in flags]
        return None if marks[0] == marks[1] else marks.index(True)

    return verdict


def verdict_of_votes(voters: Sequence[Verdict]) -> Verdict:
    """Several annotators: the response that more than half of all votes name; ties count as votes, absent ones do not."""

    def verdict(row: Mapping[str, Any]) -> int | None:
        votes: Counter[int | None] = Counter()
        for voter in voters:
            try:
                votes[voter(row)] += 1
            except BadRow as error:
                if error.reason != "no_preference":
                    raise
        if not votes:
            raise BadRow("no_preference", "no annotator voted")
        choice, number = votes.most_common(1)[0]
        return choice if 2 * number > votes.total() else None

    return verdict
