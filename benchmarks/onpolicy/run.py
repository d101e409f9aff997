"""The on-policy benchmark, cell by cell: run.py FOLDER [TASK:SEED …]. The same command goes on; finished cells are in results/cells.json.

A cell is a model that is trained (or the start) and the share of right answers among two samples to each of 100 held-out prompts:
`start`, `round-1` to `round-3`, `one-round` (ORPO on as many pairs as the three rounds together, all from the start's answers), and `sft`
(on the right answers that the start gave). Everything goes through the command line, but for the measuring.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tasks

HERE = Path(__file__).resolve().parent
CELLS = HERE / "results" / "cells.json"
MODEL = "smollm2-135m-instruct"
SAMPLING = {"num_samples": 4, "temperature": 0.8, "max_new_tokens": 32}
TRAINING = {
    "orpo_alpha": 1.0,
    "learning_rate": 2e-5,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "warmup_steps": 2,
    "max_length": 256,
}
HELD_OUT = {"num_samples": 2, "seed": 1000}
ONE_ROUND = {"num_samples": 8, "max_pairs": 6}
NUM_ROUNDS = 3
ORDER = ("list:1", "sum:1", "list:2", "list:3")


def orpo(*words: Any) -> None:
    """A command of orpo, to its end."""
    print("$ orpo", *words, flush=True)
    subprocess.run([sys.executable, "-m", "orpo", *map(str, words)], check=True)


def flags(options: dict[str, Any]) -> list[str]:
    """`--key value …`."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


class Bench:
    """One task with one seed."""

    def __init__(self, root: Path, task: str, seed: int) -> None:
        self.root, self.task, self.seed = root, task, seed
        self.folder = root / f"{task}-{seed}"
        self.prompts = root / "prompts" / f"{task}-train.jsonl"
        self.held_out = root / "prompts" / f"{task}-held-out.jsonl"
        self.verify = f"{HERE / 'tasks.py'}:{tasks.CHECKS[task]}"

    def run(self) -> None:
        """All cells that are missing, in order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cell("start", MODEL, {})
        model = MODEL
        for number in range(1, NUM_ROUNDS + 1):
            name = f"round-{number}"
            if not self.is_done(name) or (number < NUM_ROUNDS and not self.is_done(f"round-{number + 1}")):
                pairs = self.pairs(name, model)
                self.train(name, model, pairs)
            model = str(self.folder / name)
            self.cell(name, model, {"num_pairs": self.num_pairs(name)})
            if number == 1:
                self.sft()
        self.one_round()
        for path in self.folder.glob("*/model"):
            shutil.rmtree(path)

    def pairs(self, name: str, model: str, **more: Any) -> Path:
        """Pairs of a model's answers to the training prompts: a right answer against a wrong one of similar length."""
        out = self.folder / f"{name}.jsonl"
        options = {**SAMPLING, "seed": self.seed, "verify": self.verify, "choose": "right_wrong", **more}
        orpo("pairs", self.prompts, "--model", model, "--out", out, "--no_audit", *flags(options))
        return out

    def train(self, name: str, model: str, rows: Path, **more: Any) -> None:
        """Train on rows, from a model."""
        folder = self.folder / name
        options = {**TRAINING, "model_name_or_path": model, "dataset_name": rows, "output_dir": folder, "seed": self.seed}
        orpo("train", *flags({**options, "save_strategy": "no", "report_to": "none", **more}))

    def num_pairs(self, name: str) -> int:
        """Lines of a file of pairs."""
        return len((self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())

    def one_round(self) -> None:
        """ORPO on one round of the same number of pairs."""
        if self.is_done("one-round"):
            return
        wanted = sum(self.num_pairs(f"round-{number}") for number in range(1, NUM_ROUNDS + 1))
        found = self.pairs("one-round-all", MODEL, **ONE_ROUND)
        lines = found.read_text(encoding="utf-8").splitlines()
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        (self.folder / "one-round.jsonl").write_text("\n".join(lines[:wanted]) + "\n", encoding="utf-8")
        self.train("one-round", MODEL, self.folder / "one-round.jsonl")
        self.cell("one-round", str(self.folder / "one-round"), {"num_pairs": min(wanted, len(lines)), "num_wanted": wanted})

    def sft(self) -> None:
        """SFT on the right answers of the start."""
        if self.is_done("sft"):
            return
        rows = []
        for line in (self.folder / "round-1.jsonl.work" / "candidates.jsonl").read_text(encoding="utf-8").splitlines():
            facts = json.loads(line)
            right = {one["text"] for one in facts["candidates"] if one["score"] == 1.0 and one["finish"] == "stop"}
            rows += [{"prompt": facts["prompt"], "response": text} for text in sorted(right)]
        path = self.folder / "sft.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.train("sft", MODEL, path, objective="sft", sft_rows="true")
        self.cell("sft", str(self.folder / "sft"), {"num_rows": len(rows)})

    # ---- cells -------------------------------------------------------------------------------------------------------------------------

    def is_done(self, name: str) -> bool:
        """Whether the cell is in the results."""
        return f"{self.task}:{self.seed}:{name}" in read_cells()["cells"]

    def cell(self, name: str, model: str, facts: dict[str, Any]) -> None:
        """Measure a model and keep what was found."""
        if self.is_done(name):
            return
        began_s = time.monotonic()
        found = self.measure(model)
        kept = {**facts, **found, "measured_s": round(time.monotonic() - began_s, 1)}
        everything = read_cells()
        everything["cells"][f"{self.task}:{self.seed}:{name}"] = kept
        CELLS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        print(self.task, self.seed, name, {key: value for key, value in kept.items() if key != "by_prompt"}, flush=True)

    def measure(self, model: str) -> dict[str, Any]:
        """The held-out pass rate, in a process that ends: its memory is free again."""
        command = [sys.executable, __file__, "--measure", str(self.held_out), model, self.verify, str(self.folder / "held-out")]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return dict(json.loads(result.stdout.splitlines()[-1]))


def measure(prompts: str, model: str, verify: str, work: str) -> None:
    """Print a model's score as JSON."""
    from orpo.inference.ready import Loading
    from orpo.onpolicy.asked import read_asked
    from orpo.onpolicy.heldout import score_held_out
    from orpo.onpolicy.options import OnPolicyOptions

    options = OnPolicyOptions(**{**SAMPLING, **HELD_OUT}, verify=verify)
    asked = read_asked(prompts).prompts
    found = score_held_out(asked, model, options, Path(work), Loading(), lambda line: print(line, file=sys.stderr), lambda *_, **__: None)
    print(json.dumps(found.to_dict()))


def read_cells() -> dict[str, Any]:
    """What was measured so far, with the settings that it was measured under."""
    settings = {"model": MODEL, "sampling": SAMPLING, "training": TRAINING, "held_out": HELD_OUT, "one_round": ONE_ROUND}
    if not CELLS.exists():
        return {"settings": settings, "cells": {}}
    facts: dict[str, Any] = json.loads(CELLS.read_text(encoding="utf-8"))
    if facts["settings"] != settings:
        raise SystemExit(f"{CELLS} was measured under other settings: move it away")
    return facts


def main(words: list[str]) -> None:
    """All cells of the tasks and seeds that are named, or all there are."""
    if words[0] == "--measure":
        measure(*words[1:])
        return
    root = Path(words[0]).resolve()
    tasks.write(root / "prompts")
    for word in words[1:] or ORDER:
        task, _, seed = word.partition(":")
        Bench(root, task, int(seed)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
