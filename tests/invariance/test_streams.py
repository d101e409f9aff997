"""Training from a stream: killed and resumed it is the uninterrupted run to the bit, on other numbers of ranks to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults.forked import Zygote
from trainerruns import assert_same_trajectory

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

CLOCK = ("runtime", "per_second", "flos")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows, two of them dropped: six steps of four a pass, the last of one row; windows of five, six and what is left."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    made = [{"prompt": f"Question {i}?", "chosen": f"good {'so ' * (i % 5)}{i}", "rejected": f"bad {i}"} for i in range(23)]
    made[4]["chosen"] = made[17]["rejected"] = " "
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def run(forks: Zygote, folder: Path, rows: Path, num_ranks: int, *, status: int = 0, **options: Any) -> dict[str, Any]:
    """12 steps of 4 rows: two passes."""
    folder.mkdir(exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // num_ranks, "max_steps": 12, "stream_window": 5}
    ends = forks.run_ranks("trainerruns:stream_and_report", logs, output_dir=str(folder), rows=str(rows), **{**defaults, **options})
    told = "\n".join(log.read_text() for log in logs)
    assert [end.status for end in ends] == [status] * num_ranks, told
    if status:
        return {}
    report = json.loads((folder / "report.json").read_text())
    return {**report, "weights": [load_file(folder / f"weights-{rank}.safetensors") for rank in range(num_ranks)]}


@pytest.fixture(scope="module")
def whole(forks: Zygote, tmp_path_factory: pytest.TempPathFactory, rows: Path) -> dict[str, Any]:
    return run(forks, tmp_path_factory.mktemp("runs") / "whole", rows, 1)


def lines(report: dict[str, Any]) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in CLOCK)} for entry in report["log"] if "loss" in entry
    ]


def test_everything_that_was_read_is_counted_once(whole: dict[str, Any]) -> None:
    assert whole["steps"] == 12
    assert whole["rows"]["num_rows"] == 23
    assert whole["rows"]["dropped"] == {"empty_answer": 2}


@pytest.mark.parametrize("stop_at", [3, 5, pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_run_is_the_uninterrupted_one_to_the_bit(
    stop_at: int, forks: Zygote, tmp_path: Path, rows: Path, whole: dict[str, Any]
) -> None:
    """Inside the first windows, at a step that takes from two of them, and in the second pass."""
    run(forks, tmp_path / "run", rows, 1, stop_at=stop_at, status=9)
    resumed = run(forks, tmp_path / "run", rows, 1, resume=True)
    assert lines(resumed) == lines(whole)
    assert all(torch.equal(weight, whole["weights"][0][name]) for name, weight in resumed["weights"][0].items())
    assert resumed["rows"] == whole["rows"]


@pytest.mark.parametrize(
    ("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_it_goes_on_with_other_numbers_of_ranks(
    before: int, after: int, forks: Zygote, tmp_path: Path, rows: Path, whole: dict[str, Any]
) -> None:
    run(forks, tmp_path / "run", rows, before, stop_at=5, status=9)
    options = {"gradient_accumulation_steps": 2 // before}  # rows of a step are those of the first start
    resumed = run(forks, tmp_path / "run", rows, after, resume=True, **options)
    assert_same_trajectory([entry["loss"] for entry in lines(resumed)], [entry["loss"] for entry in lines(whole)])
    for name, weight in whole["weights"][0].items():
        assert torch.equal(resumed["weights"][0][name], resumed["weights"][1 % after][name])
        assert (resumed["weights"][0][name] - weight).norm() <= 1e-5 * weight.norm() + 1e-9, name
    assert resumed["rows"] == whole["rows"]
