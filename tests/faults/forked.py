"""Start, signal and await jobs that run in children of the zygote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orpo
from faults.jobs import metrics

TESTS = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm012345"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(orpo.__file__).parents[1]), str(TESTS)]),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    # Looked for in what a run writes (tests/security/test_run_folder.py).
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": TOKEN,
    "AWS_SECRET_ACCESS_KEY": TOKEN,
}


class Exit(NamedTuple):
    """How a process ended."""

    status: int


def send(pid: int, number: int) -> None:
    """Signal a job that may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Whether a job still runs; the zygote takes note of its end at once."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def await_text(pid: int, what: Callable[[], bool]) -> None:
    """Wait until it is so, or the job has ended; a test that waits in vain is ended by its own limit."""
    while not what() and is_alive(pid):
        time.sleep(0.005)


def marks(log: Path) -> list[str]:
    """What a job has marked so far (`faults.jobs.mark`), whole lines only."""
    path = Path(f"{log}.marks")
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def last_step(log: Path) -> int:
    """The last step that a job has ended, 0 for none."""
    return max((int(line.split()[1]) for line in marks(log) if line.startswith("step ")), default=0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Zygote:
    """Client of `faults.zygote`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=TESTS
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote died"
        return json.loads(line)

    def run(self, job: str, log: Path, *, while_running: Callable[[int], None] | None = None, **arguments: Any) -> int:
        """Run a job to its end; its exit code, or minus the number of the signal that killed it.

        Args:
            job: a function of `faults.jobs`, or "module:function" of another module in `tests`.
            log: where its output goes.
            while_running: called with its pid while it runs.
        """
        act = None if while_running is None else lambda pids: while_running(pids[0])
        return self.run_ranks(job, [log], while_running=act, **arguments)[0].status

    def run_ranks(
        self, job: str, logs: list[Path], *, while_running: Callable[[list[int]], None] | None = None, **arguments: Any
    ) -> list[Exit]:
        """Run a job as several ranks over gloo, one per log; their ends in rank order."""
        for log in logs:  # marks are those of this run; a log grows, as a user's does
            Path(f"{log}.marks").unlink(missing_ok=True)
        command = {"job": job, "logs": [str(log) for log in logs], "port": _free_port(), "arguments": arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        pids = self._read()["pids"]
        try:
            if while_running is not None:
                while_running(pids)
        finally:  # or the next command would read this one's exits
            exits = self._read()["exits"]
        return [Exit(status) for _, status in sorted(exits)]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(300)  # at once, unless the machine is very busy


class Finished:
    """What a run left: digests of its weights and optimizer, and its metrics; how long it took, where that was measured."""

    def __init__(self, run: Path, *, took_s: float = 0.0) -> None:
        self.run, self.took_s = run, took_s
        self.digests: dict[str, str] = json.loads((run / "final.json").read_text())
        # The Trainer's last line is about the process (its mean loss since it started), not about the run.
        self.metrics = [line for line in metrics(run) if "train_loss" not in line]

    def assert_equals(self, uninterrupted: Finished) -> None:
        """The same bits; a run that was complete when it was started again has no optimizer to compare."""
        assert set(self.digests) == set(uninterrupted.digests) or not any(name.startswith("optimizer") for name in self.digests)
        assert self.digests.items() <= uninterrupted.digests.items()
        assert self.metrics == uninterrupted.metrics


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A zygote for the time of a test session."""
    process = Zygote()
    try:
        yield process
    finally:
        process.close()
