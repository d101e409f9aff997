"""What processes hold of a model while it is loaded and spread: one copy in all, not one each."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from faults.forked import Zygote
from tinymodels import build_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]
_NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


_LORA = ["--use_peft=true", "--lora_r=8"]
_WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 2000}


def _held_by_four(forks: Zygote, tmp_path: Path, kind: str, more: list[str]) -> tuple[int, int]:
    """Most bytes that four ranks together hold of their own at one moment, from before the model is loaded until it is spread; and the sum
    of each one's own most until training begins, the comparison of the engines included.
    """
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    row = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']} {i}"}) + "\n" for i in range(24)))
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(4)]
    flags = [f"--model_name_or_path={tmp_path / 'model'}", f"--dataset_name={tmp_path / 'rows.jsonl'}", f"--parallelism={kind}"]
    flags += ["--use_cpu=true", "--bf16=false", "--max_steps=1", "--per_device_train_batch_size=1", "--optim=sgd", *more]
    ends = forks.run_ranks("trainerruns:held_by_a_run", logs, output_dir=str(tmp_path / "run"), flags=flags)
    assert [end.status for end in ends] == [0] * 4, "\n".join(log.read_text() for log in logs)
    found = [json.loads((tmp_path / "run" / f"held-{rank}.json").read_text()) for rank in range(4)]
    assert all(rank["is_sharded"] for rank in found)
    newest = [0] * 4
    largest = 0
    for _, rank, held in sorted((moment, rank, held) for rank, one in enumerate(found) for moment, held in one["moments"]):
        newest[rank] = held
        largest = max(largest, sum(newest))
    return largest, sum(rank["start"] for rank in found)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("adapter", [[], _LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=_NEEDS_DEEPSPEED)])
def test_four_ranks_hold_one_copy_of_the_model_while_it_is_spread(
    kind: str, adapter: list[str], stored: str, forks: Zygote, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_WIDE, num_hidden_layers=20), dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    in_float32 = 4 * sum(weight.numel() for weight in model.parameters())
    held, peaks = _held_by_four(forks, tmp_path, kind, adapter)
    print(f"\n{kind}, stored in {stored}: {held / in_float32:.2f} x the model in float32, until training {peaks / in_float32:.2f}")
    assert held <= 1.6 * in_float32
    if kind == "fsdp2" and not adapter:
        assert peaks <= (1.6 + 1.0) * in_float32, "and the gradients of a step"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["two dtypes", "experts", "another dtype", "dora"])
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=_NEEDS_DEEPSPEED)])
def test_four_ranks_hold_one_copy_of_a_model_that_cannot_be_pages_of_its_files(kind: str, case: str, forks: Zygote, tmp_path: Path) -> None:
    plain = LlamaConfig(**_WIDE, num_hidden_layers=20)
    experts = Qwen3MoeConfig(
        **{**_WIDE, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
        head_dim=64,
        num_hidden_layers=44,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
    )
    stored = torch.float32 if case == "another dtype" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(experts if case == "experts" else plain, dtype=stored)
    model.save_pretrained(tmp_path / "model")
    if case == "two dtypes":
        for file in (tmp_path / "model").glob("*.safetensors"):
            mixed = {name: weight.float() if "norm" in name else weight for name, weight in load_file(file).items()}
            save_file(mixed, file, metadata={"format": "pt"})
    in_float32 = 4 * sum(weight.numel() for weight in model.parameters())
    del model
    more = {"another dtype": [*_LORA, "--dtype=bfloat16"], "dora": [*_LORA, "--use_dora=true"]}.get(case, [])
    held, peaks = _held_by_four(forks, tmp_path, kind, more)
    print(f"\n{kind}, {case}: {held / in_float32:.2f} x the model in float32, until training {peaks / in_float32:.2f}")
    assert in_float32 >= 300 * 2**20
    assert held <= 1.6 * in_float32
