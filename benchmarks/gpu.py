"""One GPU, ten minutes: this trainer against TRL's and Liger's, arm by arm on the same random-weight models.

    python benchmarks/gpu.py --minutes 8 --out results        # on a GPU: the cuda tests, then the cells in the order of the goals
    python benchmarks/gpu.py --dry                            # tiny shapes on a CPU: does the script itself work?

Writes results/gpu.json after every arm, and gpu.svg, gpu.txt and a trace of the best arm at the end. What does not fit into the time that
is left is skipped and named. benchmarks/gpu.md says how to bring it to a machine without network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from accelerate import Accelerator
from gpu_arms import ARMS, Arm, CannotRunError, Cell, liger_kernels
from gpu_table import figure, table

HERE = Path(__file__).parent
WORDS = 400
SIX = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class Shape:
    """A model from its configuration alone."""

    kind: str
    options: dict[str, Any]
    is_lora: bool = False


def _shape(kind: str, width: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool, *, lora: bool = False) -> Shape:
    options = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 8192,
    }  # fmt: skip
    return Shape(kind, options, lora)


MODELS = {
    "Qwen2.5-3B": _shape("qwen2", 2048, 11008, 36, 16, 2, 151_936, True),
    "Llama-3.1-8B, LoRA": _shape("llama", 4096, 14336, 32, 32, 8, 128_256, False, lora=True),
    "Llama-3.2-1B": _shape("llama", 2048, 8192, 16, 32, 8, 128_256, True),
}
TINY = {name: _shape(shape.kind, 64, 128, 2, 4, 2, 512, True, lora=shape.is_lora) for name, shape in MODELS.items()}
MIXES = {"HH": (148, 40, 51), "long prompt": (2048, 256, 256), "UltraFeedback": (190, 270, 270), "four answers": (190, 120, 140, 160, 180)}
CELLS = (
    *(("Qwen2.5-3B", mix) for mix in ("HH", "long prompt", "UltraFeedback")),
    *(("Llama-3.1-8B, LoRA", mix) for mix in ("HH", "UltraFeedback")),
    *(("Llama-3.2-1B", mix) for mix in ("HH", "UltraFeedback")),
    ("Qwen2.5-3B", "four answers"),
)
ROWS_PER_STEP = {"HH": 64, "long prompt": 8, "UltraFeedback": 32, "four answers": 16}
COMPILING_S = 120
"""What compiled layers may take before their first step; with less time left the other cells go before."""
COMMON_ROWS = 2
"""Rows of a micro-batch where memory is compared."""


class Clock:
    """The time that was given."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()


def tokenizer_of_words() -> Any:
    """One token a word, so that texts and ids have the same lengths."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def rows_of(mix: tuple[int, ...], count: int) -> tuple[list[Any], list[dict[str, str]]]:
    """Token groups of about these lengths (a quarter more or less), and the same as texts, a row for each pair."""
    from orpo.data.types import TokenGroup, Where

    source = np.random.default_rng(0)
    groups, rows = [], []
    for number in range(count):
        lengths = [max(2, round(source.normal(mean, mean / 4))) for mean in mix]
        prompt, *answers = (source.integers(4, 4 + WORDS, length).astype(np.int32) for length in lengths)
        pairs = ((0, 1),) if len(answers) == 2 else SIX
        groups.append(TokenGroup(prompt, tuple(answers), pairs, (True,) * len(answers), Where("random", number)))
        texts = [" ".join(f"w{token - 4}" for token in ids) for ids in answers]
        for chosen, rejected in pairs:
            rows.append({"prompt": " ".join(f"w{token - 4}" for token in prompt), "chosen": texts[chosen], "rejected": texts[rejected]})
    return groups, rows


def load(shape: Shape, mix: tuple[int, ...], rows_per_step: int, num_steps: int, device: torch.device) -> Cell:
    """Random weights on the device: float32 to be trained whole, bfloat16 under an adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.kind, **shape.options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if shape.is_lora else torch.float32, attn_implementation="sdpa"
        )
    if shape.is_lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
    groups, rows = rows_of(mix, rows_per_step * (num_steps + 1))
    dtype = torch.bfloat16 if device.type == "cuda" or shape.is_lora else torch.float32
    return Cell(model, tokenizer_of_words(), optimizer, groups, rows, len(groups[0].pairs), dtype, shape.is_lora)


