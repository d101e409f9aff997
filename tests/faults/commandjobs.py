"""`orpo train` as a job of the zygote: the whole command, with something that happens to it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def train(
    config: str,
    *,
    out_of_memory_at: int | None = None,
    kill: str | None = None,
    signal_in: str | None = None,
    second_start: bool = False,
) -> None:
    """Run `orpo train CONFIG` and leave with its exit code.

    Args:
        config: the YAML file.
        out_of_memory_at: from this step on the process may take no more memory, and asks for some.
        kill: SIGKILL the process before the final weights get their "name", when the run is to be called "complete", or between the two
            renames that replace a checkpoint ("replaced").
        signal_in: SIGTERM to itself in the fourth "step", or in an "evaluation".
        second_start: start the same command once more, as a user would, while this one makes its final evaluation.
    """
    from orpo.cli import main

    if out_of_memory_at is not None:
        _use_up_memory(out_of_memory_at)
    if kill == "name":
        _die_before_the_weights_have_their_name()
    if kill == "complete":
        _die_before_the_run_is_complete()
    if kill == "replaced":
        _die_before_the_new_checkpoint_has_its_name()
    if signal_in is not None:
        _signal_in(signal_in)
    if second_start:
        _start_once_more(config)
    code = main(["train", config])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train_at_home(homes: list[str]) -> None:
    """Run `orpo train run.yaml` as a rank with a folder of its own, as on a machine of its own, and leave with the exit code."""
    from orpo.cli import main

    os.chdir(homes[int(os.environ["RANK"])])
    code = main(["train", "run.yaml"])
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


def _die_before_the_new_checkpoint_has_its_name() -> None:
    from orpo.system import files as fs

    real = fs.rename

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        if target.name.startswith(".replaced-checkpoint"):
            os.kill(os.getpid(), signal.SIGKILL)

    fs.rename = rename


def _signal_in(what: str) -> None:
    from orpo.training.trainer import ORPOTrainer

    name = {"step": "training_step", "evaluation": "_evaluate_microbatch"}[what]
    real = getattr(ORPOTrainer, name)

    def call(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        if what == "evaluation" or trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, *arguments, **keywords)

    setattr(ORPOTrainer, name, call)


def _start_once_more(config: str) -> None:
    from orpo.training.trainer import ORPOTrainer

    real = ORPOTrainer.evaluate

    def evaluate(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        found = real(trainer, *arguments, **keywords)
        ended = subprocess.run([sys.executable, "-m", "orpo", "train", config], capture_output=True, text=True, timeout=200)
        print(f"second start: {ended.returncode}\n{ended.stderr}", flush=True)
        return found

    ORPOTrainer.evaluate = evaluate
