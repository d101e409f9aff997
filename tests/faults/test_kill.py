"""Real kills of real runs.

SIGKILL in the stages of a save and at random moments, then the same run again to its end: weights, optimizer state and the lines of
metrics.jsonl must equal the uninterrupted run's, bit for bit. `make faults` runs the long version.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.forked import Finished, Zygote, marks, send
from orpo.checkpoint import find_newest, read_manifest

BY_EPOCH = {"logging_strategy": "epoch", "eval_strategy": "epoch", "eval_on_start": True, "load_best_model_at_end": False}
KINDS: dict[str, dict[str, Any]] = {
    "padded": {"engine": "padded"},
    "shared": {"engine": "shared"},
    "lora": {"engine": "shared", "lora": True},
    "bf16": {"engine": "shared", "options": {"bf16": True}},
    # Random numbers are drawn in every step.
    "dropout": {"engine": "padded", "lora": True, "options": {"disable_dropout": False}},
    # A save at the last step of an epoch, before what belongs to the epoch's end.
    "by epoch": {"engine": "padded", "options": BY_EPOCH},
}
NUM_SEEDS, NUM_KILLS = 8, 25
"""Kills at random moments in the long version: 200."""


@pytest.fixture(scope="module")
def reference(forks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """The uninterrupted run of a kind, made once."""
    made: dict[str, Finished] = {}

    def get(kind: str) -> Finished:
        if kind not in made:
            run = tmp_path_factory.mktemp("reference") / kind
            log = run.with_suffix(".log")
            began = time.monotonic()
            assert forks.run("train", log, run_dir=str(run), **KINDS[kind]) == 0, log.read_text()
            made[kind] = Finished(run, took_s=time.monotonic() - began)
        return made[kind]

    return get


def _finish(forks: Zygote, run: Path, kind: str, expected: Finished) -> None:
    """Run the same command to its end and compare."""
    log = run.with_suffix(".log")
    assert forks.run("train", log, run_dir=str(run), **KINDS[kind]) == 0, log.read_text()
    Finished(run).assert_equals(expected)
    left_over = [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert not left_over


def _kill_after(seconds: float) -> Callable[[int], None]:
    def kill(pid: int) -> None:
        time.sleep(seconds)
        send(pid, signal.SIGKILL)

    return kill


def _must_have_checkpoint(run: Path, log: Path) -> None:
    """Whatever was published stays: nothing before the last published checkpoint is lost."""
    newest = find_newest(run)
    steps = [int(line.split()[1]) for line in marks(log) if line.startswith("step ")]
    # The save after step 3k is over when the next step is done.
    published = [step for step in steps if step % 3 == 0 and step < max(steps)]
    if published:
        assert newest is not None
        assert read_manifest(newest).step >= max(published)


def _is_killed_at(number: int, forks: Zygote, run: Path, kind: str) -> bool:
    """Start the run, or go on with it, and kill it at its n-th file operation; False if it has fewer and has ended."""
    log = run.with_suffix(".log")
    status = forks.run("train", log, run_dir=str(run), kill_at=number, **KINDS[kind])
    if status == 0:
        return False
    assert status == -signal.SIGKILL, log.read_text()
    _must_have_checkpoint(run, log)
    return True


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("padded", [3, 30, 17]), ("shared", [41, 5, 2]), ("lora", [24, 11, 20]), ("bf16", [31, 14, 6]),
        pytest.param("padded", [30, 1, 25], marks=pytest.mark.slow), pytest.param("shared", [19, 8, 12], marks=pytest.mark.slow),
        pytest.param("dropout", [44, 9, 10], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_kills_in_the_stages_of_saves(
    kind: str, numbers: list[int], forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path
) -> None:
    """Each kill hits the run that goes on from the one before."""
    run = tmp_path / "run"
    assert all(_is_killed_at(number, forks, run, kind) for number in numbers)
    _finish(forks, run, kind, reference(kind))


def test_kill_between_the_last_step_of_an_epoch_and_its_end(forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    """The epoch's log and evaluation come before the save, or the resumed run, which begins with the next epoch, would lack them."""
    run, kind = tmp_path / "run", "by epoch"
    status = forks.run("train", run.with_suffix(".log"), run_dir=str(run), kill_after="checkpoint-6", **KINDS[kind])
    assert status == -signal.SIGKILL
    _finish(forks, run, kind, reference(kind))


