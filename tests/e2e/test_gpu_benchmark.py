"""The benchmark for a GPU, tried on a CPU with tiny shapes: every way out of an arm, the results as they grow, table and figure.

What it does with the minutes that it is given is tried on a clock that only moves when an arm says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
GOALS = ("Qwen2.5-3B, HH", "Qwen2.5-3B, long prompt", "Qwen2.5-3B, UltraFeedback")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu

        yield gpu


def test_a_dry_run_fills_the_table(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("TRL", "orpo, sdpa", "Liger's fused ORPO loss", "orpo, flex", "orpo, padded")
    monkeypatch.setattr(gpu, "ARMS", tuple(arm for arm in gpu.ARMS if arm.name in wanted))
    assert gpu.main(["--dry", "--minutes", "3", "--cells", "1", "--no-trace", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    arms = results["cells"]["Qwen2.5-3B, HH"]
    assert list(arms) == list(wanted)
    for name in ("TRL", "orpo, sdpa", "orpo, padded"):
        assert len(arms[name]["timed"]["seconds"]) == 2
        assert arms[name]["pairs_per_s"] > 0
        assert not arms[name]["is_estimate"]
        assert 0 < arms[name]["share_of_matmul"] < 1
    assert "trains on cuda alone" in arms["orpo, flex"]["cannot"]
    assert "cannot" in arms["Liger's fused ORPO loss"]
    told = capsys.readouterr().out
    assert told.strip() == (tmp_path / "gpu.txt").read_text().strip()
    assert "nothing here says anything of a GPU" in told
    assert "(goal 2.5)" in told
    assert (tmp_path / "gpu.svg").read_text().count("<rect") == 3


def test_without_time_everything_is_named_and_nothing_run(gpu: Any, tmp_path: Path) -> None:
    assert gpu.main(["--dry", "--minutes", "0", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "gpu.txt").read_text()
    assert table.count("no time left") == len(gpu.CELLS) * len(gpu.ARMS) == 8 * 10


def test_an_arm_that_fails_costs_the_others_nothing(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(type(gpu.ARMS[0])):
        def build(self, cell: Any) -> Any:
            raise RuntimeError("no kernel image is available")

    sound = next(arm for arm in gpu.ARMS if arm.name == "orpo, sdpa")
    monkeypatch.setattr(gpu, "ARMS", (Broken("broken", "ours"), sound))
    assert gpu.main(["--dry", "--minutes", "3", "--cells", "1", "--no-trace", "--out", str(tmp_path)]) == 1, "a dry run is a test"
    arms = json.loads((tmp_path / "gpu.json").read_text())["cells"]["Qwen2.5-3B, HH"]
    assert arms["broken"]["failed"] == "RuntimeError: no kernel image is available"
    assert arms["orpo, sdpa"]["pairs_per_s"] > 0


def test_what_was_not_measured_in_turns_is_told_apart(gpu: Any) -> None:
    import gpu_table

    def arm(rate: float, is_later: bool = False) -> dict[str, Any]:
        return {"pairs_per_s": rate, "is_estimate": False, "is_later": is_later}

    arms = {"TRL": arm(10.0), "orpo, sdpa": arm(20.0), "orpo, padded": arm(5.0, True), "orpo, sdpa, compiled": arm(30.0, True)}
    (line,) = gpu_table.verdicts({"cells": {"Llama-3.2-1B, HH": arms}})
    assert line == "Llama-3.2-1B, HH: orpo, sdpa 2.00 × TRL; orpo, sdpa, compiled, measured later, 3.00 ×"
    del arms["orpo, sdpa, compiled"]
    (line,) = gpu_table.verdicts({"cells": {"Llama-3.2-1B, HH": arms}})
    assert line == "Llama-3.2-1B, HH: orpo, sdpa 2.00 × TRL"
    drawn = gpu_table.figure({"environment": {}, "cells": {"Llama-3.2-1B, HH": arms}})
    assert "nothing here says anything of a GPU" in drawn


def test_useful_operations_are_those_of_the_packed_row(gpu: Any) -> None:
    import gpu_cells

    shape = gpu_cells.TINY["Qwen2.5-3B"]
    cell = gpu_cells.make_cell(*gpu_cells.load_model(shape, torch.device("cpu")), shape, (16, 4, 5), 2)
    weights = sum(parameter.numel() for parameter in cell.model.parameters())
    (group,) = cell.groups[:1]
    prompt, (first, second) = len(group.prompt_ids), map(len, group.response_ids)
    seen = prompt**2 / 2 + first * prompt + first**2 / 2 + second * prompt + second**2 / 2
    assert gpu_cells.flops_of(cell, [group]) == 6 * weights * (prompt + first + second) + 12 * 2 * 64 * seen


def test_without_a_gpu_the_real_run_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err


# --- the minutes -------------------------------------------------------------------------------------------------------------------------


class Simulated:
    """A clock that stands still until somebody spends time."""

    def __init__(self, minutes: float) -> None:
        self.time, self.end = 0.0, 60 * minutes

    def now(self) -> float:
        return self.time

    @property
    def left_s(self) -> float:
        return self.end - self.time

    def spend(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class Costs:
    """What an arm takes: seconds to be built, and of a whole step; the first of which a compiler prolongs; rows that memory holds."""

    build_s: float = 3.0
    step_s: float = 1.0
    compiler_s: float = 0.0
    fits: int = 1000
    error: str | None = None


class Pretended:
    """An arm's stepper that takes its time."""

    def __init__(self, clock: Simulated, costs: Costs) -> None:
        self.clock, self.costs, self.is_new = clock, costs, True

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def step(self, first: int, rows: int, micro: int) -> None:
        self.clock.spend(self.costs.step_s * rows / 4 + (self.costs.compiler_s if self.is_new else 0))
        self.is_new = False
        if micro > self.costs.fits:
            raise torch.OutOfMemoryError("no memory")
        if self.costs.error:
            raise RuntimeError(self.costs.error)


