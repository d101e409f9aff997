"""Boundaries and ends, looked at id by id on made-up ids."""

from __future__ import annotations

import pytest

from orpo.data.chat.ends import End
from orpo.data.chat.fit import Joined, common_prefix, cut_answers, join, to_group
from orpo.data.chat.turns import TurnDraft
from orpo.data.types import Dropped, Preference, TokenGroup, Where

END, HEADER = 2, 1
PRINTED, APPENDED = End("<e>", "<e>", END), End("", "", END, is_appended=True)
CONTROL = frozenset({END, HEADER})
ROW = Preference("q", ("a", "b"), ((0, 1),), Where("rows.jsonl", 0, 1))


def draft(end: End = PRINTED, **options: object) -> TurnDraft:
    return TurnDraft(ROW, "q", ["qa", "qb"], [end, end], **options)  # type: ignore[arg-type]


def joined(*ids: list[int], **options: object) -> Joined:
    result = join(draft(**options), ids, CONTROL)  # type: ignore[arg-type]
    assert isinstance(result, Joined), result
    return result


@pytest.mark.parametrize(
    ("sequences", "expected"), [([[1, 2], [1, 2, 3]], 2), ([[1, 2], [1, 3], [1, 2]], 1), ([[1], [2]], 0), ([[], [1]], 0), ([[5, 5]], 2)]
)
def test_common_prefix(sequences: list[list[int]], expected: int) -> None:
    assert common_prefix(sequences) == expected


def test_a_prefix_stays_a_prefix() -> None:
    result = joined([1, 5], [1, 5, 7, END], [1, 5, 8, 9, END])
    assert (result.prompt_ids, result.responses, result.ended) == ([1, 5], [[7, END], [8, 9, END]], [True, True])
    assert result.notes == []


def test_a_merge_in_one_answer_moves_the_boundary_for_both() -> None:
    result = joined([1, 5, 6], [1, 5, 6, 7, END], [1, 5, 67, END])
    assert (result.prompt_ids, result.responses) == ([1, 5], [[6, 7, END], [67, END]])
    assert result.notes == ["boundary_merge"]


@pytest.mark.parametrize(
    ("ids", "reason", "why"),
    [
        (([5, HEADER], [5, 9, END], [5, HEADER, END]), "boundary", "header"),
        (([5, 6], [7, END], [5, 6, 7, END]), "boundary", "no token of the prompt"),
        (([], [7, END], [8, END]), "boundary", "no token of the prompt"),
        (([5], [5, 7, 8], [5, 7, END]), "boundary", "terminator"),
        (([5], [5, END], [5, 7, END]), "empty_answer", "no token of an answer"),
        (([5], [5], [5, 7, END]), "boundary", "terminator"),
    ],
)
def test_what_cannot_be_proved_is_refused(ids: tuple[list[int], ...], reason: str, why: str) -> None:
    result = join(draft(), ids, CONTROL)
    assert isinstance(result, Dropped)
    assert result.reason == reason
    assert why in result.detail


def test_an_appended_terminator() -> None:
    assert joined([5], [5, 7], [5, 8], end=APPENDED).responses == [[7, END], [8, END]]


def test_an_answer_shortened_beforehand_has_not_ended() -> None:
    result = joined([5], [5, 7, END], [5, 8, END], cut=frozenset({1}))
    assert (result.responses, result.ended) == ([[7, END], [8]], [True, False])
    group = to_group(ROW, result)
    assert isinstance(group, TokenGroup)
    assert group.is_ended == (True, False)
    assert group.notes == ("answer_cut",)


@pytest.mark.parametrize(
    ("room", "responses", "ended"),
    [
        (4, [[7, 8, 9, END], [7, END, 8, END]], [True, True]),
        (3, [[7, 8, 9], [7, END, 8]], [False, False]),
        (2, [[7, 8], [7]], [False, False]),
        (1, [[7], [7]], [False, False]),
    ],
)
def test_cutting(room: int, responses: list[list[int]], ended: list[bool]) -> None:
    cut = cut_answers(Joined([5], [[7, 8, 9, END], [7, END, 8, END]], [True, True], []), room, {END})
    assert (cut.responses, cut.ended) == (responses, ended)


def test_identical_after_cutting() -> None:
    cut = cut_answers(Joined([5], [[7, 8, END], [7, 9, END]], [True, True], []), 1, {END})
    result = to_group(ROW, cut)
    assert isinstance(result, Dropped)
    assert result.reason == "identical_after_truncation"
