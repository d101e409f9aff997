"""A finished run of a few steps, for tests of what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo.cli import main


def train_tiny(folder: Path, tiny_model_factory: Callable[..., Any], tiny_tokenizer_factory: Callable[..., Any]) -> Path:
    """Train a tiny model on forty rows, a part of whose prompts is held out; the base lies beside the run as `base`."""
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!", "topic": "abc"[n % 3]} for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "eval_fraction": 0.3,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "orpo_alpha": 1.0,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
    }
    assert main(["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    return folder / "run"