def flops_of(cell: Cell, groups: list[Any]) -> float:
    """Useful operations of a step on the packed rows: every token once, attention only where a row may look."""
    config = cell.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    trained = sum(parameter.numel() for parameter in cell.model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in cell.model.parameters())
    embeddings = 0 if config.tie_word_embeddings else cell.model.get_input_embeddings().weight.numel()
    per_token = 4 * (weights - embeddings) + 2 * min(trained, weights - embeddings)
    tokens = sum(group.num_tokens for group in groups)
    seen = 0.0
    for group in groups:
        prompt = len(group.prompt_ids)
        seen += prompt**2 / 2 + sum(len(ids) * prompt + len(ids) ** 2 / 2 for ids in group.response_ids)
    return per_token * tokens + 3 * 4 * config.num_hidden_layers * config.num_attention_heads * head_size * seen


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the device's own products, in this very run."""
    size = 8192 if device.type == "cuda" else 256
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        left @ right
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(stepper: Any, first: int, micro: int, device: torch.device) -> tuple[float, float]:
    """(seconds of a step, of them until the host was free)."""
    stepper.prepare()
    wait(device)
    start = time.perf_counter()
    stepper.step(first, micro)
    host = time.perf_counter() - start
    wait(device)
    return time.perf_counter() - start, host


def start_arm(arm: Arm, cell: Cell, rows: int, warm_up: int) -> tuple[Any, int, dict[str, Any]]:
    """The arm built and warm: (stepper, rows of the largest micro-batch that fits, facts)."""
    stepper = arm.build(cell, rows)
    facts: dict[str, Any] = {}
    if cell.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        stepper.step(0, min(COMMON_ROWS, rows))
    except torch.OutOfMemoryError:
        raise CannotRunError(f"out of memory at {COMMON_ROWS} rows") from None
    if cell.device.type == "cuda":
        facts["common_gb"] = torch.cuda.max_memory_allocated() / 1e9
    micro = rows
    while True:
        try:
            for number in range(warm_up):
                stepper.step(number * rows, micro)
            return stepper, micro, facts
        except torch.OutOfMemoryError:
            cell.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if micro == 1:
                raise CannotRunError("out of memory at one row") from None
            micro //= 2


