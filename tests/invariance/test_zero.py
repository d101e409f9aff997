"""ZeRO-2 and ZeRO-3 through DeepSpeed train as one process does: the same losses, norms, evaluation and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.forked import Zygote
from faults.jobs import metrics
from faults.test_distributed import Pair
from invariance.test_ranks import assert_same, run
from invariance.test_sharded import ZERO_3
from invariance.test_sharded_resume import BEST, STORED_IN_BF16, assert_goes_on, losses, train
from orpo.checkpoint import verify

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(240)]
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

FULL: dict[str, Any] = {"engine": "shared", "max_steps": 30}
UNEVEN: dict[str, Any] = {**FULL, "max_tokens_per_microbatch": 20}
LORA: dict[str, Any] = {**FULL, "lora": True, "gradient_checkpointing": True, "learning_rate": 1e-2}
LORA_OF_RESUME = {"lora": True, "learning_rate": 1e-2}


@pytest.mark.parametrize("zero", [{"parallelism": "zero2"}, {"deepspeed": ZERO_3}], ids=["zero2", "zero3"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama_tied", UNEVEN),
        ("qwen3", FULL),
        ("gemma3", UNEVEN),
        ("qwen3", LORA),
        ("llama_tied", LORA),
        ("llama", {**FULL, "engine": "padded"}),
    ],
)
def test_two_ranks_equal_one(architecture: str, options: dict[str, Any], zero: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    one = run(forks, tmp_path / "one", 1, architecture=architecture, **options)
    two = run(forks, tmp_path / "two", 2, architecture=architecture, **zero, **options)
    assert two["engine"] == one["engine"] == options["engine"]
    assert two["is_sharded"]
    assert_same(two, one)


@pytest.mark.parametrize("zero", [{"parallelism": "zero2"}, {"deepspeed": ZERO_3}], ids=["zero2", "zero3"])
@pytest.mark.parametrize("options", [{}, {"lora": True, "learning_rate": 1e-2}], ids=["full", "lora"])
def test_bf16_over_two_ranks_stays_near_one(options: dict[str, Any], zero: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    """Weights are computed with in bf16; what is trained, and the sums of gradients, are float32."""
    one = run(forks, tmp_path / "one", 1, engine="shared", bf16=True, **options)
    two = run(forks, tmp_path / "two", 2, engine="shared", bf16=True, **zero, **options)
    assert_same(two, one, exact=False)


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ((2, "zero3"), (1, "auto"), {"architecture": "llama_tied"}),
        ((1, "auto"), (3, "zero2"), {}),
        ((3, "zero2"), (2, "zero3"), {}),
        ((2, "zero3"), (3, "zero3"), LORA_OF_RESUME),
        ((2, "zero3"), (2, "fsdp2"), {"architecture": "gemma3"}),
        ((2, "fsdp2"), (2, "zero2"), LORA_OF_RESUME),
        ((2, "ddp"), (2, "zero3"), LORA_OF_RESUME),
        ((2, "zero2"), (2, "ddp"), BEST),
        ((2, "zero3"), (2, "zero3"), BEST),
        ((2, "zero2"), (2, "zero2"), BEST),
        ((1, "auto"), (2, "zero3"), STORED_IN_BF16),
    ],
)  # fmt: skip
def test_a_checkpoint_goes_on_with_other_processes(
    before: tuple[int, str], after: tuple[int, str], options: dict[str, Any], forks: Zygote, tmp_path: Path
) -> None:
    assert_goes_on(forks, tmp_path, before, after, options)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_the_same_number_of_processes_gives_the_same_bits_and_nothing_is_pickled(kind: str, forks: Zygote, tmp_path: Path) -> None:
    whole = train(forks, tmp_path / "run", 2, kind)
    manifest = verify(tmp_path / "run" / "checkpoint-4")
    assert {Path(name).suffix for name in manifest.files} <= {".safetensors", ".json", ".jinja"}
    assert len([name for name in manifest.files if name.startswith("sharded/")]) == 4, "weights and moments of two ranks"
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    again = train(forks, tmp_path / "run", 2, kind, resume=True)
    assert losses(again) == losses(whole)
    assert all(torch.equal(again["weights"][name], weight) for name, weight in whole["weights"].items())


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_weight_that_a_step_does_not_reach_keeps_no_gradient_of_the_step_before(kind: str, forks: Zygote, tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    ends = forks.run_ranks("trainerruns:leave_a_layer_out_and_report", logs, output_dir=str(tmp_path), parallelism=kind)
    assert [end.status for end in ends] == [0, 0], "\n".join(log.read_text() for log in logs)
    moved = json.loads((tmp_path / "moved.json").read_text())
    assert moved["before"] > 0
    assert moved["after"] == 0


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_steps_that_are_skipped_move_no_weight(kind: str, forks: Zygote, tmp_path: Path) -> None:
    found = {}
    for spread in ("ddp", kind):
        (tmp_path / spread).mkdir()
        pair = Pair(forks, tmp_path / spread)
        options = {"parallelism": spread, "on_nonfinite": "skip", "logging_steps": 1}
        ends = pair.train(trouble="inf gradient twice", options=options)
        assert [end.status for end in ends] == [0, 0], pair.text()
        found[spread] = [entry["loss"] for entry in metrics(pair.run) if "grad_norm" in entry]
    assert found[kind] == pytest.approx(found["ddp"], rel=1e-5)
