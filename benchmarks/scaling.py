"""How the engine's cost grows: with the prompt's length, with the vocabulary, and with the number of pairs per prompt.

    python benchmarks/scaling.py [--out results.json] [--figure cost.svg]

Forward and backward of one micro-batch through the shared engine, SmolLM2-135M's shape, bf16 working weights. Memory is the peak of a
process of its own per point, above what the process held before the step.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

MEMORY_BUDGET_BYTES = 64 * 2**20
"""For vocabulary-sized tensors where memory is measured: so small that every vocabulary fills it."""
PROMPTS = (128, 256, 512, 1024, 2048, 4096)
VOCABULARIES = (49_152, 98_304, 196_608, 262_144)
QA_FEEDBACK = Path(__file__).parents[2] / "shared" / "data" / "qa_feedback" / "dev_feedback.json"
WIDTH, LAYERS, HEADS, KEY_HEADS, MLP = 576, 30, 9, 3, 1536


def make_model(vocabulary: int) -> Any:
    """SmolLM2-135M's shape with random weights, float32, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from orpo.engine import attention

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    attention.register()
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention.NAME)
    return model


def random_group(vocabulary: int, prompt: int, *answers: int, pairs: Any = ((0, 1),)) -> Any:
    from orpo.data.types import TokenGroup, Where

    source = np.random.default_rng(prompt)
    ids = [source.integers(0, vocabulary, size).astype(np.int32) for size in (prompt, *answers)]
    return TokenGroup(ids[0], tuple(ids[1:]), tuple(pairs), (True,) * len(answers), Where("random", 0))


class Stepper:
    """Forward and backward of a micro-batch, as a training step does them."""

    def __init__(self, vocabulary: int) -> None:
        from orpo.engine.fused import fused_modules
        from orpo.engine.precision import WorkingWeights
        from orpo.system.allocator import keep_freed_memory, limit_kernel_cache

        limit_kernel_cache()
        keep_freed_memory()
        self.model = make_model(vocabulary)
        self.fused = fused_modules(self.model)
        self.fused.__enter__()
        self.weights = WorkingWeights(self.model)

    def run(self, groups: list[Any], budget_bytes: int = 256 * 2**20) -> float:
        """Seconds of one pass."""
        from orpo.engine import shared
        from orpo.engine.layout import collate
        from orpo.objective import ORPO

        batch = collate(groups)
        start = time.perf_counter()
        with self.weights.active():
            shared.step(self.model, batch, ORPO(), budget_bytes=budget_bytes).loss.backward()
        self.weights.release()
        spent = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return spent

    def median(self, groups: list[Any], runs: int = 5) -> float:
        self.run(groups)
        return statistics.median(self.run(groups) for _ in range(runs))


def attention_seconds(groups: list[Any]) -> float:
    """Time of the attention function alone, forward and backward, over all layers of a micro-batch of these groups."""
    from orpo.engine.attention import shared_attention_forward
    from orpo.engine.layout import collate

    batch = collate(groups)
    width = WIDTH // HEADS
    shapes = [(1, batch.num_tokens, heads, width) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for shape in shapes]
    gradient = torch.randn(shapes[0], dtype=torch.bfloat16)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        output, _ = shared_attention_forward(torch.nn.Module(), *inputs, None, shared_layout=batch.layout)
        torch.autograd.grad(output, inputs, gradient)
        times.append(time.perf_counter() - start)
    return LAYERS * statistics.median(times[1:])


def cost_by_length() -> list[dict[str, float]]:
    """Time per token as the prompt grows; about 1,000 tokens or more per micro-batch, so that short prompts are not judged by overhead."""
    stepper = Stepper(49_152)
    points = []
    for prompt in PROMPTS:
        group = random_group(49_152, prompt, 48, 48)
        groups = [group] * max(1, round(1024 / group.num_tokens))
        tokens = sum(item.num_tokens for item in groups)
        seconds, in_attention = stepper.median(groups), attention_seconds(groups)
        points.append(
            {
                "prompt_tokens": prompt,
                "tokens": tokens,
                "ms_per_token": 1e3 * seconds / tokens,
                "ms_per_token_without_attention": 1e3 * (seconds - in_attention) / tokens,
            }
        )
    return points


