"""A user's Python function as a judge of answers: called in processes of its own, whatever it does there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo.errors import UserError

_CHILD = Path(__file__).with_name("checkchild.py")
START_S = 120.0
"""For the imports of the user's file."""
_LOOK_S = 0.5
GRACE_S = 10.0
"""Beyond the limit of a call: what the process that watches it may take. After that it is gone itself."""
_MOST_LINE = 4 << 20


@dataclass
class Verifier:
    """`file.py:function`, ready to be called.

    Attributes:
        spec: as the user wrote it.
        time_s, memory_mib: of one call.
        num_workers: calls at a time.
    """

    spec: str
    time_s: float = 5.0
    memory_mib: int = 1024
    num_workers: int = 2
    path: Path = field(init=False)
    function: str = field(init=False)

    def __post_init__(self) -> None:
        name, _, self.function = self.spec.rpartition(":")
        self.path = Path(name).expanduser()
        where = f"verify: {self.spec}"
        if not name or not self.function.isidentifier() or self.path.suffix != ".py":
            raise UserError(f"found {self.spec!r}", where="verify", expected="FILE.py:FUNCTION, such as checks.py:passed")
        if not self.path.is_file():
            raise UserError("there is no such file", where=where, mend=f"paths start at the current folder, {Path.cwd()}")
        if not hasattr(os, "fork"):
            raise UserError("a verifier needs a system that can fork (Linux, macOS)", where=where, mend="take another scorer here")
        if self.time_s <= 0 or self.memory_mib < 1:
            raise UserError("the limits of a call", where=where, expected="verify_time_s above 0, verify_memory_mib at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        """What its scores depend on: the file's content and the function's name."""
        return {"kind": "verify", "function": self.function, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def check(self) -> None:
        """Load the file once, so that what is wrong with it is told before anything is sampled.

        Raises:
            UserError: it cannot be loaded, or has no such function.
        """
        worker = _Worker(self)
        try:
            worker.start()
        finally:
            worker.kill()

    def call(self, requests: Sequence[dict[str, Any]], done: Callable[[int, dict[str, Any]], None]) -> None:
        """Call it on every request (`prompt`, `answer`, `row`); `done` gets each number with {"score": …} or {"failed": why}.

        Raises:
            UserError: its file cannot be loaded.
        """
        local = threading.local()
        workers: list[_Worker] = []
        lock, stopped = threading.Lock(), threading.Event()

        def one(number: int) -> None:
            if stopped.is_set():
                return
            if not hasattr(local, "worker"):
                local.worker = _Worker(self, stopped)
                workers.append(local.worker)
            outcome = local.worker.ask(requests[number])
            with lock:
                if not stopped.is_set():  # a call that our own end has cut short says nothing of the answer
                    done(number, outcome)

        pool = ThreadPoolExecutor(max_workers=min(self.num_workers, max(1, len(requests))))
        try:
            ended, _ = wait([pool.submit(one, number) for number in range(len(requests))], return_when=FIRST_EXCEPTION)
            for error in filter(None, (future.exception() for future in ended)):
                raise error
        finally:
            stopped.set()
            for worker in workers:  # a thread that waits for one sees its end
                worker.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            for worker in workers:
                worker.kill()


class _Worker:
    """One process that holds the user's file, and is started again when it dies."""

    def __init__(self, verifier: Verifier, stopped: threading.Event | None = None) -> None:
        self.verifier, self.stopped = verifier, stopped or threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self._left = b""
        self._is_ready = False
        self._starting = threading.Lock()

    def start(self) -> None:
        verifier = self.verifier
        command = [sys.executable, str(_CHILD), str(verifier.path), verifier.function, str(verifier.time_s), str(verifier.memory_mib)]
        # A group of its own: Ctrl-C is for us, and a kill reaches whatever it has started.
        with self._starting:
            if self.stopped.is_set():
                return
            self.process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
            )
        self._left, self._is_ready = b"", False
        said = self._line(START_S)
        if said is None or "ready" not in said:
            self.kill()
            reason = said["broken"] if said else f"its imports did not end within {START_S:g} s, or ended the process"
            raise UserError(f"cannot be loaded: {reason}", where=f"verify: {verifier.spec}", mend="mend the file; the same command goes on")
        self._is_ready = True

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            self.start()
        process = self.process
        if process is None or process.stdin is None:
            return {"failed": "stopped"}
        try:
            process.stdin.write((json.dumps(request) + "\n").encode())
            process.stdin.flush()
            outcome = self._line(self.verifier.time_s + GRACE_S)
        except (OSError, ValueError):
            outcome = None
        if outcome is None or not outcome.keys() & {"score", "failed"}:
            self.kill()  # a call that has killed the process it came from, or holds it up
            return {"failed": "it ended the process that called it"}
        return outcome

    def _line(self, seconds: float) -> dict[str, Any] | None:
        """The next line as JSON; None where there is none in time, or no JSON."""
        process = self.process
        if process is None or process.stdout is None:
            return None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                left = deadline - time.monotonic()
                if left <= 0 or self.stopped.is_set() or len(self._left) > _MOST_LINE:
                    return None
                # By pieces: what a call has left running may hold the pipe open after the process that is asked has been killed.
                if not selector.select(min(left, _LOOK_S)):
                    continue
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    return None
                self._left += part
        line, _, self._left = self._left.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            return None
        return said if isinstance(said, dict) else None

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if self._is_ready:  # asked first: it ends the call at work with all that this has started, which nobody else knows of
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def stop(self) -> None:
        """From another thread: end the process. Its pipes are left to the thread that waits at them, which a closed one never wakes."""
        with self._starting:
            process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM if self._is_ready else signal.SIGKILL)
