"""Two processes over gloo, on a tiny model."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from faults import jobs
from faults.forked import Exit, Finished, Zygote, await_text, last_step, marks, send
from orpo.checkpoint import find_newest, read_manifest, verify

SLOW = pytest.mark.slow

pytestmark = pytest.mark.distributed


class Pair:
    """A run of two ranks in a folder."""

    def __init__(self, forks: Zygote, folder: Path) -> None:
        self._forks = forks
        self.run = folder / "run"
        self.logs = [folder / "rank-0.log", folder / "rank-1.log"]

    def train(self, *, act: Callable[[list[int]], None] | None = None, **arguments: Any) -> list[Exit]:
        for log in self.logs:
            log.unlink(missing_ok=True)
        return self._forks.run_ranks("train", self.logs, while_running=act, run_dir=str(self.run), **arguments)

    def finish(self, uninterrupted: Finished) -> None:
        assert [end.status for end in self.train()] == [0, 0], self.text()
        Finished(self.run).assert_equals(uninterrupted)

    def text(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text() if log.exists() else "" for log in logs)

    def step(self) -> int:
        newest = find_newest(self.run)
        return 0 if newest is None else read_manifest(newest).step

    def last_step(self, rank: int) -> int:
        return last_step(self.logs[rank])

    def signal_at(self, line: str, rank: int, number: int) -> Callable[[list[int]], None]:
        """Signal one rank as soon as it has marked a line."""

        def act(pids: list[int]) -> None:
            await_text(pids[rank], lambda: line in marks(self.logs[rank]))
            send(pids[rank], number)

        return act


@pytest.fixture
def pair(forks: Zygote, tmp_path: Path) -> Pair:
    return Pair(forks, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(forks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    pair = Pair(forks, tmp_path_factory.mktemp("reference"))
    assert [end.status for end in pair.train()] == [0, 0], pair.text()
    return Finished(pair.run)


@pytest.mark.parametrize(
    ("line", "rank"), [("step 5", 0), ("saving", 1), pytest.param("step 5", 1, marks=SLOW), pytest.param("saving", 0, marks=SLOW)]
)
def test_a_killed_rank_takes_the_others_along_and_nothing_is_half_published(
    line: str, rank: int, pair: Pair, uninterrupted: Finished
) -> None:
    """A rank that is killed: the others leave in time, and nothing half-published stays."""
    ends = pair.train(act=pair.signal_at(line, rank, signal.SIGKILL), slow_save_s=0.05 if line == "saving" else 0.0)
    assert ends[rank].status == -signal.SIGKILL
    assert ends[1 - rank].status == 1
    assert "lost contact with another process" in pair.text(1 - rank)
    assert "Traceback" not in pair.text(1 - rank)
    assert pair.step() == (0 if line == "saving" else 3)
    for path in pair.run.glob("checkpoint-*"):
        verify(path)
    pair.finish(uninterrupted)


def test_a_rank_killed_before_the_run_has_begun_is_told_without_a_traceback(forks: Zygote, pair: Pair) -> None:
    ends = forks.run_ranks("leave_at_the_start", pair.logs)
    assert [end.status for end in ends] == [1, -signal.SIGKILL]
    assert "LostContactError: rank 0 lost contact with another process" in pair.text(0)
    assert "Traceback" not in pair.text(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_is_told_once(rank: int, pair: Pair) -> None:
    """An exception on one rank: the others leave, and the first cause is told once."""
    ends = pair.train(trouble="exception", trouble_rank=rank)
    assert [end.status for end in ends] == [1, 1]
    assert pair.text(rank).count("Traceback") == 1
    assert "Traceback" not in pair.text(1 - rank)
    assert f"stops because rank {rank} failed first: ArithmeticError: the trouble of this rank alone" in pair.text(1 - rank)
    assert pair.step() == 3


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=SLOW)])
def test_a_rank_that_cannot_save_stops_all_and_nothing_is_published(rank: int, pair: Pair, uninterrupted: Finished) -> None:
    """A failure inside the save, where ranks wait for each other."""
    ends = pair.train(trouble="full disk", trouble_rank=rank)
    assert ends[rank].status == 2
    assert "no room for the checkpoint" in pair.text(rank)
    assert f"rank {rank} failed first" in pair.text(1 - rank)
    assert "Traceback" not in pair.text()
    assert sorted(path.name for path in pair.run.iterdir() if "checkpoint" in path.name) == ["checkpoint-3"]
    pair.finish(uninterrupted)


@pytest.mark.parametrize("trouble", ["nan weight", "inf gradient"])
def test_bad_numbers_on_one_rank_stop_both_before_the_step(trouble: str, pair: Pair) -> None:
    """Gradients are averaged, so both have it; a loss is this rank's own."""
    ends = pair.train(trouble=trouble, trouble_rank=1)
    assert [end.status for end in ends] == [3, 3], pair.text()
    stops = [next(line for line in pair.text(rank).splitlines() if "GuardStop" in line) for rank in range(2)]
    assert stops[0] == stops[1]
    assert "GuardStop: step 5" in stops[0]
    assert pair.step() == 3


def test_uneven_rows_neither_hang_nor_count_twice(forks: Zygote, pair: Pair, tmp_path: Path) -> None:
    assert_uneven_rows_count_once(forks, pair, tmp_path / "alone")


