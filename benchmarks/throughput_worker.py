"""One side of `throughput.py`: a trainer that takes an optimizer step when its standard input says so."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from orpo.system.machine import peak_memory_bytes

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = {
    "hh": DATA / "hh_harmless" / "harmless-base-test.jsonl.gz",
    "sharegpt": DATA / "sharegpt_demo" / "dpo_en_demo.json",
    "orca": DATA / "orca_dpo" / "validation.jsonl",
}
WORDS = {"hh": (95, 28, 36), "sharegpt": (300, 220, 240), "orca": (190, 140, 240), "ultrafeedback": (155, 265, 265)}
"""Words of prompt, chosen and rejected of made-up rows where there is no file, for about the same tokens."""


def tell(**message: Any) -> None:
    print("@" + json.dumps(message), flush=True)


def load_rows(data: str, tokenizer: Any, num_rows: int, max_length: int = 1024, made_up: bool = False) -> list[dict[str, Any]]:
    """Rows of messages that fit `max_length` whole, in file order, repeated if there are too few."""
    from orpo.data.formats import load_preferences
    from orpo.data.template import TemplateEncoder
    from orpo.data.types import TokenGroup

    if _has_file(data) and not made_up:
        preferences, _, _ = load_preferences(str(FILES[data]), max_rows=4 * num_rows + 200)
    else:
        preferences, _, _ = load_preferences(_made_up(WORDS[data], num_rows))
    groups = TemplateEncoder(tokenizer, max_length=max_length).encode_many(preferences)
    fitting = [preference for preference, group in zip(preferences, groups, strict=True) if isinstance(group, TokenGroup)]
    rows = [
        {
            "prompt": _messages(item.prompt, "user"),
            "chosen": _messages(item.responses[0], "assistant"),
            "rejected": _messages(item.responses[1], "assistant"),
        }
        for item in fitting
    ]
    return [rows[index % len(rows)] for index in range(num_rows)]


def _messages(text: Any, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(message) for message in text]


def _made_up(words: tuple[int, int, int], num_rows: int) -> list[dict[str, str]]:
    source = random.Random(0)
    vocabulary = ["the", "river", "stone", "bridge", "walks", "slowly", "under", "a", "bright", "sky", "and", "children", "write"]

    def text(mean: int) -> str:
        return " ".join(source.choice(vocabulary) for _ in range(max(4, int(source.gauss(mean, mean / 3)))))

    return [dict(zip(("prompt", "chosen", "rejected"), map(text, words), strict=True)) for _ in range(num_rows)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system()}


def kind_of_rows(data: str, made_up: bool) -> str:
    """For the results: the real rows, or made-up ones of about the same lengths."""
    return FILES[data].name if _has_file(data) and not made_up else "made up"


def _has_file(data: str) -> bool:
    return data in FILES and FILES[data].exists()


class OnDemand(TrainerCallback):
    """Holds every step until it is asked for, and times it."""

    def __init__(self, tokens_of_last_step: Any, rows: str) -> None:
        self.tokens_of_last_step = tokens_of_last_step
        self.rows = rows
        self.started = 0.0

    def wait(self) -> None:
        """Wait until the next step is asked for."""
        if sys.stdin.readline().strip() != "step":
            tell(peak_bytes=peak_memory_bytes(self.device))
            sys.exit(0)
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self.device = args.device
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate", "peft")}
        tell(versions=versions, machine=machine(), rows=self.rows)
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        tell(seconds=time.perf_counter() - self.started, tokens=self.tokens_of_last_step())
        self.wait()


RANK = 16
"""Of the adapter, on every linear layer but the head."""


def matmul_floor(model: Any, *, is_full: bool, dtype: torch.dtype) -> Any:
    """A function: seconds that the matrix products of a step over so many tokens take alone, at the model's own shapes.

    Of every linear layer and of the head, forward and gradient of the input; with full fine-tuning gradient of the weight, with LoRA all
    three of the adapter's two layers instead. Products inside attention are not counted.
    """
    frozen: Counter[tuple[int, int]] = Counter()
    trained: Counter[tuple[int, int]] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        shape = module.out_features, module.in_features
        (trained if is_full else frozen)[shape] += 1
        if not is_full and not name.endswith("lm_head"):
            trained[RANK, module.in_features] += 1
            trained[module.out_features, RANK] += 1

    def measure(num_tokens: int) -> float:
        total = 0.0
        for (num_out, num_in), count in (frozen + trained).items():
            weight, x = torch.randn(num_out, num_in, dtype=dtype), torch.randn(num_tokens, num_in, dtype=dtype)
            y = torch.randn(num_tokens, num_out, dtype=dtype)
            total += count * (_best(lambda: x @ weight.t()) + _best(lambda: y @ weight))  # noqa: B023
            if num_trained := trained[num_out, num_in]:
                total += num_trained * _best(lambda: y.t() @ x)  # noqa: B023
        return total

    return measure


def _best(product: Any) -> float:
    """Median of a few runs after one that warms up."""
    product()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def main() -> None:
    side, case, num_steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    from orpo.models.load import load_model

    if side == "floor":
        serve_floor(case)
        return

    model, tokenizer, _ = load_model(case["model"])
    pairs = 4 if case["data"] == "hh" else 2
    rows = load_rows(case["data"], tokenizer, pairs * (num_steps + 1), case["max_length"], case["made_up"])
    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": pairs,
        "max_steps": num_steps + 1,
        "learning_rate": 8e-6,
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "report_to": "none",
        "max_length": case["max_length"],
        "bf16": case["precision"] == "bf16",
        "gradient_checkpointing": case["checkpointing"],
    }
    peft_config = None
    if case["method"] == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    build = _trl if side == "trl" else _orpo
    build(model, tokenizer, rows, options, peft_config, kind_of_rows(case["data"], case["made_up"]))


def serve_floor(case: dict[str, Any]) -> None:
    """Answer how long the matrix products of a step take alone, until told to end."""
    from orpo.models.load import load_model
    from orpo.system.allocator import keep_freed_memory

    keep_freed_memory()  # the yardstick must not be slowed by page faults that the engine does not have
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    measure = matmul_floor(load_model(case["model"]).model, is_full=case["method"] == "full", dtype=dtype)
    tell(ready=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "end":
            tell(ended=True)
            return
        tell(seconds=measure(int(rest[0])))


def _orpo(model: Any, tokenizer: Any, rows: Any, options: Any, peft_config: Any, kind: str) -> None:
    from orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(model=model, args=ORPOConfig(**options), train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.train_sampler.seed = None  # rows in file order, as on the other side
    tokens = [0]
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any) -> Any:
        tokens[0] = sum(batch.num_tokens for batch in inputs.microbatches)
        return step(model, inputs, *rest)

    trainer.training_step = counted
    trainer.add_callback(OnDemand(lambda: tokens[0], kind))
    trainer.train()


def _trl(model: Any, tokenizer: Any, rows: Any, options: Any, peft_config: Any, kind: str) -> None:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = ORPOConfig(use_cpu=not torch.cuda.is_available(), beta=0.1, **options)
    trainer = ORPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft_config
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.add_callback(OnDemand(lambda: 0, kind))
    trainer.train()


if __name__ == "__main__":
    main()
