"""What processes hold of a model while it is loaded and spread: one copy in all, not one each."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from faults.forked import Zygote
from tinymodels import build_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]
_NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("adapter", [[], ["--use_peft=true", "--lora_r=8"]], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=_NEEDS_DEEPSPEED)])
def test_four_ranks_hold_one_copy_of_the_model_while_it_is_spread(
    kind: str, adapter: list[str], stored: str, forks: Zygote, tmp_path: Path
) -> None:
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 2000}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=20), dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    row = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']} {i}"}) + "\n" for i in range(24)))
    in_float32 = 4 * sum(weight.numel() for weight in model.parameters())
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(4)]
    flags = [f"--model_name_or_path={tmp_path / 'model'}", f"--dataset_name={tmp_path / 'rows.jsonl'}", f"--parallelism={kind}"]
    flags += ["--use_cpu=true", "--bf16=false", "--max_steps=1", "--per_device_train_batch_size=1", "--optim=sgd", *adapter]
    ends = forks.run_ranks("trainerruns:held_by_a_run", logs, output_dir=str(tmp_path / "run"), flags=flags)
    assert [end.status for end in ends] == [0] * 4, "\n".join(log.read_text() for log in logs)
    found = [json.loads((tmp_path / "run" / f"held-{rank}.json").read_text()) for rank in range(4)]
    assert all(rank["is_sharded"] for rank in found)
    held = sum(rank["start"] for rank in found)
    told = f"{kind}, stored in {stored}: {held / 2**20:.0f} MiB on four ranks, the model in float32 {in_float32 / 2**20:.0f}"
    print(f"\n{told}: {held / in_float32:.2f} x")
    gradients = in_float32 if kind == "zero3" and not adapter else 0  # DeepSpeed makes room for them at the start, and for no more with SGD
    assert held - gradients <= 1.6 * in_float32
