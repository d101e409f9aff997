"""SIGKILL of one process of a run of several, or of all: at random moments, while it loads, inside saves and while one is published.

The run goes on until it ends. Started with two processes each time it ends as the uninterrupted run, bit for bit; with other numbers of
processes in between, or from one kind of parallelism to another, to rounding. `make faults` does all of it, more than a hundred kills; with
`-s` each case says what it struck.
"""

from __future__ import annotations

import importlib.util
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults import jobs
from faults.forked import Finished, Zygote, is_alive, marks, send
from orpo.checkpoint import find_newest, list_checkpoints, read_manifest, verify
from orpo.checkpoint.sharded import saved_weights
from orpo.system.parts import has_weights_in_parts, read_parts
from tinymodels import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

ROWS_PER_STEP, NUM_STEPS = 6, 14
NUM_SEEDS, MOST_KILLS = 8, 5
"""Runs of a kind, and how often one is killed before it may end."""
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
KINDS = ["ddp", "fsdp2", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO), "mixed"]
"""Of parallelism; mixed: another one at each start."""
EACH = ["ddp", "fsdp2", *(["zero2", "zero3"] if HAS_DEEPSPEED else [])]
STAGES = {"loading": "load", "training": "step", "saved": "step", "saving": "save", "publishing": "publish", "train end": "end"}
"""What a process does behind a mark. A step takes evaluation and log with it, "publish" pruning."""


def log_of(run: Path, rank: int) -> Path:
    return run.with_name(f"{run.name}-{rank}.log")


def start(
    forks: Zygote, run: Path, kind: str, num_ranks: int, act: Callable[[list[int]], None] | None = None, **arguments: Any
) -> list[int]:
    """Start the run, or go on with it, on so many ranks; how they ended."""
    logs = [log_of(run, rank) for rank in range(num_ranks)]
    for old in run.parent.glob(f"{run.name}-*.log*"):
        old.unlink()
    options = {
        "parallelism": kind if num_ranks > 1 else "auto",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS_PER_STEP // num_ranks,
        "logging_steps": 1,
    }
    arguments |= {"run_dir": str(run), "options": options, "tells_stages": True}
    if num_ranks == 1:
        return [forks.run("train", logs[0], while_running=None if act is None else lambda pid: act([pid]), **arguments)]
    return [end.status for end in forks.run_ranks("train", logs, while_running=act, **arguments)]


