"""Optimizer states in 8 bits and 4-bit base weights, on a CPU: they learn, resume bit by bit, and a package that is missing is said."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo.cli import main
from orpo.errors import UserErrors
from randomgroups import random_groups
from tinymodels import build_tiny_model, build_tiny_tokenizer
from trainerruns import logged, make_config, make_trainer, weights

GROUPS = random_groups(16)
OTHERS = ("adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "rmsprop_bnb_8bit", "ademamix_8bit")


def run(folder: Path, optim: str, *, resume: str | None = None, **options: Any) -> Any:
    model = build_tiny_model("llama", hidden_size=64, num_layers=2)  # states of fewer than 4,096 numbers stay in float32
    schedule = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 5}
    trainer = make_trainer(folder, GROUPS, model=model, optim=optim, **schedule, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("optim", ["adamw_8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_states_in_8_bits_learn_and_resume_bit_by_bit(optim: str, bf16: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = run(tmp_path / "run", optim, bf16=bf16)
    states = [state for state in trainer.optimizer.state.values() if state]
    kinds = {value.dtype for state in states for name, value in state.items() if name in ("state1", "state2") and value is not None}
    assert torch.uint8 in kinds
    if "adamw" in optim:
        assert logged(trainer) == pytest.approx(logged(run(tmp_path / "whole", "adamw_torch", bf16=bf16)), rel=1e-2)
    final = weights(trainer.model)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = run(tmp_path / "run", optim, bf16=bf16, resume=str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(weight, final[name]) for name, weight in weights(resumed.model).items())


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_a_package_that_is_missing_is_said_before_the_model_is_loaded(optim: str, tmp_path: Path) -> None:
    with pytest.raises(UserErrors, match="needs the package torchao"):
        make_config(tmp_path, optim=optim)


@pytest.mark.slow
def test_a_4_bit_base_from_training_to_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """orpo train with 4-bit weights and 8-bit states, on again, and merged into the base as it was before."""
    pytest.importorskip("bitsandbytes")
    tokenizer, base, out = build_tiny_tokenizer(), tmp_path / "base", tmp_path / "run"
    build_tiny_model("llama", vocab_size=len(tokenizer), hidden_size=64, num_layers=2).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"prompt": f"What is {number} plus one?", "chosen": f"It is {number + 1}.", "rejected": "No."} for number in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(out)]
    words += ["--load_in_4bit", "--optim", "paged_adamw_8bit", "--learning_rate", "1e-2", "--logging_steps", "1", "--save_steps", "4"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--use_cpu", "--warmup_steps", "0"]
    words += ["--lora_target_modules", "all-linear", "--lr_scheduler_type", "constant"]
    assert main(["train", *words, "--max_steps", "4"]) == 0
    assert main(["train", *words, "--max_steps", "12"]) == 0
    losses = [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    facts = json.loads((out / "run.json").read_text())
    assert facts["engine"] == "shared"
    assert main(["export", str(out), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    from transformers import AutoModelForCausalLM

    merged, before = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "merged", base))
    assert any(not torch.equal(one, other) for one, other in zip(merged.parameters(), before.parameters(), strict=True))
