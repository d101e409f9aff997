"""The next optimizer step is made ready while this one computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from orpo.training.steps import StepBatch


class Ahead:
    """Takes steps from an iterator, one ahead of who asks: the next is packed, and copied to pinned memory, in a thread.

    Which steps come, and in which order, is the iterator's alone. One that is left early, at the end of a run, has lost a step that nobody
    would have asked for.

    Args:
        is_pinned: whether steps go to memory that a GPU copies from by itself.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self.is_pinned = is_pinned
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="orpo-next-step")
        self._of: Iterator[StepBatch] | None = None
        self._next: Future[list[StepBatch]] | None = None

    def take(self, steps: Iterator[StepBatch], count: int) -> list[StepBatch]:
        """The next `count` steps; fewer, or none, at the end."""
        # By identity: what was fetched ahead of another epoch's iterator is of rows that are over.
        taken = self._next.result() if self._next is not None and self._of is steps else self._fetch(steps, count)
        self._of, self._next = steps, self._thread.submit(self._fetch, steps, count)
        return taken

    def close(self) -> None:
        """Wait for the step that is being made, and forget it."""
        self._thread.shutdown(cancel_futures=True)
        self._of = self._next = None

    def _fetch(self, steps: Iterator[StepBatch], count: int) -> list[StepBatch]:
        fetched = list(itertools.islice(steps, count))
        return [step.pinned() for step in fetched] if self.is_pinned else fetched
