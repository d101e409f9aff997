"""A checkpoint whose weights are in parts goes on with any number of processes, and from FSDP2 to DDP and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from faults.forked import Zygote
from orpo.checkpoint import verify
from trainerruns import assert_same_trajectory

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

PAIRS_OF_A_STEP = 6
OPTIONS: dict[str, Any] = {
    "engine": "shared", "per_device_train_batch_size": 1, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "num_rows": 15,
}  # fmt: skip
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "a_loss"}
LORA = {"lora": True, "learning_rate": 1e-2}
STORED_IN_BF16 = {"half": True, "by_name": True}
"""A model that is read as it is stored: whole weights of a checkpoint, in float32, must not be rounded to that."""


def train(forks: Zygote, folder: Path, num_ranks: int, parallelism: str, **options: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    spread = {"parallelism": parallelism, "gradient_accumulation_steps": PAIRS_OF_A_STEP // num_ranks}
    ends = forks.run_ranks("trainerruns:train_and_report", logs, output_dir=str(folder), **{**OPTIONS, **spread, **options})
    assert [end.status for end in ends] == [0] * num_ranks, "\n".join(log.read_text() for log in logs)
    return {**json.loads((folder / "report.json").read_text()), "weights": load_file(folder / "weights-0.safetensors")}


def losses(report: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in report["log"] if "loss" in entry]


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ((2, "fsdp2"), (1, "auto"), {}),
        ((1, "auto"), (3, "fsdp2"), LORA),
        pytest.param((3, "fsdp2"), (2, "fsdp2"), {"architecture": "llama_tied"}, marks=pytest.mark.slow),
        pytest.param((2, "fsdp2"), (3, "fsdp2"), LORA, marks=pytest.mark.slow),
        pytest.param((2, "ddp"), (2, "fsdp2"), {"architecture": "gemma3"}, marks=pytest.mark.slow),
        pytest.param((2, "fsdp2"), (2, "ddp"), LORA, marks=pytest.mark.slow),
        pytest.param((2, "fsdp2"), (2, "ddp"), BEST, marks=pytest.mark.slow),
        pytest.param((2, "ddp"), (2, "fsdp2"), STORED_IN_BF16, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_checkpoint_goes_on_with_other_processes(
    before: tuple[int, str], after: tuple[int, str], options: dict[str, Any], forks: Zygote, tmp_path: Path
) -> None:
    assert_goes_on(forks, tmp_path, before, after, options)


def assert_goes_on(forks: Zygote, tmp_path: Path, before: tuple[int, str], after: tuple[int, str], options: dict[str, Any]) -> None:
    """A run that is broken off and goes on with other processes ends as one that was never broken off."""
    whole = train(forks, tmp_path / "one", 1, "auto", **options)
    train(forks, tmp_path / "run", *before, **options)
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    found = train(forks, tmp_path / "run", *after, resume=True, **options)
    assert found["is_sharded"] == (after[1] not in ("auto", "ddp"))
    assert_same_trajectory(losses(found), losses(whole))
    for name, weight in whole["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-5 * weight.norm() + 1e-9, name


def test_the_same_number_of_processes_gives_the_same_bits_and_nothing_is_pickled(forks: Zygote, tmp_path: Path) -> None:
    whole = train(forks, tmp_path / "run", 2, "fsdp2")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    manifest = verify(checkpoint)
    shards = [name for name in manifest.files if name.startswith("sharded/")]
    assert len(shards) == 4, "weights and moments of two ranks"
    assert manifest.world_size == 2
    assert {Path(name).suffix for name in manifest.files} <= {".safetensors", ".json", ".jinja"}
    for name in shards:
        with safe_open(checkpoint / name, framework="pt") as file:
            assert list(file.keys())
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    again = train(forks, tmp_path / "run", 2, "fsdp2", resume=True)
    assert losses(again) == losses(whole)
    assert all(torch.equal(again["weights"][name], weight) for name, weight in whole["weights"].items())
