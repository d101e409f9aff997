"""How long OpenMP's threads should spin while they wait: a run's own steps under each setting, in turn, alone and beside others.

    python benchmarks/spinning.py [--steps 6] [--rounds 3] [--others 2] [--out results.json]

Every setting has a trainer in a process of its own (`hh`, LoRA, bf16), since OpenMP reads its environment once; all take the same rows.
The others are endless loops in sessions of their own, as other people's programs are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from throughput import WARMUP_STEPS, Case, Worker

SETTINGS = {
    "OpenMP's own (300000)": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
"""The first is written out, since a command sets its own where nothing is set."""


def measure(num_steps: int, num_rounds: int, num_others: int) -> dict[str, Any]:
    """Tokens per second of each setting: a list over rounds, quiet and busy."""
    case = Case(method="lora")
    workers = {name: Worker("orpo", case, 2 * num_rounds * num_steps, setting) for name, setting in SETTINGS.items()}
    for worker in workers.values():
        worker.ready()
    for worker in workers.values():
        for _ in range(WARMUP_STEPS):
            worker.ask("step")
    speeds: dict[str, dict[str, list[float]]] = {"quiet": {}, "busy": {}}
    loads = []
    for number in range(2 * num_rounds):
        condition = "quiet" if number % 2 == 0 else "busy"
        loads.append(os.getloadavg()[0])
        others = [loop() for _ in range(num_others if condition == "busy" else 0)]
        try:
            for name, worker in workers.items():
                steps = [worker.ask("step") for _ in range(num_steps)]
                speed = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
                speeds[condition].setdefault(name, []).append(speed)
                print(f"{condition:6} {name:24} {speed:6.0f} tokens/s", flush=True)
        finally:
            for other in others:
                other.kill()
                other.wait()
    for worker in workers.values():
        worker.ask("end")
        worker.process.wait()
    return {"steps": num_steps, "others": num_others, "load_average": loads, "tokens_per_second": speeds}


def loop() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)


def table(result: dict[str, Any]) -> str:
    speeds = result["tokens_per_second"]
    lines = [f"| tokens/s | quiet | {result['others']} other processes |", "|---|---|---|"]
    for name in SETTINGS:
        cells = [f"{statistics.median(of[name]):.0f} ({min(of[name]):.0f}–{max(of[name]):.0f})" for of in (speeds["quiet"], speeds["busy"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="in each round of each setting (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="quiet and busy, so often each (default %(default)s)")
    parser.add_argument("--others", type=int, default=2, metavar="N", help="busy processes beside it (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result = measure(arguments.steps, arguments.rounds, arguments.others)
    print(table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