def simulated(gpu: Any, folder: Path, minutes: float, costs: dict[str, Costs], cells: int = 8) -> tuple[dict[str, Any], Simulated]:
    """The whole bench on pretended arms: its results, and the clock at the end. Steps have four rows."""
    clock = Simulated(minutes)

    class Arm(type(gpu.ARMS[0])):
        def build(self, cell: Any) -> Any:
            own = costs.get(self.name, Costs())
            clock.spend(own.build_s)
            return Pretended(clock, own)

    arms = [Arm(arm.name, arm.kind, compiled=arm.compiled, options=arm.options, is_extra=arm.is_extra) for arm in gpu.ARMS]
    options = argparse.Namespace(dry=True, cells=cells, trace=False)
    results = gpu.Results(folder, True)
    results.keep = lambda: None
    bench = gpu.Bench(options, clock, results)
    bench.steps = (3, 8)
    group = SimpleNamespace(num_tokens=100, prompt_ids=[0] * 50, response_ids=[[0] * 25] * 2)
    optimizer = SimpleNamespace(zero_grad=lambda **_: None)
    cell = SimpleNamespace(groups=[group] * 32, pairs_per_row=1, device=torch.device("cpu"), optimizer=optimizer)
    bench._cell = lambda job, rows: cell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "ARMS", tuple(arms))
        patch.setattr(gpu, "matmul_speed", lambda *_: 1e12)
        patch.setattr("gpu_plan.flops_of", lambda cell, groups: 1e9)
        patch.setattr("gpu_plan.free", lambda cell: None)
        patch.setattr(gpu, "free", lambda cell: None)
        bench.run()
    return results.values["cells"], clock


def sides(arms: dict[str, Any]) -> set[str]:
    return {"orpo" if name.startswith("orpo") else "TRL" for name, result in arms.items() if "pairs_per_s" in result}


ARM_NAMES = (
    "TRL, Liger's model kernels", "orpo, varlen", "TRL", "orpo, sdpa", "Liger's fused ORPO loss", "orpo, flex", "TRL, checkpointing",
    "orpo, padded", "orpo, varlen, compiled", "orpo, sdpa, compiled",
)  # fmt: skip


