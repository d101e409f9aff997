"""The processes of one evaluation. The first does all of it, and hands the others pieces of what takes long: answers, log-probabilities.

They talk through the store where a launcher's processes meet, by asking it now and then. There is no collective to time out while a judge
thinks for an hour, Ctrl-C is heard at once, and nothing in a model's loading takes this for a training of several ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from orpo.errors import OrpoError, ToldElsewhereError, UserError

if TYPE_CHECKING:
    from orpo.system.place import Place

Piece = TypeVar("Piece")
Message = dict[str, Any]

_ASK_S = 0.05
_FAREWELL_S = 20.0
"""Longest wait at the end for processes that have not said that they leave."""

_PART_BYTES = 2 << 20
"""Of a message in the store, which takes no more than 8 MiB at a time."""


class Alone:
    """One process: it does everything itself."""

    size = 1

    def share(
        self,
        task: Message,
        pieces: Sequence[Piece],
        payload: Callable[[Piece], Any],
        work: Callable[[Piece], list[Any]],
        keep: Callable[[Piece, list[Any]], None],
    ) -> None:
        """Have pieces of work done, by all processes there are.

        Args:
            task: what the work is, for processes that know nothing of it.
            pieces: what there is to do.
            payload: a piece as the others need it. It and results are plain JSON types.
            work: does a piece here.
            keep: takes the result of a piece, whoever did it, as soon as it is there.
        """
        for piece in pieces:
            keep(piece, work(piece))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The time in which others are needed."""
        yield


class Crew(Alone):
    """The first of several processes, and the others as it sees them.

    Args:
        store: where they meet.
        rank, size: this process's number, and how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._mail = _Mail(store)
        self._num_sent = [0] * size

    def share(
        self,
        task: Message,
        pieces: Sequence[Piece],
        payload: Callable[[Piece], Any],
        work: Callable[[Piece], list[Any]],
        keep: Callable[[Piece, list[Any]], None],
    ) -> None:
        due: dict[tuple[int, int], Piece] = {}
        for number, piece in enumerate(pieces):
            if rank := number % self.size:
                due[rank, self._send(rank, {**task, "payload": payload(piece)})] = piece
        for piece in pieces[:: self.size]:
            keep(piece, work(piece))
            self._take(due, keep)
        while due:
            self._take(due, keep)
            time.sleep(_ASK_S)

    def _send(self, rank: int, message: Message) -> int:
        number = self._num_sent[rank]
        self._num_sent[rank] += 1
        self._mail.put(f"task/{rank}/{number}", message)
        return number

    def _take(self, due: dict[tuple[int, int], Piece], keep: Callable[[Piece, list[Any]], None]) -> None:
        """Take what is done of what is due.

        Raises:
            UserError: a process could not do its piece; or it has left.
        """
        for rank, number in list(due):
            found = self._mail.get(f"done/{rank}/{number}") or self._mail.get(f"gone/{rank}")
            if found is None:
                continue
            if "result" not in found:
                error = UserError(f"process {rank}: {found['error']}")
                error.exit_code = found["exit_code"]
                raise error
            keep(due.pop((rank, number)), found["result"])

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The others are let go at the end, however it comes."""
        try:
            yield
        finally:
            for rank in range(1, self.size):
                self._send(rank, {"do": "end"})
            until_s = time.monotonic() + _FAREWELL_S
            # The store may live in this process: it must not go before they have read that they may.
            while time.monotonic() < until_s and not all(self._mail.has(f"gone/{rank}") for rank in range(1, self.size)):
                time.sleep(_ASK_S)

    def serve(self, do: Callable[[Message], list[Any]]) -> None:
        """What the other processes do: one task after the other, until there is none.

        Args:
            do: does a task, and gives its result in plain JSON types.

        Raises:
            ToldElsewhereError: a task went wrong, and the first process says so; or it is gone.
        """
        left: Message = {"error": "it has left", "exit_code": 1}
        try:
            number = 0
            while (task := self._next(number))["do"] != "end":
                self._mail.put(f"done/{self.rank}/{number}", {"result": do(task)})
                number += 1
        except OrpoError as error:
            left = {"error": str(error), "exit_code": error.exit_code}
            raise _told(str(error), error.exit_code) from error
        finally:
            self._mail.put(f"gone/{self.rank}", left)

    def _next(self, number: int) -> Message:
        while (found := self._mail.get(f"task/{self.rank}/{number}")) is None:
            time.sleep(_ASK_S)
        return found


def _told(why: str, exit_code: int) -> ToldElsewhereError:
    error = ToldElsewhereError(f"process 0 says why ({why})")
    error.exit_code = exit_code
    return error


class _Mail:
    """Messages in a store, each in parts of a size that it takes."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def put(self, key: str, message: Message) -> None:
        data = json.dumps(message)  # ASCII: a character is a byte
        parts = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]
        try:
            for number, part in enumerate(parts):
                self._store.set(f"{key}/{number}", part)
            self._store.set(key, str(len(parts)))
        except RuntimeError as error:
            raise _told(f"its store cannot be reached: {error}", 1) from error

    def has(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise _told(f"its store cannot be reached: {error}", 1) from error

    def get(self, key: str) -> Message | None:
        if not self.has(key):
            return None
        num_parts = int(self._store.get(key))
        found: Message = json.loads(b"".join(self._store.get(f"{key}/{number}") for number in range(num_parts)))
        return found


def join_crew(place: Place) -> Crew:
    """The processes that a launcher has started for this evaluation.

    Raises:
        UserError: not all of them came.
    """
    from orpo.system.group import meet_in_store

    return Crew(meet_in_store(place, "orpo-eval"), place.rank, place.world_size)


def pieces_of(rows: Sequence[int], most: int, size: int) -> list[list[int]]:
    """Rows in pieces of at most so many; in smaller ones where there would be fewer pieces than processes."""
    length = max(1, min(most, -(-len(rows) // size)))
    return [list(rows[start : start + length]) for start in range(0, len(rows), length)]
