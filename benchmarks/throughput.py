"""Training throughput and memory: TRL's ORPOTrainer and this one in turn, in one run.

    python benchmarks/throughput.py                         # the four bf16 cases of the README table
    python benchmarks/throughput.py --matrix                # data x method x precision x checkpointing
    python benchmarks/throughput.py --data hh --method lora --precision bf16 --steps 12

Both trainers live in a process of their own, with the model loaded and the run begun, and take one optimizer step each in turn, so that
the speed of a shared machine drifts under both alike; every ratio is of two neighbouring steps. A step is the whole thing as `train()`
does it: collation, forward, backward, clipping, optimizer, schedule. Both see the same rows in the same order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Case:
    """One comparison. `data` is "hh" (4 pairs a step), "sharegpt", "orca" or "ultrafeedback" (2 pairs a step, length 1024)."""

    data: str = "hh"
    method: str = "full"
    precision: str = "bf16"
    checkpointing: bool = False
    model: str = "smollm2-135m-instruct"
    max_length: int = 1024
    made_up: bool = False

    @property
    def pairs_per_step(self) -> int:
        return 4 if self.data == "hh" else 2

    def __str__(self) -> str:
        return f"{self.data}, {self.method}, {self.precision}{', checkpointing' if self.checkpointing else ''}"


class Worker:
    """A trainer in its own process, stepping when told to."""

    def __init__(self, side: str, case: Case, num_steps: int, variables: dict[str, str] | None = None) -> None:
        command = [sys.executable, str(HERE / "throughput_worker.py"), side, json.dumps(asdict(case)), str(num_steps + WARMUP_STEPS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(variables or {})}
        )

    def ready(self) -> dict[str, Any]:
        """Wait until the model is loaded and the run begun; what the worker says of itself."""
        return self.read()

    def read(self) -> dict[str, Any]:
        """The worker's next message; whatever else it prints is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"a worker ended early with code {self.process.wait()}")

    def ask(self, what: str) -> dict[str, Any]:
        """Send one word, wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.read()


def run(case: Case, num_steps: int) -> dict[str, Any]:
    """Both sides of a case, step by step in turn."""
    workers = {side: Worker(side, case, num_steps) for side in ("trl", "orpo")}
    yardstick = Worker("floor", case, num_steps)  # a process of its own, so that its memory is nobody's
    facts = {side: worker.ready() for side, worker in {**workers, "floor": yardstick}.items()}
    load_before = os.getloadavg()[0]
    for _ in range(WARMUP_STEPS):
        for worker in workers.values():
            worker.ask("step")
    seconds: dict[str, list[float]] = {"trl": [], "orpo": []}
    floors, tokens = [], []
    for number in range(num_steps):
        order = list(workers) if number % 2 == 0 else list(workers)[::-1]
        for side in order:
            answer = workers[side].ask("step")
            seconds[side].append(answer["seconds"])
            if side == "orpo":
                tokens.append(answer["tokens"])
        floors.append(yardstick.ask(f"floor {tokens[-1]}")["seconds"])
    peaks = {side: worker.ask("end")["peak_bytes"] for side, worker in workers.items()}
    yardstick.ask("end")
    for worker in (*workers.values(), yardstick):
        worker.process.wait()
    ratios = [trl / orpo for trl, orpo in zip(seconds["trl"], seconds["orpo"], strict=True)]
    shares = [floor / spent for floor, spent in zip(floors, seconds["orpo"], strict=True)]
    return {
        **asdict(case),
        "num_steps": num_steps,
        "versions": facts["orpo"]["versions"],
        "machine": facts["orpo"]["machine"],
        "rows": facts["orpo"]["rows"],
        "load_average": [load_before, os.getloadavg()[0]],
        "seconds": seconds,
        "packed_tokens": tokens,
        "throughput_ratio": sum(seconds["trl"]) / sum(seconds["orpo"]),
        "pairs_per_second": {side: case.pairs_per_step * num_steps / sum(values) for side, values in seconds.items()},
        "tokens_per_second": {"orpo": sum(tokens) / sum(seconds["orpo"])},
        "peak_gb": {side: peak / 1e9 for side, peak in peaks.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory_ratio": peaks["orpo"] / peaks["trl"],
        "matmul_share": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| case | steps | TRL pairs/s | orpo pairs/s | throughput | per step (min–max) | TRL GB | orpo GB | memory | matmul share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = Case(*(result[name] for name in Case.__dataclass_fields__))
        ratio, share = result["ratio"], result["matmul_share"]
        lines.append(
            f"| {case} | {result['num_steps']} | {result['pairs_per_second']['trl']:.2f} | {result['pairs_per_second']['orpo']:.2f} "
            f"| {result['throughput_ratio']:.2f} × | {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}) "
            f"| {result['peak_gb']['trl']:.1f} "
            f"| {result['peak_gb']['orpo']:.1f} | {result['memory_ratio']:.2f} × | {share['median']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["hh", "sharegpt", "orca", "ultrafeedback"])
    parser.add_argument("--method", choices=["full", "lora"])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--matrix", action="store_true", help="every combination")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each side")
    parser.add_argument("--model", default=Case.model, help="a folder or hub id; what is bundled by default")
    parser.add_argument("--max-length", type=int, default=Case.max_length)
    parser.add_argument("--made-up", action="store_true", help="made-up rows of about the same lengths, as where the real ones are absent")
    parser.add_argument("--out", type=Path, help="write the results as JSON; cases that are in it already are kept and not run again")
    args = parser.parse_args()
    base = Case(
        precision=args.precision, checkpointing=args.checkpointing, model=args.model, max_length=args.max_length, made_up=args.made_up
    )
    cases = [
        replace(base, data=data, method=method)
        for data in ([args.data] if args.data else ["hh", "sharegpt"])
        for method in ([args.method] if args.method else ["full", "lora"])
    ]
    if args.matrix:
        kinds = itertools.product(["bf16", "fp32"], [False, True], ["hh", "sharegpt"], ["full", "lora"])
        cases = [replace(base, data=data, method=method, precision=precision, checkpointing=on) for precision, on, data, method in kinds]
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    done = [Case(*(result[name] for name in Case.__dataclass_fields__)) for result in results]
    for case in cases:
        if case in done:
            continue
        print(f"{case} …", file=sys.stderr, flush=True)
        results.append(run(case, args.steps))
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
