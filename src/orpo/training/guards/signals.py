"""SIGTERM and SIGINT: the first asks for one save and a clean leave, the second leaves at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from orpo.errors import SignalStop
from orpo.system.place import own_rank
from orpo.system.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_S = 1.0
"""Under torchrun one Ctrl-C reaches a rank twice, from the terminal and from the launcher; within this time it is one request."""


class SignalGuard:
    """Handlers for stop signals, as a context manager; the earlier handlers come back at its end.

    Outside `hold()` there is nothing to save, so the first signal raises `SignalStop` where the program stands. Inside `hold()` it only
    sets `pending`, which the training loop looks at where the state is whole: after an optimizer step, or between batches of an
    evaluation. A second signal ends the process at once with 128 + its number; published checkpoints cannot be torn by that.

    A signal that was ignored when the run began (nohup, a shell's background job) stays ignored. In a thread that is not the main one
    nothing is installed.

        with SignalGuard(ranks=ranks) as guard:
            prepare()                              # a signal raises here
            with guard.hold():
                for batch in batches:
                    train_step(batch)
                    if signum := guard.agreed():   # the same answer on every rank
                        save()
                        guard.stop(signum)
    """

    def __init__(self, *, ranks: Ranks = ALONE) -> None:
        self.pending = 0
        self._ranks = ranks
        self._is_held = False
        self._first_s = 0.0
        self._earlier: dict[signal.Signals, Any] = {}
        self._is_first = own_rank() == 0  # of processes that a launcher signals all alike; one of them says it
        self._echo_s = _ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is not threading.main_thread():
            logger.debug("signal handlers can only be set in the main thread; signals keep their meaning")
            return self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            # None is a handler that was not set from Python, which cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._earlier.clear()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While this runs a first signal waits in `pending`; if it is still waiting at a regular end, `SignalStop` is raised then."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self.pending:
            self.stop(self.pending)

    @property
    def is_alone(self) -> bool:
        """Whether no other process has to agree."""
        return self._ranks.world_size == 1

    def agreed(self) -> int:
        """The signal that any rank has received, or 0. Every rank must call it at the same place; one small reduction."""
        return self._ranks.max([self.pending])[0]

    def stop(self, signum: int, saved: object = None) -> None:
        """Leave.

        Raises:
            SignalStop: with exit code 128 + signum.
        """
        self.pending = 0
        told = f": saved {saved}; the same command continues from there" if saved else ""
        raise SignalStop(signum, f"stopped by {signal.Signals(signum).name}{told}")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_s and now - self._first_s >= self._echo_s:
            self._say(b"second signal: leaving at once; published checkpoints are whole\n")
            # No clean-up: whoever asks twice may be waiting for a disk that does not answer, and so would a `finally`.
            os._exit(128 + signum)
        if self._first_s:
            return
        self._first_s = now
        if not self._is_held:
            self.stop(signum)
        self.pending = signum
        name = signal.Signals(signum).name.encode()
        self._say(name + b": saving after this step, then leaving; send it again to leave at once\n")

    def _say(self, text: bytes) -> None:
        if self._is_first:
            # Not print: the signal may have come amid a write to the same stream, and a buffered one refuses to be entered twice.
            os.write(2, text)