def run_arms(arms: list[Arm], cell: Cell, rows: int, steps: tuple[int, int], clock: Clock, speed: float) -> dict[str, Any]:
    """Warm each arm up, then let them take turns; results by arm's name."""
    warm_up, num_timed = steps
    ready: dict[str, tuple[Any, int]] = {}
    results: dict[str, Any] = {}
    longest = 0.0
    for arm in arms:
        if clock.left_s < 10 + 2 * longest + (COMPILING_S if arm.compiled else 0):
            results[arm.name] = {"skipped": "no time left"}
            continue
        start = time.monotonic()
        try:
            stepper, micro, facts = start_arm(arm, cell, rows, warm_up)
            ready[arm.name] = stepper, micro
            results[arm.name] = {"micro_rows": micro, "seconds": [], "host_seconds": [], "tokens": [], **facts}
        except CannotRunError as error:
            results[arm.name] = {"cannot": str(error)}
            cell.optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # one arm that fails must not cost the others
            results[arm.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            cell.optimizer.zero_grad(set_to_none=True)
        longest = max(longest, time.monotonic() - start)
    Accelerator(cpu=cell.device.type == "cpu")  # an arm that was refused has left accelerate's shared state empty
    for number in range(warm_up, warm_up + num_timed):
        if ready and clock.left_s < 5:
            break
        for name in list(ready):
            take_turn(name, ready, results[name], cell, number * rows, rows)
    for name in ready:
        summarise(results[name], rows * cell.pairs_per_row, speed)
    return results


def take_turn(name: str, ready: dict[str, tuple[Any, int]], result: dict[str, Any], cell: Cell, first: int, rows: int) -> None:
    """One timed step of an arm. Where memory has become too small since it was tried, its next turn is with half the rows."""
    stepper, micro = ready[name]
    if cell.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, host = timed(stepper, first, micro, cell.device)
    except torch.OutOfMemoryError:
        cell.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        result["micro_rows"] = max(1, micro // 2)
        ready[name] = stepper, result["micro_rows"]
        return
    except Exception as error:  # one arm that fails must not cost the others
        result["failed"] = f"{type(error).__name__}: {error}"[:300]
        cell.optimizer.zero_grad(set_to_none=True)
        del ready[name]
        return
    groups = cell.groups[first : first + rows]
    result["seconds"].append(seconds)
    result["host_seconds"].append(host)
    result["tokens"].append(sum(group.num_tokens for group in groups))
    result.setdefault("flops", []).append(flops_of(cell, groups))
    if cell.device.type == "cuda":
        result["peak_gb"] = max(result.get("peak_gb", 0), torch.cuda.max_memory_allocated() / 1e9)


def summarise(result: dict[str, Any], pairs: int, speed: float) -> None:
    if result["seconds"]:
        total = sum(result["seconds"])
        result["pairs_per_s"] = pairs * len(result["seconds"]) / total
        result["tokens_per_s"] = sum(result["tokens"]) / total
        result["share_of_matmul"] = sum(result["flops"]) / total / speed
        result["mfu_of_989"] = sum(result["flops"]) / total / 989e12
        result["host_share"] = sum(result["host_seconds"]) / total


def run_cell(model: str, mix: str, shapes: dict[str, Shape], args: argparse.Namespace, clock: Clock, speed: float) -> dict[str, Any]:
    """All arms on one model and mix."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry else "cpu")
    rows = 4 if args.dry else ROWS_PER_STEP[mix]
    steps = (1, 2) if args.dry else (3, 8)
    lengths = tuple(max(2, length // 16) for length in MIXES[mix]) if args.dry else MIXES[mix]
    cell = load(shapes[model], lengths, rows, sum(steps), device)
    plain = [arm for arm in ARMS if not arm.with_liger]
    results = run_arms(plain, cell, rows, steps, clock, speed)
    liger = [arm for arm in ARMS if arm.with_liger]
    cell.forget_copies()
    with liger_kernels(cell.model) if device.type == "cuda" else nullcontext():
        results |= run_arms(liger, cell, rows, steps, clock, speed)
    if args.trace and (best := best_of(results)) is not None and best.startswith("orpo"):
        _trace(next(arm for arm in ARMS if arm.name == best), cell, rows, results[best]["micro_rows"], args.out)
        args.trace = False
    return results


def best_of(results: dict[str, Any], prefix: str = "") -> str | None:
    done = [name for name, result in results.items() if name.startswith(prefix) and "pairs_per_s" in result]
    return max(done, key=lambda name: results[name]["pairs_per_s"], default=None)


def _trace(arm: Arm, cell: Cell, rows: int, micro: int, out: Path) -> None:
    stepper = arm.build(cell, rows)
    stepper.step(0, micro)
    with torch.profiler.profile() as profile:
        stepper.step(rows, micro)
        wait(cell.device)
    profile.export_chrome_trace(str(out / "gpu-trace.json"))


def environment() -> dict[str, Any]:
    """What it runs on."""
    import importlib.metadata

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel", "triton", "bitsandbytes", "orpo")
    facts: dict[str, Any] = {"python": platform.python_version(), "versions": {name: version(name) for name in names}}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        facts |= {"device": torch.cuda.get_device_name(0), "memory_gb": memory / 1e9, "cuda": torch.version.cuda}
    return facts


def cuda_tests(minutes: float) -> dict[str, Any]:
    """The tests marked `cuda`, in a process of their own; their last lines."""
    # By name: to collect every test of the suite would take half a minute of the device's time.
    files = sorted(str(path) for path in (HERE.parent / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return {"code": None, "last_lines": [*text.splitlines()[-30:], f"stopped after {minutes:g} minutes"]}
    return {"code": done.returncode, "last_lines": done.stdout.splitlines()[-30:]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything; what does not fit is skipped")
    parser.add_argument("--test-minutes", type=float, default=2.0, help="of them for the cuda tests; 0: none")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only so many, from the first")
    parser.add_argument(
        "--trace", action=argparse.BooleanOptionalAction, default=True, help="one step of the best arm, for chrome://tracing"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        print("no GPU is here; --dry tries the script on a CPU", file=sys.stderr)
        return 2
    clock = Clock(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(), "dry": args.dry, "cells": {}}
    if not args.dry and args.test_minutes > 0:
        results["tests"] = cuda_tests(args.test_minutes)
        print(*results["tests"]["last_lines"][-5:], sep="\n")
    device = torch.device("cpu" if args.dry else "cuda")
    speed = results["matmul_flops"] = matmul_speed(device, torch.float32 if args.dry else torch.bfloat16)
    for model, mix in CELLS[: args.cells]:
        name = f"{model}, {mix}"
        if clock.left_s < 20:
            results["cells"][name] = {"skipped": "no time left"}
            continue
        print(f"{name} … {clock.left_s:.0f} s left", file=sys.stderr, flush=True)
        try:
            results["cells"][name] = run_cell(model, mix, TINY if args.dry else MODELS, args, clock, speed)
        except Exception as error:  # the other cells are worth having
            results["cells"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    print(text)
    (args.out / "gpu.txt").write_text(text + "\n")
    (args.out / "gpu.svg").write_text(figure(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
