"""Find what in a preference data set hurts ORPO, which rows, why, and what to do: orpo audit DATA [--html PAGE] [--write-clean OUT.jsonl]

DATA is files, folders or hub ids, or the CONFIG.yaml of a run (then its evaluation data and its tokenizer are taken in too).
With --model, lengths are counted in tokens, and the pairs that the model finds most surprising are ranked, if it can tell pairs apart.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.cli.datasource import DataInput, add_data_arguments, read_data_arguments
from orpo.errors import EXIT_OK, EXIT_USER, UserError

if TYPE_CHECKING:
    from orpo.audit import Audit, AuditOptions
    from orpo.audit.auditor import Progress

NAME = "audit"
HELP = "find what in a preference data set hurts, and write a cleaned one"

_NO_LIMIT = 10**7
"""A max_length that no row reaches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_arguments(parser)
    parser.add_argument("--eval", metavar="DATA", help="evaluation data; its prompts should not be in the training data")
    parser.add_argument("--eval_split", "--eval-split", metavar="SPLIT", help="split of the evaluation data")
    parser.add_argument("--benchmark", metavar="FILE", action="append", default=[], help="file with a benchmark's prompts; may be repeated")
    parser.add_argument("--scenario_column", "--scenario-column", metavar="COLUMN", help="column that names each row's scenario")
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer to count tokens with, without loading a model's weights")
    parser.add_argument("--cross_fit", "--cross-fit", metavar="K", type=int, help="train on K-1 folds, judge the last, K times")
    parser.add_argument("--max_rows", "--max-rows", metavar="N", type=int, help="look at the first N rows only")
    parser.add_argument("--workers", metavar="N", type=int, help="processes (default: one per core, at most 4)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    out.add_argument("--html", metavar="FILE", help="write a page with plots that opens offline")
    out.add_argument("--strict", action="store_true", help="exit with code 2 if there is an error or a warning")
    out.add_argument("--write-clean", metavar="OUT", help="write the rows fit to train on (.jsonl) and a log of what left")
    out.add_argument("--keep", metavar="CODE", action="append", default=[], help="finding whose rows stay in the cleaned set; repeatable")
    out.add_argument("--places", metavar="N", type=int, default=5, help="rows to name per finding (default 5; all are in --json)")


def run(args: argparse.Namespace) -> int:
    """Audit; exit code 2 where no row can be trained on, and with --strict where something was found."""
    from orpo.audit import run_audit, write_clean
    from orpo.cli.bars import PartBars
    from orpo.system.console import print_json, report_console, say, stderr_console

    data = read_data_arguments(args)
    _check(args, data)
    with PartBars(stderr_console()) as progress:
        options = make_options(args, data, progress)
        audit = run_audit(data.source, options)
    console = report_console(is_json=args.json)
    for line in audit.lines(args.places):
        say(console, line)
    facts = audit.to_dict()
    if args.write_clean is not None:
        cleaned = write_clean(audit, data.source, options, args.write_clean, keep=args.keep)
        say(console, f"clean        {cleaned.sentence()}")
        facts["clean"] = cleaned.to_dict()
    if args.html is not None:
        _write_page(audit, Path(args.html))
        say(console, f"page         {args.html}")
    if args.json:
        print_json(facts)
    if not audit.num_usable:
        say(console, f"no row of {audit.num_rows} can be trained on: mend the rows named above")
        return EXIT_USER
    if args.strict and not audit.is_clean:
        codes = [finding.code for finding in audit.findings if finding.severity != "info"]
        say(console, f"--strict: {len(codes)} findings to mend: {', '.join(codes)}")
        return EXIT_USER
    return EXIT_OK


def _check(args: argparse.Namespace, data: DataInput) -> None:
    if args.cross_fit is not None and (args.cross_fit < 2 or data.model is None):
        raise UserError(f"--cross_fit {args.cross_fit}", where="command line", expected="at least 2 folds, and --model to train")
    if args.html is not None and not Path(args.html).resolve().parent.is_dir():
        raise UserError("the folder does not exist", where=args.html, mend="make it, or choose another place")
    if args.keep and args.write_clean is None:
        raise UserError("--keep without --write-clean", where="command line", mend="add --write-clean OUT.jsonl")


def make_options(args: argparse.Namespace, data: DataInput, progress: Progress | None = None) -> AuditOptions:
    """The audit that the arguments ask for; `progress` hears how far it is."""
    from orpo.audit import AuditOptions
    from orpo.audit.inspect import default_workers

    settings = data.settings
    evaluation = (args.eval, args.eval_split) if args.eval is not None else data.config.eval_source() or (None, None)
    options = AuditOptions(
        split=data.config["dataset_train_split"],
        column_map=settings.column_map,
        pairs=settings.pairs,
        sft_rows=settings.sft_rows,
        streaming=settings.dataset_streaming,
        max_rows=args.max_rows,
        evaluation=evaluation[0],
        evaluation_split=evaluation[1],
        benchmarks=args.benchmark,
        scenario_column=args.scenario_column,
        num_workers=default_workers() if args.workers is None else args.workers,
        progress=progress,
    )
    if data.model is None and args.tokenizer is None:
        return options
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    encoder = data.load_encoder(args.tokenizer)
    unlimited = data.load_encoder(args.tokenizer, max_length=_NO_LIMIT, max_prompt_length=None, truncation="drop")
    options = replace(options, encoder=encoder, unlimited_encoder=unlimited)
    return options if args.tokenizer is not None or args.model is None else _with_model(options, args, data)


def _with_model(options: AuditOptions, args: argparse.Namespace, data: DataInput) -> AuditOptions:
    """Scoring by the model as it stands, and cross-fitted where that is asked for."""
    from orpo.evaluate.crossfit import fit_and_score_with, score_with

    if data.model is None or options.encoder is None:
        raise AssertionError("a model is scored with its own tokenizer")
    revision = data.config["model_revision"]
    if args.cross_fit is None:
        return replace(options, score=score_with(data.model, revision, progress=options.progress))
    fit = fit_and_score_with(data.model, revision, options.encoder, num_folds=args.cross_fit, progress=options.progress)
    return replace(options, fit_and_score=fit, num_folds=args.cross_fit)


def _write_page(audit: Audit, path: Path) -> None:
    from orpo.audit.page import write_page

    try:
        write_page(audit, path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), mend="choose another place") from None
