"""Work that several processes share comes out once, whole, and in nobody's order but the pieces'."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from orpo.errors import GuardStop, OrpoError, ToldElsewhereError, UserError
from orpo.evaluate.crew import Alone, Crew, pieces_of


def in_crew(size: int, do: Callable[[int, dict[str, Any]], list[Any]], drive: Callable[[Crew], Any]) -> tuple[Any, list[Any]]:
    """What the first process gets, and how the others left."""
    store = dist.HashStore()
    ends: list[Any] = []

    def serve(rank: int) -> None:
        try:
            Crew(store, rank, size).serve(lambda task: do(rank, task))
            ends.append(None)
        except Exception as error:
            ends.append(error)

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    first = Crew(store, 0, size)
    try:
        with first.at_work():
            return drive(first), ends
    finally:
        for thread in threads:
            thread.join()


def double(rank: int, task: dict[str, Any]) -> list[Any]:
    return [task["times"] * number for number in task["payload"]]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 40])
def test_every_piece_is_done_once(size: int, number: int) -> None:
    rows, found, done_here = list(range(number)), {}, []

    def work(piece: list[int]) -> list[Any]:
        done_here.extend(piece)
        return [2 * row for row in piece]

    def keep(piece: list[int], results: list[Any]) -> None:
        for row, result in zip(piece, results, strict=True):
            assert row not in found
            found[row] = result

    def drive(crew: Alone) -> None:
        crew.share({"do": "double", "times": 2}, pieces_of(rows, 4, crew.size), lambda piece: piece, work, keep)

    if size == 1:
        drive(Alone())
    else:
        _, ends = in_crew(size, double, drive)
        assert ends == [None] * (size - 1)
    assert found == {row: 2 * row for row in rows}
    assert size == 1 or number < 2 or len(done_here) < number


def test_several_tasks_in_turn_and_messages_larger_than_a_store_takes() -> None:
    text = "é" * 3_000_000

    def drive(crew: Crew) -> list[Any]:
        found: list[Any] = []
        for times in (1, 2):
            crew.share({"do": "double", "times": times}, [[1], [text]], list, lambda piece: piece, lambda _, results: found.extend(results))
        return found

    assert in_crew(2, double, drive)[0] == [1, text, 1, 2 * text]


@pytest.mark.parametrize("kind", [UserError, GuardStop])
def test_what_goes_wrong_in_another_process_is_told_by_the_first(kind: type[OrpoError]) -> None:
    def do(rank: int, task: dict[str, Any]) -> list[Any]:
        raise kind("there is no such model")

    def drive(crew: Crew) -> None:
        crew.share({"do": "double"}, [[1], [2]], list, lambda piece: piece, lambda _, results: None)

    with pytest.raises(UserError, match="process 1: .*there is no such model") as told:  # only what it says and its code travel
        in_crew(2, do, drive)
    assert told.value.exit_code == kind.exit_code


def test_the_others_leave_when_the_first_stops() -> None:
    def drive(crew: Crew) -> None:
        raise UserError("no prompts", where="orpo eval")

    with pytest.raises(UserError, match="no prompts"):
        in_crew(3, double, drive)


def test_a_process_whose_first_is_gone_leaves() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

    with pytest.raises(ToldElsewhereError, match="cannot be reached"):
        Crew(Gone(), 1, 2).serve(lambda task: [])


@pytest.mark.parametrize(
    ("number", "most", "size", "expected"), [(10, 4, 1, [4, 4, 2]), (6, 4, 3, [2, 2, 2]), (1, 64, 4, [1]), (0, 64, 2, [])]
)
def test_pieces_are_those_of_one_process_where_there_are_enough(number: int, most: int, size: int, expected: list[int]) -> None:
    pieces = pieces_of(list(range(number)), most, size)
    assert [len(piece) for piece in pieces] == expected
    assert [row for piece in pieces for row in piece] == list(range(number))