@pytest.mark.parametrize("seed", [0, 1])
def test_three_kills_at_random_moments(seed: int, forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    kind = ["padded", "lora"][seed]
    run, took_s = tmp_path / "run", reference(kind).took_s
    chance = random.Random(seed)
    for _ in range(3):
        kill = _kill_after(took_s * chance.uniform(0.2, 0.6))
        forks.run("train", run.with_suffix(".log"), while_running=kill, run_dir=str(run), **KINDS[kind])
    _finish(forks, run, kind, reference(kind))


def test_two_resumes_within_an_epoch_see_the_batches_of_one_run(
    forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path
) -> None:
    """Killed after step 8 of an epoch that has steps 7 to 12, and again after step 10."""
    run = tmp_path / "run"
    settings = {**KINDS["padded"], "options": {"save_steps": 2}}
    for name in ("checkpoint-8", "checkpoint-10"):
        assert forks.run("train", run.with_suffix(".log"), run_dir=str(run), kill_after=name, **settings) == -signal.SIGKILL
    _finish(forks, run, "padded", reference("padded"))


def test_kill_after_the_last_save(forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    """No step is done twice, and what comes at the end (the final weights are written there) is made up."""
    run = tmp_path / "run"
    assert forks.run("train", run.with_suffix(".log"), run_dir=str(run), kill_after="checkpoint-14") == -signal.SIGKILL
    assert "train end" not in marks(run.with_suffix(".log"))
    _finish(forks, run, "padded", reference("padded"))
    assert marks(run.with_suffix(".log"))[-1] == "train end"
    assert "step 15" not in marks(run.with_suffix(".log"))


def test_resuming_a_finished_run_changes_nothing(forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        _finish(forks, run, "padded", reference("padded"))


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    log = run.with_suffix(".log")
    forks.run("train", log, run_dir=str(run), **KINDS["padded"])
    newest = find_newest(run)
    assert newest is not None
    weights = next(newest.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    log.unlink()
    _finish(forks, run, "padded", reference("padded"))
    assert "step 13" in marks(log)
    assert "checksum differs" in log.read_text()


# --- the long version; `-rP` shows what each of its tests counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(KINDS))
def test_kill_at_every_file_operation(kind: str, forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    num_kills = 0
    while _is_killed_at(num_kills + 1, forks, tmp_path / f"{num_kills}", kind):
        _finish(forks, tmp_path / f"{num_kills}", kind, reference(kind))
        shutil.rmtree(tmp_path / f"{num_kills}")
        num_kills += 1
    print(f"{kind}: {num_kills} kills, one at each file operation of the saves, each run then equal to the uninterrupted one")
    assert num_kills > 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_many_kills_at_random_moments(seed: int, forks: Zygote, reference: Callable[[str], Finished], tmp_path: Path) -> None:
    chance = random.Random(2024 + seed)
    outcomes: Counter[str] = Counter()
    num_runs = 0
    while outcomes.total() < NUM_KILLS:
        kind = list(KINDS)[num_runs % len(KINDS)]
        num_runs += 1
        run = tmp_path / f"{num_runs}"
        for _ in range(chance.randint(1, 3)):
            kill = _kill_after(reference(kind).took_s * chance.uniform(0.05, 0.95))
            if forks.run("train", run.with_suffix(".log"), while_running=kill, run_dir=str(run), **KINDS[kind]) == -signal.SIGKILL:
                outcomes[_state_after_kill(run)] += 1
        _must_have_checkpoint(run, run.with_suffix(".log"))
        _finish(forks, run, kind, reference(kind))
    told = ", ".join(f"{number} with {state}" for state, number in sorted(outcomes.items()))
    print(f"{outcomes.total()} kills at random moments of {num_runs} runs ({told}), each run then equal to the uninterrupted one")


def _state_after_kill(run: Path) -> str:
    """What a killed run left on the disk."""
    if any(run.glob(".staging-*")):
        return "a save under way"
    return "a checkpoint" if any(run.glob("checkpoint-*")) else "nothing saved yet"
