"""`orpo check` and then `orpo train` on one configuration, or `orpo train` alone, as a job of the zygote."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

BUDGET_S = 400
"""After which a configuration counts as hanging; a tiny run takes a few seconds, on a busy machine many."""


def agree(config: str, outcome: str) -> None:
    """Write the exit codes of both commands; that of `train` is null where `check` refuses.

    Args:
        config: the YAML file.
        outcome: the JSON file to write.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(BUDGET_S)
    os.chdir(Path(config).parent)  # whatever a value names relative to here stays here
    codes: dict[str, int | None] = {"check": _call("check", config), "train": None}
    if codes["check"] == 0:
        codes["train"] = _call("train", config)
    Path(outcome).write_text(json.dumps(codes))
    os._exit(0)


def train(config: str, outcome: str) -> None:
    """Write the exit code of `orpo train` on a configuration, as `agree` does."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(BUDGET_S)
    os.chdir(Path(config).parent)
    Path(outcome).write_text(json.dumps(_call("train", config)))
    os._exit(0)


def _call(command: str, config: str) -> int:
    from orpo.cli import main

    print(f"\n== {command}", flush=True)
    try:
        code = main([command, config])
    except BaseException:  # what the command line lets through is a failure of its own
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"not done after {BUDGET_S} s")
