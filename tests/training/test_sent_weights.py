"""FSDP2 and ZeRO-3: process 0 alone reads the weights, and every layer goes from it to all as it is spread."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.forked import Zygote
from orpo.run.config import resolve
from orpo.run.data import prepare_data
from orpo.training.runner import build_trainer
from orpo.training.startmodel import load_run_model
from tinymodels import CHATML_TEMPLATE, build_tiny_model, build_tiny_tokenizer
from trainerruns import num_tied

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

LORA = ["--use_peft=true", "--lora_r=4"]
ZERO_3 = pytest.param(
    "zero3", marks=[pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")]
)


def _flags(folder: Path, architecture: str, *, stored: str = "float32", is_mixed: bool = False, is_plain: bool = False) -> list[str]:
    model = build_tiny_model(architecture, num_layers=3, vocab_size=384)
    model.to(getattr(torch, stored)).save_pretrained(folder / "model")
    if is_mixed:
        file = folder / "model" / "model.safetensors"
        mixed = {name: weight.half() if "mlp" in name else weight for name, weight in load_file(file).items()}
        save_file(mixed, file, metadata={"format": "pt"})
    build_tiny_tokenizer(chat_template=None if is_plain else CHATML_TEMPLATE).save_pretrained(folder / "model")
    for file in (folder / "model").glob("tokenizer*.json") if is_plain else ():
        file.write_text(file.read_text().replace("<|im_start|>", "<|of_another_kind|>"))
    rows = [{"prompt": f"Sky {number}?", "chosen": "Blue.", "rejected": "Red."} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model_name_or_path={folder / 'model'}", f"--dataset_name={folder / 'rows.jsonl'}", "--use_cpu=true"]
    return [*flags, "--max_steps=1", "--per_device_train_batch_size=1", "--report_to=none"]


def _sent(forks: Zygote, folder: Path, flags: list[str], parallelism: str, **options: Any) -> list[dict[str, Any]]:
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    flags = [*flags, f"--parallelism={parallelism}"]
    ends = forks.run_ranks("trainerruns:send_and_report", logs, output_dir=str(folder / "run"), flags=flags, **options)
    assert [end.status for end in ends] == [0, 0], "\n".join(log.read_text() for log in logs)
    return [json.loads((folder / "run" / f"sent-{rank}.json").read_text()) for rank in range(2)]


def _alone(folder: Path, flags: list[str]) -> torch.nn.Module:
    """The model of the same run as one process begins with it."""
    config = resolve(None, [f"--output_dir={folder / 'alone'}", *flags])
    args = config.training_args()
    data = prepare_data(config, args, lambda line: None)
    return build_trainer(config, args, data, load_run_model(config, args, data).model, []).model


KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "tied": ("llama_tied", {}, []),
    "computed in bfloat16": ("llama", {}, ["--bf16=true"]),
    "an adapter computed in bfloat16": ("llama_tied", {}, [*LORA, "--bf16=true"]),
    "stored in bfloat16": ("gemma3", {"stored": "bfloat16"}, []),
    "files of two dtypes": ("llama", {"is_mixed": True}, []),
    "another dtype": ("qwen3", {}, [*LORA, "--dtype=bfloat16"]),
    "experts": ("qwen3_moe", {}, []),
    "lora": ("llama_tied", {"stored": "bfloat16"}, LORA),
    "dora": ("qwen3", {"stored": "bfloat16"}, [*LORA, "--use_dora=true"]),
    "pissa": ("llama", {}, [*LORA, "--lora_init=pissa"]),
    "olora": ("llama", {}, [*LORA, "--lora_init=olora"]),
    "whole modules": ("llama", {}, [*LORA, "--lora_modules_to_save=lm_head"]),
    "new tokens": ("llama_tied", {"stored": "bfloat16", "is_plain": True}, ["--chat_template=chatml"]),
    "new tokens of an adapter": ("llama", {"is_plain": True}, [*LORA, "--chat_template=chatml"]),
}


@pytest.mark.parametrize("kind", [name if name == "tied" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS])
@pytest.mark.parametrize("parallelism", ["fsdp2", ZERO_3])
def test_a_run_starts_from_the_weights_that_one_process_has(parallelism: str, kind: str, forks: Zygote, tmp_path: Path) -> None:
    architecture, stored, more = KINDS[kind]
    flags = [*_flags(tmp_path, architecture, **stored), *more, *([] if "--bf16=true" in more else ["--bf16=false"])]
    first, second = _sent(forks, tmp_path, flags, parallelism)
    model = _alone(tmp_path, flags)
    own = dict(model.named_parameters())
    assert (first["real"], second["real"]) == (len(own), 0)
    layer = max(sum(one.numel() for one in child.parameters()) for child in model.get_decoder().layers)
    rest = sum(one.numel() for name, one in own.items() if ".layers." not in name)
    assert second["whole"] <= 4 * max(layer, rest)
    started = load_file(tmp_path / "run" / "started.safetensors")
    assert started.keys() == own.keys()
    for name, weight in own.items():
        # DeepSpeed holds what is not trained in the dtype of compute alone.
        rounded = torch.bfloat16 if parallelism == "zero3" and "--bf16=true" in more and not weight.requires_grad else weight.dtype
        assert started[name].dtype == rounded
        assert torch.equal(weight.to(rounded), started[name]), name
    buffers = {name: buffer.flatten().tolist() for name, buffer in model.named_buffers()}
    for rank in (first, second):
        assert rank["buffers"] == buffers
        assert rank["tied"] == num_tied(model)
        assert rank["engine"] == "shared"
        assert rank["gradients"] == 0
    assert first["loss"] > 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("values", "differ by at most 1.0e-02 nats"), pytest.param("gradients", "gradients by 1.0e-01 of their norm", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("parallelism", ["fsdp2", ZERO_3])
def test_a_wrong_engine_is_found_on_spread_weights_by_all(parallelism: str, wrong: str, told: str, forks: Zygote, tmp_path: Path) -> None:
    """And the run goes on without it."""
    found = _sent(forks, tmp_path, [*_flags(tmp_path, "llama"), "--bf16=false"], parallelism, wrong=wrong)
    assert [rank["engine"] for rank in found] == ["padded", "padded"]
    assert found[0]["reason"] == found[1]["reason"]
    assert told in found[0]["reason"]