def _memory_point(vocabulary: int, pipe: Any) -> None:
    from orpo.system.allocator import return_freed_memory
    from orpo.system.machine import peak_memory_bytes

    stepper = Stepper(vocabulary)
    groups = [random_group(vocabulary, 148, 40, 51) for _ in range(4)]
    # The model is made before, in float32 and by random numbers; only the step's own peak counts.
    return_freed_memory()
    _forget_peak()
    before = _resident_bytes()
    stepper.run(groups, MEMORY_BUDGET_BYTES)
    peak = peak_memory_bytes(torch.device("cpu"))
    head = vocabulary * WIDTH
    # What belongs to the head itself: its gradient, from the output and from the input side of the tied weight.
    pipe.send(
        {
            "vocabulary": vocabulary,
            "step_gb": (peak - before) / 1e9,
            "head_gradients_gb": 2 * head * 2 / 1e9,
        }
    )


def _resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    """Start the process's peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_by_vocabulary() -> list[dict[str, float]]:
    """Peak memory of a step as the vocabulary grows, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    points = []
    for vocabulary in VOCABULARIES:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_memory_point, args=(vocabulary, sender))
        process.start()
        point = receiver.recv()
        process.join()
        point["step_beyond_head_gb"] = point["step_gb"] - point["head_gradients_gb"]
        points.append(point)
    return points


def pairs_per_prompt() -> dict[str, float]:
    """Groups of four answers with six pairs against the same pairs sent one by one."""
    from orpo.data.types import TokenGroup

    groups = _qa_groups() or [random_group(49_152, 260, 60, 70, 50, 65, pairs=((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)))] * 6
    groups = [group for group in groups if len(group.pairs) == 6][:6]
    singles = [
        TokenGroup(group.prompt_ids, (group.response_ids[chosen], group.response_ids[rejected]), ((0, 1),), (True, True), group.where)
        for group in groups
        for chosen, rejected in group.pairs
    ]
    stepper = Stepper(49_152)
    ratios, rates = [], []
    for _ in range(5):
        together = stepper.run(groups[:2])
        apart = sum(stepper.run(singles[start : start + 4]) for start in range(0, 12, 4))
        ratios.append(apart / together)
        rates.append(12 / together)
    return {
        "groups": len(groups), "pairs_per_second_as_groups": statistics.median(rates[1:]), "speedup_median": statistics.median(ratios[1:]),
        "speedup_min": min(ratios[1:]), "speedup_max": max(ratios[1:]),
    }  # fmt: skip


def _qa_groups() -> list[Any]:
    if not QA_FEEDBACK.exists():
        return []
    from orpo.data.formats import load_preferences
    from orpo.data.template import TemplateEncoder
    from orpo.data.types import TokenGroup
    from orpo.models.load import load_tokenizer

    preferences, _, _ = load_preferences(str(QA_FEEDBACK), pairs="all", max_rows=200)
    encoded = TemplateEncoder(load_tokenizer("smollm2-135m-instruct")).encode_many(preferences)
    return [group for group in encoded if isinstance(group, TokenGroup)]


def draw(points: list[dict[str, float]], path: Path) -> None:
    """Cost per token against the prompt's length, and the same without attention's own time, as an SVG."""
    lengths = [point["prompt_tokens"] for point in points]
    series = {
        "measured": [point["ms_per_token"] for point in points],
        "without the attention function's own time": [point["ms_per_token_without_attention"] for point in points],
    }
    highest = max(max(values) for values in series.values())
    tick = next(size for size in (0.25, 0.5, 1, 2, 5, 10, 20) if 5 * size >= highest)
    num_ticks = math.ceil(highest / tick)
    top = num_ticks * tick
    x = [70 + 520 * index / (len(lengths) - 1) for index in range(len(lengths))]

    def y(value: float) -> float:
        return 300 - 220 * value / top

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="640" height="360" fill="white"/>')
    parts.append('<text x="70" y="24" font-size="14">Milliseconds per token, forward and backward</text>')
    for value in (tick * number for number in range(num_ticks + 1)):
        parts.append(f'<line x1="70" x2="590" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="62" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for position, length in zip(x, lengths, strict=True):
        parts.append(f'<text x="{position:.1f}" y="318" text-anchor="middle">{length}</text>')
    parts.append('<text x="330" y="340" text-anchor="middle">tokens of the prompt (two answers of 48 tokens)</text>')
    for (name, values), color, row in zip(series.items(), ("#1f5fa8", "#d9822b"), (46, 62), strict=True):
        points_text = " ".join(f"{px:.1f},{y(value):.1f}" for px, value in zip(x, values, strict=True))
        parts.append(f'<polyline points="{points_text}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="90" y="{row}" fill="{color}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    results = {"length": cost_by_length(), "vocabulary": memory_by_vocabulary(), "pairs_per_prompt": pairs_per_prompt()}
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.figure:
        draw(results["length"], args.figure)


if __name__ == "__main__":
    main()
