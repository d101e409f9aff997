"""What goes wrong between loading and the first step, on one process alone or on all alike, is told once, with exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from faults.forked import Zygote
from tinymodels import build_tiny_model, build_tiny_tokenizer

SLOW = pytest.mark.slow
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def _make_home(home: Path, architecture: str = "llama") -> None:
    """A machine's own copy of rows and model."""
    home.mkdir()
    tokenizer = build_tiny_tokenizer()
    build_tiny_model(architecture, num_layers=2, vocab_size=len(tokenizer)).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(8)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _with_an_adapter(home: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = build_tiny_model("llama", num_layers=2, vocab_size=len(build_tiny_tokenizer()))
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(home / "adapter")
    settings = json.loads((home / "adapter" / "adapter_config.json").read_text())
    (home / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(home / "model")}))


def _broken_adapter(*homes: Path) -> None:
    for home in homes:
        _with_an_adapter(home)
    file = homes[0] / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _weights_that_are_not_finite(*homes: Path) -> None:
    for home in homes:
        file = home / "model" / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.self_attn.q_proj.weight"].fill_(torch.nan)
        save_file(weights, file, metadata={"format": "pt"})


def _nothing(*homes: Path) -> None:
    pass


LORA = {"use_peft": True, "lora_r": 4}
CASES: dict[str, tuple[tuple[str, str], Callable[..., None], dict[str, Any], str]] = {
    "a layer that there is not": (("llama", "llama"), _nothing, {**LORA, "lora_target_modules": ["nope"]}, "nope"),
    "a layer that process 0 has not": (("llama", "opt"), _nothing, {**LORA, "lora_target_modules": ["fc1"]}, "fc1"),
    "a layer that process 1 has not": (("opt", "llama"), _nothing, {**LORA, "lora_target_modules": ["fc1"]}, "fc1"),
    "a broken adapter on process 0": (("llama", "llama"), _broken_adapter, {"model_name_or_path": "adapter"}, "adapter"),
    "weights that are not finite": (
        ("llama", "llama"),
        _weights_that_are_not_finite,
        {**LORA, "lora_init": "pissa"},
        "cannot start by 'pissa'",
    ),
    "an engine that does not hold": (("mamba", "mamba"), _nothing, {"engine": "shared"}, "the shared engine does not hold"),
    "an optimizer's option": (("llama", "llama"), _nothing, {"optim_args": "nope=1"}, "nope"),
}
OFTEN = [("fsdp2", "a layer that process 0 has not"), ("ddp", "a layer that there is not")]
SELDOM = [(kind, case) for case in CASES for kind in ("fsdp2", "ddp") if (kind, case) not in OFTEN]


@pytest.mark.parametrize(("kind", "case"), [*OFTEN, *(pytest.param(*one, marks=SLOW) for one in SELDOM)])
def test_it_is_told_once_and_both_leave(kind: str, case: str, forks: Zygote, tmp_path: Path) -> None:
    architectures, spoil, options, told = CASES[case]
    homes = [tmp_path / "first", tmp_path / "second"]
    for home, architecture in zip(homes, architectures, strict=True):
        _make_home(home, architecture)
    spoil(*homes)
    config = {
        "model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none", "ddp_timeout": 60, "parallelism": kind, **options,
    }  # fmt: skip
    for home in homes:
        (home / "run.yaml").write_text(yaml.safe_dump(config))
    logs = [tmp_path / "rank-0.log", tmp_path / "rank-1.log"]
    ends = forks.run_ranks("faults.commandjobs:train_at_home", logs, homes=[str(home) for home in homes])
    texts = [log.read_text() for log in logs]
    text = "\n".join(texts)
    assert [end.status for end in ends] == [2, 2], text
    assert "Traceback" not in text
    assert "lost contact" not in text
    assert text.count("orpo train: ") == 1, text
    assert told in " ".join(texts[0].split("orpo train: ")[-1].split()), "by process 0"
