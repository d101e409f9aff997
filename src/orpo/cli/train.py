"""Train from a YAML file, from flags, or both: orpo train CONFIG.yaml [--key value …]

The same command again resumes from the newest checkpoint that verifies, and does nothing once the run is complete.
Keys are those of ORPOConfig and transformers' TrainingArguments, TRL's names (docs/trl-compatibility.md), and the keys below.
A flag goes before the file, the file before the default.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import UserError
from orpo.system.place import own_rank

if TYPE_CHECKING:
    from rich.console import Console

    from orpo.run.config import RunConfig
    from orpo.training.runner import RunResult

NAME = "train"
HELP = "fine-tune a model with ORPO from a YAML file and flags"
TAKES_KEYS = True
RUNS_IN_PARALLEL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that are no keys of the configuration, and list the keys that are most often needed."""
    from orpo.run.keys import RunKeys

    parser.usage = "orpo train [CONFIG.yaml] [--num_processes N] [--key value …] [--json]"
    parser.add_argument(
        "--num_processes", "--num-processes", type=int, metavar="N", help="train with N processes of this machine, as torchrun does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--objectives", action="store_true", help="list what can be optimised, with the options of each, and leave; plugins' too"
    )
    keys = [
        (item.name, str(item.metadata["help"])) for item in dataclasses.fields(RunKeys) if not item.metadata["help"].startswith("TRL's")
    ]
    shown = "\n".join(f"  --{name:<28}{text}" for name, text in keys)
    parser.epilog = (
        f"model, data and adapter:\n{shown}\n\nmost used of the others:\n"
        "  --orpo_alpha                  lambda, the weight of the odds-ratio term (0.1; near 1 below 1B parameters)\n"
        "  --learning_rate               8e-6; small models need more, 5e-5 for instance\n"
        "  --num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps\n"
        "  --max_length, --truncation, --chat_template, --output_dir, --seed\n"
    )


def run(args: argparse.Namespace) -> int:
    """Train; exit code 0 also where the run was complete already."""
    if args.objectives:
        return _list_objectives(args.keys)
    from orpo.system.launch import run_in_several

    code = run_in_several(args.words, args.num_processes)
    if code is not None:
        return code
    from orpo.run.config import resolve
    from orpo.system.console import print_json, say, stderr_console
    from orpo.system.group import told_together
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    config = told_together(lambda: resolve(None, args.keys))
    console = stderr_console()
    from orpo.cli.progress import ProgressReport

    if config["rounds"] is not None or config["on_policy"] is not None:
        return _run_rounds(config, console, is_json=args.json)
    from orpo.training.runner import run_training

    progress = ProgressReport(console)
    try:
        result = run_training(config, lambda line: say(console, line), [progress])
    finally:
        progress.close()
    for line in closing_lines(result):
        say(console, line)
    if args.json and own_rank() == 0:
        print_json(asdict(result))
    return 0


def _run_rounds(config: RunConfig, console: Console, *, is_json: bool) -> int:
    """Round after round (`orpo.onpolicy.rounds`)."""
    from orpo.cli.bars import PartBars
    from orpo.cli.progress import ProgressReport
    from orpo.onpolicy.rounds import best_round, run_rounds
    from orpo.system.console import print_json, say

    reports: list[ProgressReport] = []

    def report() -> list[ProgressReport]:
        close()
        reports.append(ProgressReport(console))
        return reports[-1:]

    def close() -> None:
        while reports:
            reports.pop().close()

    def bars() -> PartBars:
        close()
        return PartBars(console)

    try:
        facts = run_rounds(config, lambda line: say(console, line), report, bars)
    finally:
        close()
    folder = Path(config.output_dir)
    done = "are complete; nothing was done" if facts["is_already_complete"] else "are done"
    say(console, f"{len(facts['rounds'])} rounds {done}: {folder}" + (f" ({facts['stopped_because']})" if facts["stopped_because"] else ""))
    best = folder / best_round(facts)
    scores = [one["held_out"]["value"] for one in facts["rounds"] if one["held_out"] is not None]
    if scores and max(scores) <= facts["start"]["value"]:
        say(console, "note         no round has a better held-out score than the start")
    say(console, f"next         orpo report {folder}   ·   orpo chat {best}   ·   orpo export {best}")
    if is_json:
        print_json({"folder": str(folder), "best": str(best), **facts})
    return 0


def _list_objectives(keys: Sequence[str]) -> int:
    from orpo.config.objectives import describe_objectives
    from orpo.run.read import load_named_plugins, read_flags

    problems: list[UserError] = []
    words = read_flags(keys, [])[1]
    load_named_plugins(Path(words[0]) if words else None, keys, problems)
    if problems:
        raise problems[0]
    print(describe_objectives())
    return 0


def closing_lines(result: RunResult) -> list[str]:
    """What a user wants to know at the end: the outcome, where it is, what next."""
    from orpo.cli.progress import describe_log

    folder = result.folder
    if result.is_already_complete:
        lines = [f"{folder} is complete; nothing was done. Another output_dir, or another configuration, makes a new run."]
    else:
        lines = [f"done         {folder}"]
    if result.weights is not None:
        lines.append(f"weights      {result.weights}")
    if result.metrics:
        lines.append(f"held out     {describe_log(result.metrics, 'eval_')}")
    return [*lines, f"next         orpo chat {folder}   ·   orpo eval {folder}   ·   orpo report {folder}   ·   orpo export {folder}"]
