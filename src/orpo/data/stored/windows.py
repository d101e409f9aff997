"""Token groups of a source that is never read to its end: window by window, shuffled inside a window, and found again from a position.

A window is so many rows of the source, dropped ones included. Its order depends on the seed, the pass and its first row alone, so that a
resumed run reads the window again from its start and goes on where it was. When the source ends the next pass begins, in another order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.data.dataset import DataReport, chunks, empty_report, fingerprint
from orpo.data.stored.tokenise import Means, Rows, encode_all
from orpo.data.types import Dropped, Preference, TokenGroup
from orpo.errors import DataError

if TYPE_CHECKING:
    from orpo.data.template import TemplateEncoder


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Where a stream is: behind some groups of a window's order.

    Attributes:
        pass_number: how often the source has been read to its end.
        start: rows of the source before the window.
        taken: groups of the window that were given.
        window: hash of the window's groups; empty at the start of a pass.
        report: `DataReport.to_state` of the rows that were read before the window, each counted in the first pass.
    """

    pass_number: int = 0
    start: int = 0
    taken: int = 0
    window: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class _Window:
    start: int
    num_rows: int
    groups: list[TokenGroup]
    report: DataReport


class WindowedGroups:
    """The groups of a stream, in training order, from any position.

    Args:
        open_rows: gives the rows of the source, from its first one, whenever it is called.
        encoder: makes groups of them.
        window_rows: rows of a window.
        seed: of the order inside a window.
        means: with what rows are tokenised; nothing is kept.
        set_aside: hashes of prompts that are evaluated on, which are left out of training and counted.
        source: what the stream is, in plain JSON types: it stands for the content in the fingerprint.

    Attributes:
        report: what became of every row that was read, each counted once.
        first: groups of the first window, to look at.

    Raises:
        DataError: nothing usable in the first window; with `strict_data`, a row that cannot be used.
    """

    def __init__(
        self,
        open_rows: Callable[[], Rows],
        encoder: TemplateEncoder,
        *,
        window_rows: int,
        seed: int,
        means: Means,
        set_aside: frozenset[int] = frozenset(),
        source: Any = None,
    ) -> None:
        self._open_rows, self._encoder, self._means, self._set_aside = open_rows, encoder, means, set_aside
        self.window_rows, self.seed, self.source = window_rows, seed, source
        self.report = empty_report(encoder)
        # By one process: others would be started for this window alone.
        window = next(self._windows(0, Means(1)), None)
        self._first = window or _Window(0, 0, [], DataReport())
        self.report.merge(self._first.report)
        self.report.check(1, name=f"the first {window_rows:,} rows of the stream")
        self.first: Sequence[TokenGroup] = self._first.groups

    @property
    def longest_tokens(self) -> int:
        """What no row to come exceeds."""
        return self._encoder.max_length

    def fingerprint(self) -> str:
        """Of what the stream is; its content is not read to the end."""
        facts = {"source": self.source, "template": self._encoder.describe(), "window_rows": self.window_rows, "seed": self.seed}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def steps(self, rows_per_step: int, position: StreamPosition) -> Iterator[tuple[list[TokenGroup], StreamPosition]]:
        """Groups of one optimizer step after the other, without end, each with the position behind it.

        No row is twice in a pass and none is left out: what is left of a window goes into a step with the beginning of the next, what is
        left of a pass is a smaller step.

        Raises:
            DataError: the window at the position is not what it was, or a pass holds nothing.
        """
        step: list[TokenGroup] = []
        self.report.restore(position.report or DataReport().to_state())
        for pass_number in itertools.count(position.pass_number):
            is_whole_pass, num_groups = position.start == 0, 0
            for window in self._windows(position.start, self._means):
                digest, before = fingerprint(window.groups), self.report.to_state()
                if position.window and digest != position.window:
                    raise _changed(position)
                if pass_number == 0:  # each row counts once, however often it is trained on
                    self.report.forget_duplicates()
                    self.report.merge(window.report)
                num_groups += len(window.groups)
                order = self.order(pass_number, window.start, len(window.groups))
                for taken in range(position.taken, len(order)):
                    step.append(window.groups[order[taken]])
                    if len(step) == rows_per_step:
                        yield step, StreamPosition(pass_number, window.start, taken + 1, digest, before)
                        step = []
                position = StreamPosition(pass_number, window.start + window.num_rows)
            if position.window:
                raise _changed(position)
            if is_whole_pass and not num_groups:
                raise _empty()
            position = StreamPosition(pass_number + 1, report=self.report.to_state())
            if step:
                yield step, position
                step = []

    def order(self, pass_number: int, start: int, num_groups: int) -> list[int]:
        """The order of a window's groups."""
        # From a list: each number is mixed in by itself, where a sum would give neighbours the same order.
        return np.random.default_rng([self.seed, pass_number, start]).permutation(num_groups).tolist()

    def _windows(self, start: int, means: Means) -> Iterator[_Window]:
        """The windows of a pass that begin at a row of the source or behind it."""
        rows = iter(self._open_rows())
        first = getattr(self, "_first", None)
        if first is not None and start == 0:
            yield first  # known already
            start = first.num_rows
        for _ in itertools.islice(rows, start):  # a source of which nothing is known but that it gives rows in order
            pass
        groups, report = [], DataReport()
        for part, some in encode_all(_aligned(rows, self.window_rows), self._encoder, means, self._set_aside):
            groups += some
            report.merge(part)
            if report.num_rows == self.window_rows:
                yield _Window(start, report.num_rows, groups, report)
                start, groups, report = start + report.num_rows, [], DataReport()
        if report.num_rows:
            yield _Window(start, report.num_rows, groups, report)


def _aligned(rows: Iterator[Preference | Dropped], window_rows: int) -> Iterator[list[Preference | Dropped]]:
    """Chunks of rows, none across the border of two windows."""
    while first := list(itertools.islice(rows, 1)):
        yield from chunks(itertools.chain(first, itertools.islice(rows, window_rows - 1)))


def _empty() -> DataError:
    return DataError("the stream gives no usable row any more", where="dataset_name", expected="a source that can be read again")


def _changed(position: StreamPosition) -> DataError:
    return DataError(
        f"the rows from {position.start} on are not those that the checkpoint was made with",
        where="dataset_name",
        expected="a source that gives the same rows whenever it is read",
        mend="put the source back as it was, or start anew in another output_dir",
    )
