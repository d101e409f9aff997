"""`orpo train` as a job of the zygote: the whole command, with something that happens to it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def train(config: str, *, out_of_memory_at: int | None = None, kill: str | None = None) -> None:
    """Run `orpo train CONFIG` and leave with its exit code.

    Args:
        config: the YAML file.
        out_of_memory_at: from this step on the process may take no more memory, and asks for some.
        kill: SIGKILL the process before the final weights get their "name", or when the run is to be called "complete".
    """
    from orpo.cli import main

    if out_of_memory_at is not None:
        _use_up_memory(out_of_memory_at)
    if kill == "name":
        _die_before_the_weights_have_their_name()
    if kill == "complete":
        _die_before_the_run_is_complete()
    code = main(["train", config])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _use_up_memory(step: int) -> None:
    """A real refusal of the system, met by torch's own allocator in the middle of a step."""
    import torch

    from orpo.training.trainer import ORPOTrainer

    real = ORPOTrainer.training_step

    def training_step(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        if trainer.state.global_step + 1 == step:
            num_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (num_bytes + 2**23, resource.RLIM_INFINITY))
            torch.ones(2**28)
        return real(trainer, *arguments, **keywords)

    ORPOTrainer.training_step = training_step


def _die_before_the_weights_have_their_name() -> None:
    real = os.rename

    def rename(source: Any, target: Any, **keywords: Any) -> None:
        if Path(target).name == "model":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **keywords)

    os.rename = rename


def _die_before_the_run_is_complete() -> None:
    from orpo.run.folder import COMPLETE, RunFolder

    real = RunFolder.write

    def write(folder: RunFolder, **facts: Any) -> None:
        if facts.get("status") == COMPLETE:
            os.kill(os.getpid(), signal.SIGKILL)
        real(folder, **facts)

    RunFolder.write = write