def told(run: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(run.parent.glob(f"{run.name}-*.log")))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint of a run, which one process may have written whole."""
    newest = find_newest(run)
    assert newest is not None
    if not has_weights_in_parts(newest):
        return load_file(newest / "model.safetensors")
    found = {name: torch.zeros_like(weight) for name, weight in saved_weights(build_tiny_model("llama", num_layers=2)).items()}
    read_parts(found, newest)
    return found


@pytest.fixture(scope="module")
def reference(forks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """The uninterrupted run of a kind on two ranks, made once."""
    made: dict[str, Finished] = {}

    def get(kind: str) -> Finished:
        kind = "fsdp2" if kind == "mixed" else kind
        if kind not in made:
            run = tmp_path_factory.mktemp("reference") / kind
            began = time.monotonic()
            assert start(forks, run, kind, 2) == [0, 0], told(run)
            made[kind] = Finished(run, took_s=time.monotonic() - began)
        return made[kind]

    return get


def stage_of(run: Path, rank: int) -> str:
    """What a rank does: start, load, step, save, publish or end."""
    last = (marks(log_of(run, rank)) or ["start"])[-1]
    return "start" if last == "start" else STAGES.get(last, "step")


class Killer:
    """Kills one rank, or all, when it has come to a moment."""

    def __init__(self, chance: random.Random, run: Path, took_s: float) -> None:
        self._chance, self._run = chance, run
        self.moment = chance.choice(["any", "any", "load" if list_checkpoints(run) else "any", "save", "save", "publish"])
        self._delay_s = chance.uniform(0.0, 1.0) * took_s if self.moment == "any" else chance.uniform(0.0, 0.3)
        self._num_saves = chance.choice([0, 0, 1, 2])
        self.struck = ""

    @property
    def slowness(self) -> dict[str, float]:
        return {"save": {"slow_save_s": 0.03}, "publish": {"slow_publish_s": 0.1}}.get(self.moment, {})

    def _has_come(self) -> bool:
        found = marks(log_of(self._run, 0))
        is_late = self.moment == "load" or found.count("saved") >= self._num_saves
        return is_late and stage_of(self._run, 0) == self.moment

    def __call__(self, pids: list[int]) -> None:
        while self.moment != "any" and not self._has_come() and all(map(is_alive, pids)):
            time.sleep(0.005)
        time.sleep(self._delay_s)
        chosen = list(range(len(pids))) if self._chance.random() < 0.3 else [self._chance.randrange(len(pids))]
        if all(is_alive(pids[rank]) for rank in chosen):
            self.struck = f"{'all' if len(chosen) > 1 or len(pids) == 1 else 'one'} in {stage_of(self._run, chosen[0])}"
        for rank in chosen:
            send(pids[rank], signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_killed_ranks(seed: int, kind: str, forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    """The even seeds start it with two processes each time, the odd ones with one to three."""
    chance = random.Random(f"{kind} {seed}")
    run, is_exact = tmp_path / "run", kind != "mixed" and seed % 2 == 0
    struck: list[str] = []
    is_over = False
    while len(struck) < MOST_KILLS and not is_over:
        killer = Killer(chance, run, reference(kind).took_s)
        now, num_ranks = chance.choice(EACH) if kind == "mixed" else kind, 2 if is_exact else chance.choice([1, 2, 3])
        ends = start(forks, run, now, num_ranks, killer, **killer.slowness)
        _assert_left_in_order(run, ends)
        is_over = not any(ends)
        struck += [] if is_over else [f"{now} x{num_ranks}: {killer.struck}"]
    if not is_over:
        assert start(forks, run, "fsdp2" if kind == "mixed" else kind, 2) == [0, 0], told(run)
    _assert_ended_as(run, reference(kind), is_exact=is_exact)
    print(f"KILLS {kind} {seed} ({len(struck)}): {'; '.join(struck)}")


def _assert_left_in_order(run: Path, ends: list[int]) -> None:
    """Whoever was not killed has ended by itself and says what happened; what is published is whole."""
    assert set(ends) <= {0, 1, 2, -signal.SIGKILL}, told(run)
    for rank in (rank for rank, end in enumerate(ends) if end in (1, 2)):
        text = log_of(run, rank).read_text()
        assert ("lost contact with another process" if ends[rank] == 1 else "processes met") in text, told(run)
        assert "Traceback" not in text, told(run)
    for checkpoint in list_checkpoints(run):
        verify(checkpoint)


def _assert_ended_as(run: Path, uninterrupted: Finished, *, is_exact: bool) -> None:
    left_over = [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert not left_over
    if is_exact:
        Finished(run).assert_equals(uninterrupted)
        return
    lines, expected = ([line for line in jobs.metrics(folder) if "train_loss" not in line] for folder in (run, uninterrupted.run))
    assert [line["step"] for line in lines] == [line["step"] for line in expected], "a line lost, or twice"
    for found, line in zip(lines, expected, strict=True):
        same = {key: value for key, value in line.items() if key != "total_flos"}
        assert {key: found[key] for key in same} == pytest.approx(same, rel=1e-4, abs=1e-5)
    newest = find_newest(run)
    assert newest is not None
    assert read_manifest(newest).step == NUM_STEPS
    found_weights, expected_weights = weights(run), weights(uninterrupted.run)
    assert max(float((found_weights[name] - expected_weights[name]).abs().max()) for name in expected_weights) < 2e-6
