"""Evaluate a run or a model: held-out pairs, retention, IFEval, MT-Bench, AlpacaEval, your own prompts.

  orpo eval runs/first                                      held-out pairs and retention, before and after
  orpo eval runs/first --tasks ifeval --ifeval_prompts FILE
  orpo eval runs/first --tasks mtbench --mtbench FOLDER --judge_url http://127.0.0.1:8000/v1 --judge_model NAME
  orpo eval --tasks alpacaeval --answers OUTPUTS.json --alpaca_reference REFERENCE.json --judge_url …

Results, answers and judgements go to the run's eval/ folder. The same command again continues what was interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError, UserErrors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from orpo.evaluate.options import EvalOptions

NAME = "eval"
HELP = "evaluate a run or a model: pairs, retention, IFEval, MT-Bench, AlpacaEval, own prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "target", nargs="?", metavar="RUN|MODEL", help="run folder, model folder, hub id, GGUF file or smollm2-135m-instruct"
    )
    parser.add_argument(
        "--tasks",
        default="pairs,retention",
        help="comma-separated: pairs, retention, ifeval, mtbench, alpacaeval, custom (pairs,retention)",
    )
    parser.add_argument("--output", type=Path, help="folder for results (the run's eval/, else eval/MODEL)")
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on stdout")
    parser.add_argument("--limit", type=int, help="most rows or prompts of each task")
    parser.add_argument("--seed", type=int, default=0, help="of samples and intervals (0)")
    _add_comparison(parser.add_argument_group("what it is compared with"))
    _add_sources(parser.add_argument_group("data and prompts"))
    _add_generation(parser.add_argument_group("model and generation"))
    _add_judge(parser.add_argument_group("judge (mtbench, alpacaeval, custom)"))


def _add_comparison(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--against", metavar="RUN|MODEL", help="model to compare with (the one that the run started from)")
    group.add_argument("--no_before", action="store_true", help="compare a run with nothing")
    group.add_argument("--answers", type=Path, help="file with answers instead of generating them (one of the tasks with prompts)")
    group.add_argument("--against_answers", type=Path, help="custom: file with the other side's answers")


def _add_sources(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", help="pairs: rows with chosen and rejected answers (those that the run held out)")
    group.add_argument("--split", help="pairs: split of --data")
    group.add_argument("--slice", action="append", dest="slices", metavar="COLUMN", help="pairs: length_difference or a column; repeatable")
    group.add_argument("--ifeval_prompts", help="ifeval: file or hub id (google/IFEval)")
    group.add_argument(
        "--mtbench", type=Path, metavar="FOLDER", help="mtbench: FastChat's question, judge_prompts and reference_answer files"
    )
    group.add_argument("--alpaca_reference", type=Path, help="alpacaeval: reference outputs (the hub's)")
    group.add_argument("--alpaca_tables", type=Path, metavar="FOLDER", help="alpacaeval: df_gamed.csv, for length control (the hub's)")
    group.add_argument("--prompts", type=Path, help="custom: own prompts, one per row, or a .txt with blank lines between them")
    group.add_argument("--text", type=Path, help="retention: neutral text, passages parted by blank lines (one that ships)")


def _add_generation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max_new_tokens", type=int, help="of an answer (each task's own)")
    group.add_argument("--temperature", type=float, help="0 takes the likeliest token (each task's own)")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens up to this probability (1)")
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="most prompts at a time (64, or as many as memory holds); changes no answer beyond rounding",
    )
    group.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float16")
    group.add_argument("--device", help="cuda, mps, cpu (the best there is)")
    group.add_argument("--chat_template", help="as in training (the run's, else the model's own)")
    group.add_argument("--max_length", type=int, help="pairs: most tokens of prompt and answer (the run's, else 1024)")
    group.add_argument("--model_revision", help="of a hub model")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model; needs --model_revision")


def _add_judge(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--judge_url", metavar="URL", help="endpoint with OpenAI's protocol, such as http://127.0.0.1:8000/v1")
    group.add_argument("--judge_model", metavar="NAME", help="the model's name there")
    group.add_argument("--judge_key_env", metavar="VARIABLE", help="environment variable with the key (ORPO_JUDGE_API_KEY, OPENAI_API_KEY)")
    group.add_argument("--judge_options", metavar="JSON", default="{}", help="further fields of each request; null removes one")
    group.add_argument("--judge_logprobs", action="store_true", help="alpacaeval: weigh verdicts by log-probabilities, as published")
    group.add_argument("--judge_workers", type=int, default=4, help="questions at a time (4)")
    group.add_argument("--judge_timeout", type=float, default=120.0, help="seconds for a reply (120)")
    group.add_argument("--judge_retries", type=int, default=5, help="further attempts for a question (5)")
    group.add_argument("--judge", metavar="FOLDER|HUB_ID", help="a judge or reward model of your own")
    group.add_argument("--retry_malformed", action="store_true", help="ask again where a kept verdict could not be read")


# Options that are called the same in `EvalOptions`.
_SAME_NAMES = (
    *("target", "against", "answers", "against_answers", "data", "split", "limit", "ifeval_prompts", "mtbench", "alpaca_reference"),
    *("alpaca_tables", "prompts", "text", "max_new_tokens", "temperature", "top_p", "seed", "batch_size", "output", "retry_malformed"),
)


def options_of(args: argparse.Namespace) -> EvalOptions:
    """The command line as options.

    Raises:
        UserError: a value is not what it should be.
    """
    from orpo.evaluate.options import EvalOptions, JudgeOptions
    from orpo.inference.ready import Loading

    judge = JudgeOptions(
        url=args.judge_url,
        model=args.judge_model,
        local=args.judge,
        key_variable=args.judge_key_env,
        options=_json_object(args.judge_options, "--judge_options"),
        wants_logprobs=args.judge_logprobs,
        num_workers=args.judge_workers,
        timeout_s=args.judge_timeout,
        num_retries=args.judge_retries,
    )
    loading = Loading(
        device=args.device,
        dtype=args.dtype,
        chat_template=args.chat_template,
        max_length=args.max_length,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    return EvalOptions(
        **{name: getattr(args, name) for name in _SAME_NAMES},
        tasks=tuple(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip())),
        has_before=not args.no_before,
        slices=tuple(args.slices or ("length_difference",)),
        loading=loading,
        judge=judge,
    )


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"found {text!r}", where=where, expected='a JSON object such as {"max_tokens": null, "max_completion_tokens": 2048}'
        )
    return value


def run(args: argparse.Namespace) -> int:
    """Do the tasks; exit code 2 where one could not be done, with the others' results in place."""
    from orpo.evaluate.suite import Evaluation
    from orpo.system.console import print_json, report_console, say, stderr_console
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    options = options_of(args)
    console = stderr_console()
    with _EvalProgress(console) as progress:
        evaluation = Evaluation(options, tell=lambda line: say(console, line), progress=progress)
        records, errors = evaluation.run()
    report = report_console(is_json=args.json)
    for record in records.values():
        for line in lines_of(record):
            say(report, line)
    if records:
        say(console, f"results      {evaluation.folder}")
    if args.json:
        print_json({"folder": str(evaluation.folder), "tasks": records, "errors": {name: str(error) for name, error in errors.items()}})
    if errors:
        raise UserErrors(list(errors.values()), title=f"{len(errors)} of {len(options.tasks)} tasks could not be done:")
    return 0


