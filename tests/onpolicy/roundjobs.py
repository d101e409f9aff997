"""`orpo train` with rounds as a job of the zygote, killed when it is about to write a file."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any


def train(config: str, *, rounds: int = 2, die_at: str | None = None, time: int = 1) -> None:
    """Run `orpo train CONFIG --rounds N` and leave with its exit code.

    Args:
        die_at: the process is killed when a file or folder of this name is to be opened, appended to or put in place for the n-th time.
        time: that n.
    """
    from orpo.cli import main

    if die_at is not None:
        _die_at(die_at, time)
    code = main(["train", config, "--rounds", str(rounds)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_at(name: str, time: int) -> None:
    count = 0

    def meets(path: Any) -> None:
        nonlocal count
        if isinstance(path, str | os.PathLike) and Path(path).name == name:
            count += 1
            if count == time:
                os.kill(os.getpid(), signal.SIGKILL)

    real_open, real_replace, real_rename = os.open, os.replace, os.rename

    def open_(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & os.O_WRONLY:
            meets(path)
        return real_open(path, flags, *arguments, **keywords)

    def replace(source: Any, target: Any, **keywords: Any) -> None:
        meets(target)
        real_replace(source, target, **keywords)

    def rename(source: Any, target: Any, **keywords: Any) -> None:
        meets(target)
        real_rename(source, target, **keywords)

    os.open, os.replace, os.rename = open_, replace, rename  # type: ignore[assignment]
