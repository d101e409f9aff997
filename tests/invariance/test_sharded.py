"""Weights spread over gloo ranks by FSDP2 train as one process does: the same losses, norms, evaluation and weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from faults.forked import Zygote
from invariance.test_ranks import assert_same, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

FULL: dict[str, Any] = {"engine": "shared"}
UNEVEN: dict[str, Any] = {**FULL, "max_tokens_per_microbatch": 20}
LORA: dict[str, Any] = {**FULL, "lora": True, "gradient_checkpointing": True, "learning_rate": 1e-2}
ZERO = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
"""Every weight in parts, also those of a tiny model."""


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama_tied", UNEVEN),
        ("qwen3", LORA),
        pytest.param("llama", {**FULL, "max_steps": 30}, marks=pytest.mark.slow),
        pytest.param("gemma3", {**UNEVEN, "max_steps": 30}, marks=pytest.mark.slow),
        pytest.param("qwen3", {**UNEVEN, "max_steps": 30}, marks=pytest.mark.slow),
        pytest.param("llama_tied", {**LORA, "max_steps": 30}, marks=pytest.mark.slow),
        pytest.param("gemma3", {**LORA, "max_steps": 30}, marks=pytest.mark.slow),
        pytest.param("llama", {"engine": "padded", "max_steps": 30}, marks=pytest.mark.slow),
    ],
)
def test_two_sharded_ranks_equal_one(architecture: str, options: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    one = run(forks, tmp_path / "one", 1, architecture=architecture, **options)
    two = run(forks, tmp_path / "two", 2, architecture=architecture, parallelism="fsdp2", **options)
    assert two["engine"] == one["engine"] == options["engine"]
    assert two["is_sharded"]
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "options"), [("llama", FULL), ("qwen3", FULL), ("gemma3", FULL), ("llama_tied", LORA)])
def test_four_sharded_ranks_equal_one(architecture: str, options: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    """Epochs of 13 rows in steps of four: three ranks have nothing but fillers in each epoch's last step."""
    one = run(forks, tmp_path / "one", 1, architecture=architecture, max_steps=30, **options)
    per_rank = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    four = run(forks, tmp_path / "four", 4, architecture=architecture, max_steps=30, parallelism="fsdp2", **per_rank, **options)
    assert four["is_sharded"]
    assert_same(four, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "zero"), [(FULL, None), (LORA, None), pytest.param(FULL, ZERO_3, marks=ZERO), pytest.param(LORA, ZERO_3, marks=ZERO)]
)
def test_a_model_that_is_stored_in_bf16_is_trained_in_float32(
    options: dict[str, Any], zero: dict[str, Any] | None, forks: Zygote, tmp_path: Path
) -> None:
    """Read as it is stored, and spread as one process reads it, an adapter's first weights too."""
    spread: dict[str, Any] = {"parallelism": "fsdp2"} if zero is None else {"deepspeed": zero}
    # Of a gradient that is next to nothing AdamW would take the sign, which is rounding's.
    options = {**options, "architecture": "llama_tied", "half": True, "by_name": True, "adam_epsilon": 1e-6}
    one = run(forks, tmp_path / "one", 1, **options)
    two = run(forks, tmp_path / "two", 2, **spread, **options)
    assert two["is_sharded"]
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_copies_of_shards_on_two_machines_equal_one(options: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    """Hybrid sharding: two ranks of each machine share one copy of the model, and gradients go between the machines."""
    one = run(forks, tmp_path / "one", 1, **options)
    per_rank = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "per_machine": 2}
    four = run(forks, tmp_path / "four", 4, fsdp="hybrid_shard", **per_rank, **options)
    assert four["is_sharded"]
    assert_same(four, one)


@pytest.mark.slow
def test_offload_on_a_cpu_is_where_the_shards_are_already(forks: Zygote, tmp_path: Path) -> None:
    one = run(forks, tmp_path / "one", 1, **FULL)
    assert_same(run(forks, tmp_path / "two", 2, fsdp="full_shard offload", **FULL), one)


@pytest.mark.parametrize(
    "options", [FULL, pytest.param({**LORA, "half": True}, marks=pytest.mark.slow)], ids=["full", "an adapter on a base in bf16"]
)
def test_bf16_over_two_sharded_ranks_stays_near_one(options: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    """Weights are gathered in bf16 and gradients summed in float32: what one process on working weights does, to bf16's rounding."""
    one = run(forks, tmp_path / "one", 1, bf16=True, **options)
    two = run(forks, tmp_path / "two", 2, bf16=True, parallelism="fsdp2", **options)
    assert_same(two, one, exact=False)
