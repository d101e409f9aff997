"""Compare SFT, SFT + DPO, SimPO and ORPO on your data: orpo compare CONFIG.yaml [--key value …] [options]

Every method starts from the same weights, sees the same pairs in the same order, and gets the same grid of learning rates and its own
strength, decided on validation rows; the test rows are looked at once, by the chosen settings. The same command again goes on where it
was stopped; more seeds, methods or grid points do only what is missing. `orpo report FOLDER` shows the result as a page.

  orpo compare recipes/demo.yaml
  orpo compare recipes/demo.yaml --methods sft,orpo --seeds 42,1,2 --learning_rates 1e-5,5e-5 --strengths orpo=0.1,1
  orpo compare recipes/demo.yaml --eval "--tasks ifeval --ifeval_prompts FILE --limit 100"
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from orpo.compare import CompareOptions

NAME = "compare"
HELP = "train SFT, SFT+DPO, SimPO and ORPO alike on the same data, and say what differs"
TAKES_KEYS = True
LABEL_CELLS = 15
"""Width of "does not hold", behind which a claim is told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; all others are keys of the configuration, as for `orpo train`."""
    parser.usage = "orpo compare CONFIG.yaml [--key value …] [options]"
    parser.add_argument(
        "--methods", default="sft,sft+dpo,simpo,orpo", help="of `orpo train --objectives`, or two in turn: sft+dpo (%(default)s)"
    )
    parser.add_argument("--seeds", help="of data order and adapters, comma-separated; the first decides the grids (the configuration's)")
    parser.add_argument("--learning_rates", help="grid for every method (the configuration's rate and a third of it)")
    parser.add_argument(
        "--strengths",
        action="append",
        default=[],
        metavar="METHOD=A,B",
        help="grid of a method's own strength: orpo_alpha (0.1,1), dpo_beta (0.05,0.1), simpo_beta (2,10); repeatable",
    )
    parser.add_argument("--tune_rows", type=int, help="most training rows of a trial (all, and the chosen trial is its seed's run)")
    parser.add_argument("--max_train_rows", type=int, help="most training rows, picked by a hash of the prompts (all)")
    parser.add_argument("--max_eval_rows", type=int, help="most rows of validation and of test each (all)")
    parser.add_argument("--test_fraction", type=float, default=0.2, help="of the prompts, where the configuration holds none out (0.2)")
    parser.add_argument("--validation_fraction", type=float, default=0.15, help="of the other prompts, to decide the grids on (0.15)")
    parser.add_argument("--points", type=int, default=8, help="points of the first seed's curves of log-probabilities (8)")
    parser.add_argument("--sweep", action="store_true", help="five rates by five strengths for ORPO and SFT+DPO: which is more stable?")
    parser.add_argument(
        "--eval", action="append", default=[], metavar="ARGUMENTS", help="arguments of `orpo eval` for every run; @METHOD is its run"
    )
    parser.add_argument(
        "--num_processes",
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="train each stage with N processes of this machine (1); a step has N times the rows",
    )
    parser.add_argument("--output", help="the comparison's folder (runs/NAME-comparison); its runs go into it")
    parser.add_argument("--json", action="store_true", help="print comparison.json as one object on stdout")


def run(args: argparse.Namespace) -> int:
    """Compare; exit code 0 whoever wins."""
    from orpo.compare import compare
    from orpo.run.config import resolve
    from orpo.system.console import print_json, report_console, say, stderr_console
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    config = resolve(None, args.keys)
    options = _options(args, float(config["learning_rate"]), int(config["seed"]))
    console = stderr_console()
    facts = compare(config, options, lambda line: say(console, line))
    report = report_console(is_json=args.json)
    _print_scores(report, facts)
    _print_costs(report, facts)
    for line in _closing_lines(facts):
        say(report, line, label_cells=LABEL_CELLS)
    if args.json:
        print_json(facts)
    return 0


def _options(args: argparse.Namespace, learning_rate: float, seed: int) -> CompareOptions:
    from orpo.compare import CompareOptions, Split

    split = Split(args.test_fraction, args.validation_fraction, args.max_train_rows, args.max_eval_rows, args.tune_rows)
    rates = _numbers(args.learning_rates, "--learning_rates") if args.learning_rates else (learning_rate / 3, learning_rate)
    return CompareOptions(
        methods=tuple(name.strip() for name in args.methods.split(",") if name.strip()),
        seeds=tuple(int(number) for number in _numbers(args.seeds, "--seeds", is_whole=True)) if args.seeds else (seed,),
        learning_rates=rates,
        strengths=dict(_strengths(args.strengths)),
        split=split,
        num_points=args.points,
        sweep=args.sweep,
        evaluations=tuple(args.eval),
        output=args.output,
        num_processes=args.num_processes,
    )


def _strengths(given: list[str]) -> Any:
    for text in given:
        method, _, numbers = text.partition("=")
        if not numbers:
            raise UserError(f"found {text!r}", where="--strengths", expected="METHOD=NUMBER,NUMBER such as orpo=0.1,1")
        yield method.strip(), _numbers(numbers, "--strengths")


def _numbers(text: str, where: str, *, is_whole: bool = False) -> tuple[float, ...]:
    try:
        return tuple(int(part) if is_whole else float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"found {text!r}", where=where, expected="numbers with commas between them") from None


def _print_scores(console: Console, facts: dict[str, Any]) -> None:
    from orpo.system.console import print_table

    num_pairs, num_seeds = facts["start"]["test"]["num_pairs"], len(facts["options"]["seeds"])
    title = f"{num_pairs} test pairs, {num_seeds} seed{'s' if num_seeds > 1 else ''}, 95 % intervals over prompts; nats per token"
    rows = [["start", *(_number(facts["start"]["test"].get(name), name) for name in _SHOWN), "", ""]]
    for method in facts["methods"].values():
        summary = method.get("summary", {})
        settings = " ".join(f"{key} {value:g}" for key, value in (method["options"] or {}).items())
        rows.append([method["label"], *(_number(summary.get(name), name) for name in (*_SHOWN, "moved_accuracy")), settings])
    print_table(console, title, ("", "accuracy", "margin", "chosen", "rejected", "implicit reward", "settings"), rows, num_texts=7)


_SHOWN = ("accuracy", "margin", "chosen_logp", "rejected_logp")


def _number(estimate: dict[str, Any] | None, name: str) -> str:
    if estimate is None:
        return ""
    scale, style = (100, ".1f") if name.endswith("accuracy") else (1, "+.3f" if name == "margin" else ".3f")
    value, low, high = (None if estimate[key] is None else format(scale * estimate[key], style) for key in ("value", "low", "high"))
    return str(value) if low is None else f"{value} ({low} to {high})"


def _print_costs(console: Console, facts: dict[str, Any]) -> None:
    from orpo.system.console import human_bytes, human_seconds, print_table

    rows = []
    for method in facts["methods"].values():
        totals = [run["totals"] for run in method["runs"]]
        if not totals:
            continue
        mean = {name: sum(total[name] for total in totals) / len(totals) for name in totals[0]}
        rows.append(
            [
                method["label"],
                f"{mean['forward_passes']:,.0f}",
                f"{mean['backward_passes']:,.0f}",
                f"{mean['forward_tokens'] + mean['reference_tokens']:,.0f}",
                f"{mean['flops']:.3g}",
                human_seconds(mean["train_s"] + mean["reference_s"]),
                human_bytes(mean["peak_bytes"]),
            ]
        )
    columns = ("", "answers forward", "answers backward", "tokens", "FLOPs", "training", "peak memory")
    print_table(console, "cost of a run, all stages, mean over seeds", columns, rows)


def _closing_lines(facts: dict[str, Any]) -> list[str]:
    words = {True: "holds", False: "does not hold", None: "open"}
    claims = [f"{words[item['holds']]:<{LABEL_CELLS}}{item['claim']}: {item['evidence']}" for item in facts["claims"]]
    ends = {"folder": facts["folder"], "next": f"orpo report {facts['folder']}"}
    return [*claims, *(f"{name:<{LABEL_CELLS}}{text}" for name, text in ends.items())]
