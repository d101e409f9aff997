"""A stage or an evaluation as a process of its own, and its end as an error of this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from orpo.errors import EXIT_GUARD, EXIT_USER, GuardStop, SignalStop, UserError

NUM_LOG_LINES = 12
"""Lines of a process's log that are shown when it fails."""


def run_stage_process(spec: Path, what: str, log: Path, num_processes: int = 1) -> None:
    """Run one stage to its end, its output in `log`.

    Args:
        num_processes: that do it together.

    Raises:
        UserError, GuardStop, SignalStop: the stage ended with that error.
    """
    raise_for(run_process([sys.executable, "-m", "orpo.compare.stage", str(spec), str(num_processes)], log), what, log)


def run_orpo_process(arguments: list[str], what: str, log: Path) -> None:
    """Run `orpo` with these arguments to its end; errors as for a stage."""
    raise_for(run_process([sys.executable, "-m", "orpo", *arguments], log), what, log)


def run_process(command: list[str], log: Path) -> int:
    """Run to its end with its output in a file; a signal to this process reaches it, and is waited for."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
    }
    with log.open("ab") as output:
        # A group of its own: Ctrl-C reaches this process alone, which then asks the stage to stop, once.
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, process_group=0
        )
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise


def raise_for(code: int, what: str, log: Path) -> None:
    """The error that a stage ended with, as this process's own."""
    if code == 0:
        return
    tail = "\n".join(f"    {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LOG_LINES:])
    text = f"{what} ended with exit code {code}:\n{tail}"
    if code == EXIT_GUARD:
        raise GuardStop(text)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SignalStop(code - 128, text)
    if code == EXIT_USER:
        raise UserError(text, where=str(log))
    if code == -signal.SIGKILL:
        raise UserError(
            f"{what} was killed from outside, as Linux does with a process that takes more memory than there is:\n{tail}",
            where=str(log),
            mend="lower max_tokens_per_microbatch (it changes no result), or max_length; the same command goes on from there",
        )
    raise RuntimeError(f"{text}\n(all of it: {log})")
