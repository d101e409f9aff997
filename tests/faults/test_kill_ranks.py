"""SIGKILL of one process of a sharded run, or of all, at random moments and inside saves; the run goes on with any number of processes.

With the same number of processes all along the end equals the uninterrupted run's bit for bit, with others to rounding. The long version
kills a hundred times; its seeds are in its test ids.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults import jobs
from faults.forked import Finished, Zygote, marks, send
from orpo.checkpoint import find_newest, list_checkpoints, read_manifest, verify
from orpo.checkpoint.sharded import saved_weights
from orpo.system.parts import has_weights_in_parts, read_parts
from tinymodels import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3600)]

ROWS_PER_STEP = 6
NUM_SEEDS, NUM_CHAINS, NUM_KILLS = 5, 4, 5
"""A chain is a run that is killed so often before it may end: 100 kills in all."""


def start(forks: Zygote, run: Path, num_ranks: int, act: Callable[[list[int]], None] | None = None, **arguments: Any) -> list[int]:
    """Start the run, or go on with it, on so many ranks; how they ended."""
    logs = [run.with_name(f"{run.name}-{rank}.log") for rank in range(num_ranks)]
    for log in logs:
        log.unlink(missing_ok=True)
        Path(f"{log}.marks").unlink(missing_ok=True)
    options = {
        "parallelism": "fsdp2" if num_ranks > 1 else "auto",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS_PER_STEP // num_ranks,
        "logging_steps": 1,
    }
    if num_ranks == 1:
        while_running = None if act is None else lambda pid: act([pid])
        return [forks.run("train", logs[0], while_running=while_running, run_dir=str(run), options=options, **arguments)]
    ends = forks.run_ranks("train", logs, while_running=act, run_dir=str(run), options=options, **arguments)
    return [end.status for end in ends]


def told(run: Path) -> str:
    return "\n".join(log.read_text() for log in sorted(run.parent.glob(f"{run.name}-*.log")))


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
def uninterrupted(forks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run = tmp_path_factory.mktemp("reference") / "run"
    began = time.monotonic()
    assert start(forks, run, 2) == [0, 0], told(run)
    return Finished(run, took_s=time.monotonic() - began)


def killer(chance: random.Random, run: Path, took_s: float, is_inside_a_save: bool) -> Callable[[list[int]], None]:
    """Kills one rank or all."""
    is_all, delay_s = chance.random() < 0.3, chance.uniform(0.2, 1.0) * took_s
    after_s = chance.uniform(0.0, 0.4)

    def act(pids: list[int]) -> None:
        log = run.with_name(f"{run.name}-0.log")
        end = time.monotonic() + (60 if is_inside_a_save else delay_s)
        while time.monotonic() < end and not (is_inside_a_save and "saving" in marks(log)):
            time.sleep(0.005)
        time.sleep(after_s if is_inside_a_save else 0)
        for pid in pids if is_all else [chance.choice(pids)]:
            send(pid, signal.SIGKILL)

    return act


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_hundred_kills_of_one_rank_or_all(seed: int, forks: Zygote, uninterrupted: Finished, tmp_path: Path) -> None:
    chance = random.Random(7_000 + seed)
    outcomes: Counter[str] = Counter()
    for chain in range(NUM_CHAINS):
        run, is_same_number = tmp_path / f"run{chain}", chain == 0
        num_kills = 0
        while num_kills < NUM_KILLS:
            num_ranks = 2 if is_same_number else chance.choice([1, 2, 3])
            is_inside = chance.random() < 0.5
            act = killer(chance, run, uninterrupted.took_s, is_inside)
            ends = start(forks, run, num_ranks, act, slow_save_s=0.05 if is_inside else 0.0)
            num_kills += 1
            outcomes["ended before" if not any(ends) else "inside a save" if is_inside else "at a random moment"] += 1
            assert set(ends) <= {0, 1, -signal.SIGKILL}, told(run)
            for checkpoint in list_checkpoints(run):
                verify(checkpoint)
        assert start(forks, run, 2) == [0, 0], told(run)
        _assert_ended_as(run, uninterrupted, is_exact=is_same_number)
    print(f"seed {seed}: {dict(outcomes)}")


def _assert_ended_as(run: Path, uninterrupted: Finished, *, is_exact: bool) -> None:
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
    assert read_manifest(newest).step == 14
    found_weights, expected_weights = weights(run), weights(uninterrupted.run)
    assert max(float((found_weights[name] - expected_weights[name]).abs().max()) for name in expected_weights) < 2e-6
    left_over = [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert not left_over