@settings(max_examples=60)
@given(
    minutes=st.floats(5, 12),
    drawn=st.fixed_dictionaries(
        {
            name: st.builds(
                Costs,
                build_s=st.floats(0.5, 10),
                step_s=st.floats(0.1, 6),
                compiler_s=st.floats(0, 20),
                fits=st.sampled_from([0, 1, 2, 3, 1000, 1000]),
                error=st.sampled_from([None, None, None, "illegal instruction"]),
            )
            for name in ARM_NAMES
        }
    ),
)
def test_whatever_an_arm_takes_the_goals_get_their_figures_first(gpu: Any, tmp_path_factory: Any, minutes: float, drawn: Any) -> None:
    """One sound arm of each side is enough, however slow, short of memory or broken the others are; and the minutes are kept."""
    costs = {**drawn, "TRL": Costs(step_s=4.0, fits=4), "orpo, sdpa": Costs(step_s=2.0)}
    cells, clock = simulated(gpu, tmp_path_factory.mktemp("bench"), minutes, costs)
    assert tuple(cells)[:3] == GOALS
    for goal in GOALS:
        assert sides(cells[goal]) == {"orpo", "TRL"}
        for is_ours in (True, False):
            done = {name: result for name, result in cells[goal].items() if "pairs_per_s" in result}
            rates = {name: result for name, result in done.items() if name.startswith("orpo") == is_ours}
            best = max(rates, key=lambda name: rates[name]["pairs_per_s"])
            assert not rates[best]["is_estimate"], (goal, rates)
            assert rates[best]["timed"]["seconds"]
    assert clock.time <= clock.end + 60, "one arm's start, or a step, is all that may come too late"


def test_a_slow_arm_costs_no_goal_its_figure(gpu: Any, tmp_path: Path) -> None:
    """Steps of 50 s, in the first arm of the first cell."""
    cells, clock = simulated(gpu, tmp_path, 8, {"TRL, Liger's model kernels": Costs(step_s=50.0)})
    for goal in GOALS:
        timed = {name for name, result in cells[goal].items() if result.get("timed")}
        assert {name.startswith("orpo") for name in timed} == {True, False}, cells
    for goal in GOALS[1:]:  # of the first cell it is known to be slow
        assert len(cells[goal]["TRL"]["timed"]["seconds"]) == len(cells[goal]["orpo, sdpa"]["timed"]["seconds"]) == 8
        assert "skipped" in cells[goal]["TRL, Liger's model kernels"]
    assert clock.time <= clock.end + 60


def test_where_there_is_time_everything_is_measured_in_turns(gpu: Any, tmp_path: Path) -> None:
    cells, clock = simulated(gpu, tmp_path, 60, {})
    assert len(cells) == 8
    for arms in cells.values():
        assert {len(result["timed"]["seconds"]) for result in arms.values()} == {8}
        assert {len(result["warm_up"]["seconds"]) for result in arms.values()} == {3}
    assert clock.time < clock.end


def test_with_less_time_there_are_fewer_steps_and_then_fewer_arms(gpu: Any, tmp_path: Path) -> None:
    counts = []
    for minutes in (30, 8, 5, 3):
        cells, _ = simulated(gpu, tmp_path / str(minutes), minutes, {}, cells=3)
        timed = {name: len(result.get("timed", {}).get("seconds", ())) for name, result in cells[GOALS[0]].items()}
        counts.append(sum(timed.values()))
        assert sides(cells[GOALS[2]]) == {"orpo", "TRL"}
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 10 * 8


