"""Fine-tune a 135M model with ORPO on the packaged preference pairs, and show what changed. Offline, on a CPU in minutes.

Any key of `orpo train` changes the run: orpo demo --orpo_alpha 0.1 --seed 7
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.data.reading.sources import DEMO_DATA

if TYPE_CHECKING:
    from rich.console import Console

    from orpo.run.data import RunData
    from orpo.training.trainer import ORPOTrainer

NAME = "demo"
HELP = "fine-tune a small model on the packaged pairs and show what changed"
TAKES_KEYS = True
RUNS_IN_PARALLEL = True

# recipes/demo.yaml is the same but for the rows held out; a test holds them together. Small models need λ near 1 and a larger rate than
# the paper's.
DEMO_OPTIONS: dict[str, Any] = {
    "model_name_or_path": "smollm2-135m-instruct",
    "dataset_name": DEMO_DATA,
    "dataset_test_split": "test",
    "orpo_alpha": 1.0,
    "learning_rate": 5e-5,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "save_strategy": "no",
}
ANSWER_TOKENS = 64
RESULT_FILE = Path("eval") / "demo.json"
_ROWS = (
    ("accuracy", "accuracy (chosen preferred)", "{:.1%}"),
    ("margin", "margin, nats per token", "{:+.3f}"),
    ("chosen_logp", "log-probability of chosen", "{:+.3f}"),
    ("rejected_logp", "log-probability of rejected", "{:+.3f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that are no keys of the configuration."""
    parser.usage = "orpo demo [--key value …] [--json]"
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Train, compare, and say what to try next."""
    from orpo.run.config import resolve
    from orpo.system.console import print_json, say, stderr_console
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    config = resolve(None, args.keys, base=DEMO_OPTIONS, name=NAME)
    console = stderr_console()
    say(console, "ORPO demo: a support desk's house style, learned from pairs of a good and a plausible but wrong answer.")
    say(console, "One stage: next-token loss on the good answer, plus a term that raises its odds over the other one's.")
    from orpo.cli.progress import ProgressReport
    from orpo.training.runner import run_training

    progress = ProgressReport(console)
    observer = make_observer(console)
    try:
        result = run_training(config, lambda line: say(console, line), [progress], command=NAME, observer=observer)
    finally:
        progress.close()
    stored = result.folder / RESULT_FILE
    outcome = observer.outcome or (json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else None)
    if result.is_already_complete:
        say(console, f"{result.folder} is complete; this is what it showed. `orpo demo --seed 2` makes another run.")
    if outcome is not None:
        show_outcome(console, outcome)
    for line in next_lines(result.folder):
        say(console, line)
    if args.json:
        print_json({"folder": str(result.folder), **(outcome or {})})
    return 0


def make_observer(console: Console) -> Any:
    """What looks at the model before and after training, and keeps the outcome in the run's folder."""
    from orpo.cli.bars import PartBars
    from orpo.evaluate.pairs import paired_difference, score_groups, summarise
    from orpo.inference.generate import generate
    from orpo.system.console import say
    from orpo.system.files import write_atomically
    from orpo.training.runner import Observer

    class BeforeAfter(Observer):
        outcome: dict[str, Any] | None = None

        def look(self, trainer: ORPOTrainer, data: RunData, when: str) -> tuple[list[Any], list[str]]:
            say(console, f"{when:<12} {len(data.held_out or [])} held-out pairs, {len(data.prompts)} answers")
            how: dict[str, Any] = {"compute_dtype": trainer.compute_dtype}
            with PartBars(console) as bars:
                how["progress"] = partial(bars, f"{when}, pairs scored")
                scores = score_groups(trainer.model, data.held_out or [], engine=trainer.engine, **how)
                how["progress"] = partial(bars, f"{when}, answers")
                answers = generate(trainer.model, data.tokenizer, data.encoder, data.prompts, max_new_tokens=ANSWER_TOKENS, **how)
            return scores, [answer.text.strip() for answer in answers]

        def before(self, trainer: ORPOTrainer, data: RunData) -> None:
            if data.held_out:
                self.scores, self.answers = self.look(trainer, data, "before")

        def after(self, trainer: ORPOTrainer, data: RunData) -> None:
            if not data.held_out:
                return
            scores, answers = self.look(trainer, data, "after")
            seed = trainer.args.seed
            self.outcome = {
                "before": summarise(data.held_out, self.scores, seed=seed).to_dict(),
                "after": summarise(data.held_out, scores, seed=seed).to_dict(),
                "change": paired_difference(data.held_out, self.scores, scores, seed=seed).to_dict(),
                "answers": [
                    {"prompt": prompt, "before": old, "after": new}
                    for prompt, old, new in zip(data.prompts, self.answers, answers, strict=True)
                ],
            }
            if trainer.args.should_save:
                path = Path(trainer.args.output_dir or ".") / RESULT_FILE
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, (json.dumps(self.outcome, indent=2, ensure_ascii=False) + "\n").encode())

    return BeforeAfter()


def show_outcome(console: Console, outcome: dict[str, Any]) -> None:
    """The table of before and after, and the answers."""
    from rich.table import Table
    from rich.text import Text

    from orpo.system.console import printable, say

    before, after, change = (outcome[name] for name in ("before", "after", "change"))
    table = Table(title=f"{before['num_pairs']} held-out pairs", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "change", "95 % interval"):
        table.add_column(name, justify="right")
    for key, label, style in _ROWS:
        old, new, moved = before[key]["value"], after[key]["value"], change[key]
        signed = style.replace(":.", ":+.")
        table.add_row(label, style.format(old), style.format(new), signed.format(moved["value"]), _interval(signed, moved))
    say(console)
    console.print(table)
    say(console, verdict(change))
    for answer in outcome["answers"]:
        say(console)
        prompt = answer["prompt"]
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        for label, text, color in (("prompt", shown, "bold"), ("before", answer["before"], "dim"), ("after", answer["after"], "green")):
            line = Text(f"{label:<8}", style="cyan")
            line.append(printable(" ".join(str(text).split())), style=color)
            console.print(line, soft_wrap=not console.is_terminal)
    say(console)


def _interval(style: str, moved: dict[str, float | None]) -> str:
    if moved["low"] is None or moved["high"] is None:
        return ""
    return f"{style.format(moved['low'])} .. {style.format(moved['high'])}"


def verdict(change: dict[str, Any]) -> str:
    """One sentence on what the intervals allow to say."""
    margin = change["margin"]
    if margin["low"] is None:
        return "One prompt is too few for an interval."
    if margin["low"] > 0 and (change.get("chosen_logp", {}).get("high") or 0) < 0:
        return "The margin rose while the good answers became less likely: the model was pushed away from both. Lower the learning rate."
    if margin["low"] > 0:
        return "The margin rose, clear of zero: the model now leans to the good answers among pairs it has not seen."
    if margin["high"] < 0:
        return "The margin fell: the model now leans to the wrong answers. Look at the data, or lower the learning rate."
    return "The margin's change cannot be told from chance. More steps, a larger learning rate or a larger orpo_alpha would show more."


def next_lines(folder: Path) -> list[str]:
    """Where things are and what to try."""
    return [
        f"folder       {folder} (run.json, metrics.jsonl, model, eval)",
        f"next         orpo chat {folder}",
        "             orpo demo --orpo_alpha 0        next-token loss alone: how much was the odds-ratio term?",
        f"             orpo audit {DEMO_DATA}            what else tells good answers from wrong ones in this data",
        "             orpo train recipes/smollm2-full.yaml --dataset_name YOUR.jsonl",
    ]
