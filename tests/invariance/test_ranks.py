"""Two gloo ranks equal one: the same losses, metrics, weights and evaluation, with a tail of fewer rows than ranks."""

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


def run(forks: Zygote, folder: Path, num_ranks: int, **options: Any) -> dict[str, Any]:
    """A run of 12 steps of 4 rows over 13 rows: three epochs, each with a tail of one row."""
    folder.mkdir()
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // num_ranks, "max_steps": 12}
    ends = forks.run_ranks("trainerruns:train_and_report", logs, output_dir=str(folder), **{**defaults, **options})
    assert [end.status for end in ends] == [0] * num_ranks, "\n".join(log.read_text() for log in logs)
    report = json.loads((folder / "report.json").read_text())
    report["weights"] = [load_file(folder / f"weights-{rank}.safetensors") for rank in range(num_ranks)]
    return report


def numbers(entry: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if not any(word in key for word in CLOCK)}


def assert_same(two: dict[str, Any], one: dict[str, Any], *, exact: bool = True) -> None:
    for name, weight in two["weights"][0].items():
        assert torch.equal(weight, two["weights"][1][name]), f"the ranks have drifted apart at {name}"
        if exact:
            assert (weight - one["weights"][0][name]).norm() <= 1e-5 * one["weights"][0][name].norm() + 1e-9, name
    found, expected = ([entry for entry in report["log"] if "loss" in entry] for report in (two, one))
    tolerance = 1e-5 if exact else 0.02
    assert_same_trajectory(
        [entry["loss"] for entry in found], [entry["loss"] for entry in expected], largest=tolerance, mean=1e-6 if exact else 0.01
    )
    for entry, other in zip(found, expected, strict=True):
        assert numbers(entry) == pytest.approx(numbers(other), rel=10 * tolerance, abs=10 * tolerance)
    assert numbers(two["evaluation"]) == pytest.approx(numbers(one["evaluation"]), rel=10 * tolerance, abs=10 * tolerance)


@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_two_ranks_equal_one(engine: str, forks: Zygote, tmp_path: Path) -> None:
    one, two = (run(forks, tmp_path / str(number), number, engine=engine) for number in (1, 2))
    assert two["engine"] == one["engine"] == engine
    assert two["steps"] == 12
    losses = [entry["loss"] for entry in one["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_same(two, one)


def test_two_ranks_in_one_micro_batch_equal_one_in_four(forks: Zygote, tmp_path: Path) -> None:
    one = run(forks, tmp_path / "one", 1, engine="shared", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    two = run(forks, tmp_path / "two", 2, engine="shared", max_tokens_per_microbatch=20)
    assert_same(two, one)


def test_adapters_and_gradient_checkpointing_over_two_ranks(forks: Zygote, tmp_path: Path) -> None:
    options = {"engine": "shared", "lora": True, "gradient_checkpointing": True, "learning_rate": 1e-2}
    one, two = (run(forks, tmp_path / str(number), number, **options) for number in (1, 2))
    assert_same(two, one)


def test_bf16_over_two_ranks_stays_near_one(forks: Zygote, tmp_path: Path) -> None:
    """One process works on bf16 weights, two use autocast: the same to bf16's rounding."""
    one, two = (run(forks, tmp_path / str(number), number, engine="shared", bf16=True) for number in (1, 2))
    assert_same(two, one, exact=False)


def test_three_ranks_with_more_ranks_than_rows(forks: Zygote, tmp_path: Path) -> None:
    options = {"engine": "shared", "num_rows": 2, "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    one = run(forks, tmp_path / "one", 1, **{**options, "gradient_accumulation_steps": 3})
    three = run(forks, tmp_path / "three", 3, **options)
    assert_same(three, one)