@pytest.mark.parametrize(("fits", "rows"), [(1000, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_the_largest_micro_batch_that_fits_is_found_down_to_one_row(gpu: Any, tmp_path: Path, fits: int, rows: int) -> None:
    cells, _ = simulated(gpu, tmp_path, 30, {"TRL": Costs(fits=fits)}, cells=1)
    found = cells[GOALS[0]]["TRL"]
    assert found["micro_rows"] == rows
    assert len(found["timed"]["seconds"]) == 8
    assert ("common" in found) == (fits < 2)


def test_an_arm_that_holds_no_row_says_so(gpu: Any, tmp_path: Path) -> None:
    cells, _ = simulated(gpu, tmp_path, 30, {"TRL": Costs(fits=0)}, cells=1)
    assert cells[GOALS[0]]["TRL"]["cannot"] == "out of memory at one row"


def test_the_first_guess_is_the_largest_that_two_measured_peaks_allow(gpu: Any) -> None:
    import gpu_plan

    peaks = {2: 40e9, 4: 44e9}  # 36 GB, and 2 GB a row
    assert gpu_plan.rows_that_fit(64, peaks, 70e9) == 16
    assert gpu_plan.rows_that_fit(64, peaks, 200e9) == 64
    assert gpu_plan.rows_that_fit(64, peaks, 41e9) == 4  # which was seen to fit


# --- the tests that come first -----------------------------------------------------------------------------------------------------------


HANGING = """
import subprocess, sys, time
import pytest

pytestmark = getattr(pytest.mark, "cuda")

def test_passes():
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.skipif(True, reason="no")
def test_is_skipped():
    pass

def test_hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)
"""


@pytest.mark.slow
def test_tests_that_hang_are_over_at_their_limit_and_what_they_did_is_known(gpu: Any, tmp_path: Path) -> None:
    """With a process of their own that holds on to their output."""
    file = tmp_path / "test_hanging.py"
    file.write_text(HANGING)
    begin = time.monotonic()
    found = gpu.cuda_tests(30, tmp_path / "tests.log", [str(file)])
    assert time.monotonic() - begin < 200
    assert found["code"] is None
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert [name.rpartition("::")[2] for name in found["who_failed"]] == ["test_fails"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tests_for_a_gpu_have_no_fault_of_their_own(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that ask CUDA itself, on a CPU with stand-ins for its kernels."""
    monkeypatch.setenv("ORPO_CUDA_TESTS_ON", "cpu")
    found = gpu.cuda_tests(1400, tmp_path / "tests.log")
    assert found["code"] == 0, found["last_lines"]
    assert found["failed"] == 0
    assert found["passed"] > 80
    asking = [line for line in (tmp_path / "tests.log").read_text().splitlines() if "SKIPPED (" in line and "::" in line]
    assert {line.partition("::")[2].partition(" ")[0].partition("[")[0] for line in asking} <= {
        "test_nobody_waits_inside_the_engine", "test_the_host_waits_once_per_step", "test_the_peak_is_what_the_plan_says",
        "test_the_engines_agree_on_a_gpu", "test_a_gpu_computes_what_the_cpu_does", "test_cuda_is_chosen_by_itself",
    }  # fmt: skip


def test_the_outcome_of_tests_is_read_from_what_they_have_written_so_far(gpu: Any) -> None:
    text = """collecting ... collected 5 items

tests/engine/test_a.py::test_one[flex-None] PASSED                       [ 20%]
tests/engine/test_a.py::test_one[varlen-a b] FAILED                      [ 40%]
tests/engine/test_b.py::test_two SKIPPED (needs bitsandbytes)            [ 60%]
tests/engine/test_b.py::test_three ERROR                                 [ 80%]
tests/engine/test_b.py::test_four """
    found = gpu.outcomes(text)
    failed = ["tests/engine/test_a.py::test_one[varlen-a b]", "tests/engine/test_b.py::test_three"]
    assert found == {"passed": 1, "skipped": 1, "failed": 2, "who_failed": failed}
    told = gpu.told_of_tests({**found, "code": None, "seconds": 119.6})
    assert told.splitlines()[0] == "cuda tests: 1 passed, 2 failed, 1 skipped in 120 s (stopped at its limit)"
    assert told.count("failed: tests") == 2


def test_what_is_brought_along_needs_nothing_else() -> None:
    """Beside what the machine has: packages are put there without those that they need."""
    command = (BENCHMARKS / "gpu.md").read_text(encoding="utf-8").partition("pip download")[2].partition("git archive")[0]
    words = [word.strip('"') for word in command.split() if not word.startswith("--")]
    brought = {canonicalize_name(re.split(r"[<>=]", word)[0]) for word in words if re.match(r"[a-z]", word)}
    assert {"datasets", "trl", "pytest"} <= brought
    there = needed({"torch", "transformers", "accelerate", "peft"})
    assert needed({"orpo", *brought}) - there - brought - {"orpo"} == set()


def needed(names: set[str]) -> set[str]:
    """Packages and all that they need, of those that are installed."""
    found: set[str] = set()
    waiting = {canonicalize_name(name) for name in names}
    while waiting:
        name = waiting.pop()
        found.add(name)
        with suppress(importlib.metadata.PackageNotFoundError):
            wanted = map(Requirement, importlib.metadata.requires(name) or ())
            waiting |= {canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})} - found
    return found


def test_every_test_for_a_gpu_is_in_a_file_that_is_found(gpu: Any) -> None:
    names = {Path(path).name for path in gpu.test_files()}
    assert {"test_cuda_kernels.py", "test_cuda_runs.py"} <= names
    assert Path(__file__).name not in names