class _EvalProgress:
    """A progress bar per part on a terminal, a line at its end elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self.progress is not None:
            self.progress.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """A part has got so far."""
        from rich.markup import escape

        from orpo.system.console import say

        if self.progress is None:
            if done == total:
                say(self.console, f"done         {what}: {total}")
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(escape(what), total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)


def lines_of(record: dict[str, Any]) -> list[str]:
    """A record for the terminal."""
    writers = {
        "pairs": _pair_lines,
        "retention": _retention_lines,
        "ifeval": _ifeval_lines,
        "mtbench": _mtbench_lines,
        "alpacaeval": _alpaca_lines,
        "custom": _custom_lines,
    }
    name = record["target"] or record["answers"]
    return ["", f"{record['task']}: {name}", *(f"  {line}" for line in writers[record["task"]](record["result"]))]


def _interval(estimate: dict[str, float | None], style: str = ".3f") -> str:
    value = format(estimate["value"], style)
    if estimate["low"] is None or estimate["high"] is None:
        return value
    return f"{value} [{format(estimate['low'], style)}, {format(estimate['high'], style)}]"


_PAIR_ROWS = (
    ("accuracy", ".1%"),
    ("log_odds_accuracy", ".1%"),
    ("margin", "+.3f"),
    ("log_odds_ratio", "+.3f"),
    ("chosen_logp", "+.3f"),
    ("rejected_logp", "+.3f"),
)


def _pair_lines(result: dict[str, Any]) -> Iterator[str]:
    model, before, change = result["model"], result.get("against"), result.get("change")
    yield f"{model['num_pairs']} pairs of {model['num_prompts']} prompts: {result['data']}"
    for name, style in _PAIR_ROWS:
        parts = [f"{name:<18} {_interval(model[name], style):<28}"]
        if before is not None:
            parts.append(f"before {_interval(before[name], style):<28}")
        if change is not None and name in change:
            parts.append(f"change {_interval(change[name], style.replace('.1%', '+.1%'))}")
        yield " ".join(parts).rstrip()
    for by, parts_by in result["slices"].items():
        for label, part in parts_by.items():
            text = f"accuracy {_interval(part['accuracy'], '.1%')}, margin {_interval(part['margin'], '+.3f')}"
            yield f"{by} = {label}: {part['num_pairs']} pairs, {text}"


def _retention_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"text: {result['text']}; answers of at most {result['max_new_tokens']} tokens"
    for which, label in (("against", "before"), ("model", "after" if "against" in result else "model")):
        if which in result:
            one = result[which]
            shape = {name: value["value"] for name, value in one["answers"].items() if isinstance(value, dict)}
            yield f"{label:<7} perplexity {_interval(one['perplexity'], '.2f')}, {one['bits_per_byte']:.3f} bits per byte"
            lengths = f"answers of {shape['mean_tokens']:.0f} tokens, {shape['cut']:.0%} cut"
            yield f"        {lengths}, repetition {shape['repetition']:.1%}, loops {shape['loops']:.0%}"
    change = result.get("change", {})
    if "nll" in change:
        yield f"change  {_interval(change['nll'], '+.4f')} nats per token"


def _ifeval_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['num_prompts']} prompts, {result['num_instructions']} instructions"
    for name in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"):
        yield f"{name:<19} {_interval(result[name], '.4f')}"
    if result["num_cut"]:
        yield f"{result['num_cut']} answers were cut at max_new_tokens"


def _mtbench_lines(result: dict[str, Any]) -> Iterator[str]:
    turns = ", ".join(f"turn {number} {_interval(turn, '.2f')}" for number, turn in enumerate(result["by_turn"], start=1))
    yield f"score {_interval(result['score'], '.2f')} ({turns}), {result['num_judged']} judged turns"
    for category, estimate in result["by_category"].items():
        yield f"{category:<12} {_interval(estimate, '.2f')}"
    yield from _gaps(result)


def _alpaca_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['generator']} against {result['reference']}, {result['num_judged']} of {result['num_instructions']} judged"
    counts = f"{result['num_wins']} won, {result['num_ties']} tied, {result['num_losses']} lost"
    yield f"win rate {_interval(result['win_rate'], '.1%')} ({counts})"
    if result["length_controlled"] is not None:
        yield f"length-controlled win rate {result['length_controlled']:.1%} (standard error {result['length_controlled_error']:.1%})"
    else:
        yield f"no length-controlled win rate: {'; '.join(line.strip() for line in str(result['missing']).splitlines())}"
    yield f"mean length {result['mean_chars']:.0f} characters, reference {result['reference_mean_chars']:.0f}"
    yield from _gaps(result)


def _custom_lines(result: dict[str, Any]) -> Iterator[str]:
    judged = f"{result['num_judged']} of {result['num_prompts']} prompts judged"
    yield f"win rate {_interval(result['win_rate'], '.1%')} over {result['against']}, {judged}"
    yield ", ".join(f"{name} {_interval(result[name], '.1%')}" for name in ("wins", "ties", "losses"))
    if result["first_place"] is not None:
        share = f"{result['first_place']:.0%} of its decisions"
        yield f"the judge took the answer shown first in {share}; {result['num_inconsistent']} prompts flipped with the order"
    yield from _gaps(result)


def _gaps(result: dict[str, Any]) -> Iterator[str]:
    if result["num_malformed"]:
        yield f"{result['num_malformed']} verdicts could not be read; they count for nothing"
    if result["num_unanswered"]:
        yield f"{result['num_unanswered']} questions got no reply; the same command asks them again"
