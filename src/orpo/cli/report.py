"""Write the report of a run or a comparison: one HTML file that opens offline. orpo report RUN|COMPARISON [--output FILE]

Shows what is in the folder: curves, held-out pairs before and after, answers, tokens, evaluations, data, cost, and how to reproduce it.
What `orpo eval` has not measured is not in it, and what is missing is said. A run's model card (README.md) is written from the same facts.
"""

from __future__ import annotations

import argparse

NAME = "report"
HELP = "write the report of a run or comparison as one HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="RUN|COMPARISON", help="folder of a run, of a comparison, or of results of `orpo eval`")
    parser.add_argument("--output", metavar="FILE", help="where to write the page (default: report.html in the folder)")
    parser.add_argument(
        "--beside",
        metavar="FOLDER",
        action="append",
        default=[],
        help="another run, or results of `orpo eval`, to show in the same MT-Bench, AlpacaEval and IFEval figures; repeatable",
    )
    parser.add_argument("--no_card", "--no-card", action="store_true", help="leave the run's README.md as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Write the page, and a run's card."""
    from orpo.report import write_report
    from orpo.system.console import print_json, report_console, say, stderr_console

    report = write_report(args.folder, output=args.output, beside=args.beside, with_card=not args.no_card)
    console = stderr_console()
    for note in report.notes:
        say(console, f"note         {note}")
    if args.json:
        print_json({"page": report.page, "card": report.card, "notes": report.notes})
        return 0
    out = report_console(is_json=False)
    say(out, f"page         {report.page}")
    if report.card is not None:
        say(out, f"model card   {report.card}")
    return 0
