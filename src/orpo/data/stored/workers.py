"""Chunks of rows tokenised by several processes, in order.

The processes are forks: the tokenizer and the probed template are there at once, and a script needs no guard around its main part. Each
gets its chunks through a pipe of its own, and sends back what is ready for a file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from orpo.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING_PER_WORKER = 2
"""Tasks that a process has at a time: one that it works on, one that waits for it."""


def can_fork() -> bool:
    """Whether this system starts processes as copies; macOS can, and its libraries do not stand it."""
    return sys.platform.startswith("linux")


def map_in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], num_processes: int) -> Iterator[Result]:
    """`work` on every task, results in the order of the tasks; only a few tasks are taken ahead.

    What `work` raises is raised here: the task is done once more by this process.

    Raises:
        UserError: a process was killed.
    """
    workers = [_Worker(work) for _ in range(num_processes)]
    due: deque[tuple[_Worker, Task]] = deque()
    try:
        for number, task in enumerate(tasks):
            worker = workers[number % num_processes]
            while worker.num_waiting >= _WAITING_PER_WORKER:
                yield _result(*due.popleft(), work)
            worker.send(task)
            due.append((worker, task))
        while due:
            yield _result(*due.popleft(), work)
    finally:
        for worker in workers:
            worker.end()


def _result(worker: _Worker, task: Task, work: Callable[[Task], Result]) -> Result:
    is_done, result = worker.receive()
    return result if is_done else work(task)


class _Worker:
    """A forked process, seen from outside."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.num_waiting = 0
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, theirs, self._pipe), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, task: Any) -> None:
        try:
            self._pipe.send(task)
        except OSError:
            raise self._killed() from None
        self.num_waiting += 1

    def receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except (EOFError, OSError):
            raise self._killed() from None
        self.num_waiting -= 1
        return found

    def _killed(self) -> UserError:
        self._process.join(timeout=5)
        return UserError(
            f"a process that tokenises rows has ended (exit code {self._process.exitcode})",
            where="dataset_num_proc",
            mend="fewer processes need less memory: lower dataset_num_proc",
        )

    def end(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(work: Callable[[Any], Any], pipe: Connection, parents_end: Connection) -> None:
    """What a process does: one task after the other, until nobody sends any or the parent is gone."""
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says what becomes of it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tasks: SimpleQueue[Any] = SimpleQueue()
    # A thread takes tasks from the pipe, so that neither side waits for the other to read while it writes.
    threading.Thread(target=_take_tasks, args=(pipe, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        try:
            result = (True, work(task))
        except Exception:  # told by the parent, which does the task once more
            result = (False, None)
        with suppress(OSError):
            pipe.send(result)


def _take_tasks(pipe: Connection, tasks: SimpleQueue[Any]) -> None:
    # Brothers hold copies of the pipe's other end, so that its end alone does not tell of the parent's.
    parent = multiprocessing.parent_process()
    with suppress(EOFError, OSError):
        while parent is not None and pipe in wait([pipe, parent.sentinel]):
            tasks.put(pipe.recv())
    tasks.put(None)
