"""Does `torch.compile` pay? Forward and backward of the same micro-batches, as they are and compiled.

    python benchmarks/compiled.py [--batches 6] [--out results.json]

Micro-batches of four groups with lengths like those of `hh_harmless`, all different, as packed rows are. Both models take the same ones
in turn: once while shapes are new, then again, when everything that compiling can learn is known. SmolLM2-135M's shape, random weights.

Compiled is each decoder layer, in place of the lean norms and MLPs. The block attention is left out of it (Dynamo cannot trace its backward
pass), and so is the head, which is installed anew for every micro-batch.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from scaling import Stepper, random_group
from transformers import AttentionInterface

from orpo.engine import attention

VOCABULARY = 49_152


def batches(count: int) -> list[list[Any]]:
    """Micro-batches of four groups, prompts of about 150 tokens and answers of about 45."""
    source = random.Random(0)
    return [
        [random_group(VOCABULARY, source.randint(60, 240), source.randint(10, 90), source.randint(10, 90)) for _ in range(4)]
        for _ in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain, compiled = Stepper(VOCABULARY), Stepper(VOCABULARY)
    compiled.fused.__exit__(None, None, None)
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.shared_attention_forward))
    for layer in compiled.model.model.layers:
        layer.compile(dynamic=True)
    steps = batches(args.batches)
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "tokens": []}
    plain.run(steps[0])
    for name in ("new shapes", "shapes seen before"):
        seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
        for groups in steps:
            seconds["plain"].append(plain.run(groups))
            seconds["compiled"].append(compiled.run(groups))
        ratios = [old / new for old, new in zip(seconds["plain"], seconds["compiled"], strict=True)]
        results[name] = {"seconds": seconds, "speedup": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}}
    results["tokens"] = [sum(group.num_tokens for group in groups) for groups in steps]
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
