"""How far the parts of a command are and how long they will take: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo.system.console import human_seconds, say

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_S = 10.0
"""Without a terminal a part says how far it is at most so often, beside its beginning and its end."""


@dataclass
class _Part:
    """A part at work: when it began, where it stood then (what was known beforehand takes no time), and when it was last told of."""

    began_s: float
    began_at: int
    told_s: float
    bar: Any = None
    is_told: bool = False


class PartBars:
    """A bar per part on a terminal; elsewhere lines with the time left, and one at its end.

    Called with (what, done, total); a total of 0 is a part of which nobody knows how long it is.

    Args:
        console: where to.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        self.console, self.clock = console, clock
        columns = (
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, expand=True) if console.is_terminal else None
        self._parts: dict[str, _Part] = {}

    def __enter__(self) -> PartBars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """A part has got so far; `note` is a word on how fast, for a line."""
        now_s = self.clock()
        part = self._parts.get(what)
        if part is None:
            part = self._parts[what] = _Part(now_s, done, now_s)
            if self._progress is not None:
                part.bar = self._progress.add_task("", total=total or None)
        if self._progress is not None:
            from rich.markup import escape

            self._progress.update(part.bar, completed=done, total=total or None, description=escape(f"{what}, {note}" if note else what))
            return
        is_new, part.is_told = not part.is_told, True
        if total and done == total:
            say(self.console, f"done         {what}: {total}")
        elif (is_new and total) or now_s - part.told_s >= LINE_EVERY_S:
            part.told_s = now_s
            left = f"{done} of {total}{self._left(part, done, total, now_s)}" if total else str(done)
            say(self.console, f"working      {what}: {left}{f', {note}' if note else ''}")

    @staticmethod
    def _left(part: _Part, done: int, total: int, now_s: float) -> str:
        if done <= part.began_at:
            return ""
        return f", {human_seconds((now_s - part.began_s) / (done - part.began_at) * (total - done))} left"
