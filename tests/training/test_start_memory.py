"""What processes hold of a model while it is loaded and spread: one copy in all, not one each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from faults.forked import Zygote

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_four_ranks_hold_one_copy_of_the_model_while_it_is_spread(stored: str, forks: Zygote, tmp_path: Path) -> None:
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 2000}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=20), dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    in_float32 = 4 * sum(weight.numel() for weight in model.parameters())
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(4)]
    options = {"output_dir": str(tmp_path / "run"), "model_folder": str(tmp_path / "model"), "parallelism": "fsdp2", "optim": "sgd"}
    (tmp_path / "run").mkdir()
    ends = forks.run_ranks("trainerruns:held_at_start", logs, **options)
    assert [end.status for end in ends] == [0] * 4, "\n".join(log.read_text() for log in logs)
    held = sum(json.loads((tmp_path / "run" / f"held-{rank}.json").read_text())["bytes"] for rank in range(4))
    print(f"{stored}: {held / 2**20:.0f} MiB on four ranks, the model in float32 {in_float32 / 2**20:.0f}: {held / in_float32:.2f} x")
    assert held <= 1.6 * in_float32
