"""A script as it is written for TRL runs with its import changed; its helpers give what a run of the same keys is given."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import orpo
from orpo.errors import UserError
from orpo.run.config import resolve

SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from orpo import ModelConfig, ORPOConfig, ORPOTrainer, ScriptArguments, get_peft_config

parser = HfArgumentParser((ScriptArguments, ORPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_into_dataclasses()
places = {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}
model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **places)
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **places)
dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
trainer = ORPOTrainer(
    model,
    args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    processing_class=tokenizer,
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
"""


@pytest.fixture
def words(tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> list[str]:
    """The command line of the script; half of the evaluation rows are trained on, as in many a data set."""
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(8)]
    (tmp_path / "data").mkdir()
    for name, part in {"train": rows[:6], "test": rows[4:]}.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    flags = {
        "dataset_name": tmp_path / "data", "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "run", "max_steps": 2,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "beta": 0.3, "report_to": "none", "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 1, "use_peft": True, "lora_r": 4, "lora_target_modules": "q_proj v_proj",
    }  # fmt: skip
    return [part for key, value in flags.items() for part in (f"--{key}", *str(value).split(" "))]


def test_the_standard_script_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    left = runpy.run_path(str(tmp_path / "script.py"))
    trainer = left["trainer"]
    assert trainer.state.global_step == 2
    assert trainer.training_objective.orpo_alpha == 0.3
    assert trainer.model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert "2 of 4 evaluation rows have a prompt that is also trained on" in caplog.text


def test_flags_that_two_classes_share_are_read_from_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import HfArgumentParser

    words = ["--model_revision", "abc123", "--trust_remote_code", "--lora_target_modules", "all-linear", "--use_peft"]
    for order in ((orpo.ORPOConfig, orpo.ModelConfig), (orpo.ModelConfig, orpo.ORPOConfig)):
        parsed = HfArgumentParser(order).parse_args_into_dataclasses(words)
        model_args = next(item for item in parsed if isinstance(item, orpo.ModelConfig))
        assert (model_args.model_revision, model_args.trust_remote_code) == ("abc123", True)
        peft_config = orpo.get_peft_config(model_args)
        assert peft_config.target_modules == "all-linear"
    assert orpo.get_peft_config(orpo.ModelConfig()) is None
    assert orpo.get_quantization_config(orpo.ModelConfig()) is None


def test_its_adapter_is_that_of_a_run(tmp_path: Path) -> None:
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_peft", "--lora_r", "4", "--use_rslora"]
    of_run = resolve(None, flags).peft_config()
    assert orpo.get_peft_config(orpo.ModelConfig(use_peft=True, lora_r=4, use_rslora=True)).to_dict() == of_run.to_dict()


def test_importing_the_trainer_says_nothing_of_kernels() -> None:
    """Where bitsandbytes is installed beside peft it is imported, on every command, and complains of a package for 4-bit generation."""
    code = "from orpo import ORPOTrainer; import logging; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('another thing')"
    source = {**os.environ, "PYTHONPATH": str(Path(orpo.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240, env=source)
    assert "gemm_4bit_forward" not in done.stderr
    assert "another thing" in done.stderr, "only that one message is kept back"


def test_names_of_the_public_face_are_there() -> None:
    assert all(getattr(orpo, name) is not None for name in orpo.__all__)
    with pytest.raises(AttributeError):
        _ = orpo.TRLConfig
    with pytest.raises(UserError):
        orpo.ORPOConfig(learning_rate=-1)
