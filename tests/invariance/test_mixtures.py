"""Mixtures of experts on several ranks: the router's auxiliary loss and the experts' load are the whole step's, as one process has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from faults.forked import Zygote
from invariance.test_ranks import assert_same, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

SLOW = pytest.mark.slow
ZERO = [SLOW, pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")]
UNEVEN: dict[str, Any] = {"engine": "shared", "max_tokens_per_microbatch": 20, "router_aux_loss_coef": 0.3, "max_steps": 30}
LORA: dict[str, Any] = {**UNEVEN, "lora": True, "gradient_checkpointing": True, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("architecture", "parallelism", "options"),
    [
        ("qwen3_moe", "fsdp2", {**UNEVEN, "max_steps": 6}),
        pytest.param("qwen3_moe", "ddp", UNEVEN, marks=SLOW),
        pytest.param("qwen3_moe", "fsdp2", UNEVEN, marks=SLOW),
        pytest.param("mixtral", "ddp", {**UNEVEN, "engine": "padded"}, marks=SLOW),
        pytest.param("mixtral", "fsdp2", UNEVEN, marks=SLOW),
        pytest.param("gpt_oss", "fsdp2", UNEVEN, marks=SLOW),
        pytest.param("olmoe", "ddp", LORA, marks=SLOW),
        pytest.param("olmoe", "fsdp2", LORA, marks=SLOW),
        pytest.param("qwen3_moe", "zero2", UNEVEN, marks=ZERO),
        pytest.param("qwen3_moe", "zero3", UNEVEN, marks=ZERO),
    ],
)
def test_two_ranks_equal_one(architecture: str, parallelism: str, options: dict[str, Any], forks: Zygote, tmp_path: Path) -> None:
    one = run(forks, tmp_path / "one", 1, architecture=architecture, **options)
    two = run(forks, tmp_path / "two", 2, architecture=architecture, parallelism=parallelism, **options)
    assert two["is_sharded"] == (parallelism != "ddp")
    assert_same(two, one)
    routed = [[entry for entry in report["log"] if "aux_loss" in entry] for report in (one, two)]
    assert len(routed[0]) == len(routed[1]) == options["max_steps"]
    for alone, spread in zip(*routed, strict=True):
        assert {key: spread[key] for key in spread if key.startswith("experts/")} == {
            key: alone[key] for key in alone if key.startswith("experts/")
        }, "tokens sent to another expert"
