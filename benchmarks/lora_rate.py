"""The learning rate of a LoRA adapter for ORPO: the demo's pairs, one epoch, a rate a run, beside full fine-tuning.

    python benchmarks/lora_rate.py FOLDER [METHOD:RATE:SEED …]

A run is `orpo demo` for one epoch with that rate and seed; `orpo eval` then reads neutral text with it, to see what was forgotten. Runs
lie in FOLDER, what they gave in results/lora_rate.json; the same command does what is missing there. `--table` prints the table of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "lora_rate.json"
RATES = ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3")
PLANNED = ("full:5e-5:42", *(f"lora:{rate}:42" for rate in RATES))
OPTIONS = {"num_train_epochs": "1", "orpo_alpha": "1.0", "per_device_train_batch_size": "8"}
ADAPTER = {"use_peft": "true", "lora_r": "16", "lora_alpha": "32"}
MEASURES = ("accuracy", "margin", "chosen_logp", "rejected_logp")


def orpo(*words: str) -> dict[str, Any]:
    """What a command prints with `--json`."""
    print("$ orpo", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "orpo", *words, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(folder: Path, method: str, rate: str, seed: str) -> dict[str, Any]:
    """Train, score the held-out pairs, read neutral text."""
    run = folder / f"{method}-{rate}-{seed}"
    options = {**OPTIONS, "learning_rate": rate, "seed": seed, "output_dir": str(run), **(ADAPTER if method == "lora" else {})}
    outcome = orpo("demo", *(word for key, value in options.items() for word in (f"--{key}", value)))
    # Of the task's 24 answers one: the text is what is asked for here.
    retention = orpo("eval", str(run), "--tasks", "retention", "--limit", "1")["tasks"]["retention"]["result"]
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {
        "before": {name: outcome["before"][name] for name in MEASURES},
        "after": {name: outcome["after"][name] for name in MEASURES},
        "change": {name: outcome["change"][name] for name in MEASURES},
        "num_pairs": outcome["after"]["num_pairs"],
        "neutral_text": retention["change"]["nll"],
        "versions": facts["versions"],
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, in the order of method, rate and seed."""
    cells = sorted(results, key=lambda name: (name.split(":")[0], float(name.split(":")[1]), -int(name.split(":")[2])))
    lines = [
        "| | rate | seed | accuracy | margin, nats per token | chosen | rejected | neutral text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in cells:
        method, rate, seed = name.split(":")
        found = results[name]
        after = found["after"]
        lines.append(
            f"| {'LoRA' if method == 'lora' else 'all weights'} | {rate} | {seed} "
            f"| {after['accuracy']['value']:.1%} | {_shown(after['margin'])} "
            f"| {after['chosen_logp']['value']:+.3f} | {after['rejected_logp']['value']:+.3f} | {_shown(found['neutral_text'])} |"
        )
    return "\n".join(lines).replace("%", " %").replace("| -", "| −").replace("(-", "(−").replace(".. -", ".. −")


def _shown(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} .. {estimate['high']:+.3f})"


def main() -> None:
    """Every cell that is asked for and missing."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if sys.argv[1:] == ["--table"]:
        print(table(results))
        return
    folder, *cells = sys.argv[1:]
    for name in cells or PLANNED:
        if name not in results:
            results[name] = measure(Path(folder), *name.split(":"))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