def assert_uneven_rows_count_once(forks: Zygote, pair: Pair, alone: Path) -> None:
    """11 rows in steps of 8 and an evaluation of 5, on two ranks and on one with the same rows per step."""
    options = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1}
    assert [end.status for end in pair.train(num_rows=11, options=options)] == [0, 0], pair.text()
    log = alone.with_suffix(".log")
    assert forks.run("train", log, run_dir=str(alone), num_rows=11, options={**options, "gradient_accumulation_steps": 4}) == 0
    two, one = jobs.metrics(pair.run), jobs.metrics(alone)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for left, right in zip(two, one, strict=True):
        assert left.keys() == right.keys()
        same = {key: value for key, value in right.items() if key not in ("total_flos", "train_loss")}
        assert {key: left[key] for key in same} == pytest.approx(same, rel=2e-4, abs=1e-5)


def test_only_rank_0_publishes_and_only_when_all_have_written(pair: Pair) -> None:
    """Only rank 0 publishes, after all have written."""
    options = {"max_steps": 3}
    assert [end.status for end in pair.train(trouble="late", trouble_rank=1, options=options)] == [0, 0], pair.text()
    manifest = verify(pair.run / "checkpoint-3")
    assert manifest.world_size == 2
    assert {"rng-0.json", "rng-1.json", "optimizer.safetensors"} <= set(manifest.files)


def test_rank_1_makes_no_name_final(pair: Pair) -> None:
    """Only rank 0 publishes, after all have written."""
    assert [end.status for end in pair.train(trouble="cannot publish", trouble_rank=1, options={"max_steps": 3})] == [0, 0], pair.text()


def _resume_on(forks: Zygote, run: Path, num_ranks: int, **arguments: Any) -> str:
    """Go on with a run on so many ranks; what they said."""
    logs = [run.with_name(f"{run.name}-on-{num_ranks}-{rank}.log") for rank in range(num_ranks)]
    ends = forks.run_ranks("train", logs, run_dir=str(run), **arguments)
    text = "\n".join(log.read_text() for log in logs)
    assert [end.status for end in ends] == [0] * num_ranks, text
    return text


@pytest.mark.parametrize("num_ranks", [1, 3, pytest.param(2, marks=SLOW)])
def test_any_number_of_processes_goes_on_with_the_rows_of_the_first_start(
    num_ranks: int, forks: Zygote, pair: Pair, uninterrupted: Finished
) -> None:
    """Eight rows a step, also where three ranks share them, and a log in whose middle the number of ranks changed."""
    pair.train(trouble="exception")
    assert pair.step() == 3
    text = _resume_on(forks, pair.run, num_ranks)
    assert ("written by 2 processes, now there are" in text) == (num_ranks != 2)
    assert read_manifest(pair.run / "checkpoint-14").facts["rows_per_step"] == 8
    lines = [line for line in jobs.metrics(pair.run) if "train_loss" not in line]
    assert [line["step"] for line in lines] == [line["step"] for line in uninterrupted.metrics]
    for found, expected in zip(lines, uninterrupted.metrics, strict=True):
        same = {key: value for key, value in expected.items() if key != "total_flos"}
        assert {key: found[key] for key in same} == pytest.approx(same, rel=1e-4, abs=1e-5)
    found, expected = (load_file(run / "checkpoint-14" / "model.safetensors") for run in (pair.run, uninterrupted.run))
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 2e-6


def test_other_rows_of_a_step_are_refused_unless_allowed(forks: Zygote, pair: Pair, tmp_path: Path) -> None:
    """Batch and accumulation may change as long as the rows of a step are the same; how they are dealt changes rounding alone."""
    pair.train(trouble="exception")
    log = tmp_path / "alone.log"
    assert forks.run("train", log, run_dir=str(pair.run), options={"gradient_accumulation_steps": 3}) == 2
    assert "config.gradient_accumulation_steps: 2 -> 3\n    rows_per_step: 8 -> 6" in log.read_text()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 5}
    text = _resume_on(forks, pair.run, 1, options={**options, "lr_scheduler_type": "constant", "allow_changed_resume": True})
    assert "config.lr_scheduler_type" in text
    assert "rows_per_step" not in text


@pytest.mark.parametrize(
    ("line", "rank", "options"),
    [
        ("step 4", 1, {}),
        ("evaluating", 0, {"slow_eval_s": 0.05}),
        ("saving", 0, {"slow_save_s": 0.02}),
        pytest.param("step 4", 0, {}, marks=SLOW),
        pytest.param("evaluating", 1, {"slow_eval_s": 0.05}, marks=SLOW),
        pytest.param("saving", 1, {"slow_save_s": 0.02}, marks=SLOW),
    ],
)
def test_sigterm_on_one_rank_stops_all_at_one_step(
    line: str, rank: int, options: dict[str, Any], pair: Pair, uninterrupted: Finished
) -> None:
    """SIGTERM on one rank stops all at one step."""
    line = "step 3" if line == "saving" and rank == 1 else line
    ends = pair.train(act=pair.signal_at(line, rank, signal.SIGTERM), **options)
    assert [end.status for end in ends] == [143, 143], pair.text()
    assert pair.last_step(0) == pair.last_step(1) == pair.step()
    pair.finish(uninterrupted)
