"""Show what the model will see of some rows, token by token: orpo preview DATA --model NAME [--rows 0,5,10-12]

Each token is coloured by where it comes from (template, prompt, chosen, rejected, end of turn) and marked by whether it counts in the
next-token loss and in the odds ratio. DATA is a file, folder or hub id, or the CONFIG.yaml of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.cli.datasource import DataInput, add_data_arguments, read_data_arguments
from orpo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from orpo.data.preview import RowView
    from orpo.data.types import Dropped, Preference

NAME = "preview"
HELP = "show what the model will see of some rows, token by token"

_MOST_ROWS = 1000
_STYLES = {"template": "dim", "prompt": "blue", "chosen": "green", "rejected": "red", "eos": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_arguments(parser)
    parser.add_argument("--nll_scope", "--nll-scope", choices=("sequence", "response"), help="what counts in the next-token loss")
    parser.add_argument("--rows", metavar="LIST", help="rows to show, counted from 0, such as 0,5,10-12 (default: the first)")
    parser.add_argument("--lines", metavar="LIST", help="the same by line of the file, counted from 1, as errors and audits name them")
    parser.add_argument("--num", type=int, default=3, help="how many rows of each source to show where none are named (default 3)")
    parser.add_argument("--ids", action="store_true", help="show each segment's token ids below it")
    parser.add_argument("--html", metavar="FILE", help="write a page with ids on hover")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, with every token's id, text, role and terms")


def run(args: argparse.Namespace) -> int:
    """Show the rows."""
    from orpo.data.preview import view_row
    from orpo.system.console import print_json, report_console, say
    from orpo.system.process import quiet_libraries

    data = read_data_arguments(args)
    rows, lines = read_numbers(args.rows, "--rows"), read_numbers(args.lines, "--lines")
    quiet_libraries()
    items = list(_items(data, rows, lines, args.num))
    encoder = data.load_encoder()
    views = [view_row(item, encoder, nll_scope=data.config["nll_scope"]) for item in items]
    if args.html is not None:
        write_page(Path(args.html), views, encoder.describe(), data)
    facts = encoder.describe()
    if args.json:
        print_json({"encoder": facts, "nll_scope": data.config["nll_scope"], "rows": [asdict(view) for view in views]})
        return 0
    console = report_console(is_json=False)
    say(console, f"template {facts['template']}, answers end with {facts['terminator']!r}, max_length {facts['max_length']}")
    say(console, "NLL: counts in the next-token loss; OR: counts in the odds ratio")
    for view in views:
        show(console, view, with_ids=args.ids)
    return 0


def read_numbers(text: str | None, where: str) -> set[int] | None:
    """`0,5,10-12` as numbers; None for None.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or not int(first) <= int(last) < int(first) + _MOST_ROWS:
            raise UserError(f"{part!r} is no row number", where=where, expected="numbers and ranges, such as 0,5,10-12")
        numbers.update(range(int(first), int(last) + 1))
    return numbers


def _items(data: DataInput, rows: set[int] | None, lines: set[int] | None, num: int) -> Iterator[Preference | Dropped]:
    """The rows asked for, of each source in turn; each is read to the last of them.

    Raises:
        UserError: no source has a row that was asked for.
    """
    from orpo.data.reading.sources import as_sources
    from orpo.run.data import read_rows

    if (evaluation := data.config.eval_source()) is not None:
        read_rows(data.settings, *evaluation)  # a split that is not there is told, as by every command
    missing_rows, missing_lines = set(rows or ()), set(lines or ())
    for source in as_sources(data.source, split=data.config["dataset_train_split"], column_map=data.settings.column_map):
        items = read_rows(data.settings, source)
        if rows is None and lines is None:
            yield from islice(items, num)
            continue
        wanted_rows, wanted_lines = set(rows or ()), set(lines or ())
        for item in items if wanted_rows or wanted_lines else ():
            if item.where.row in wanted_rows or item.where.line in wanted_lines:
                for wanted, number in ((wanted_rows, item.where.row), (wanted_lines, item.where.line)):
                    wanted.discard(number)
                missing_rows.discard(item.where.row)
                missing_lines.discard(item.where.line or 0)
                yield item
            if not wanted_rows and not wanted_lines:
                break
    missing = [f"row {number}" for number in sorted(missing_rows)] + [f"line {number}" for number in sorted(missing_lines)]
    if not missing:
        return
    raise UserError(
        f"no {missing[0]}",
        where="--rows" if missing_rows else "--lines",
        expected="rows that the data has",
        mend="rows are counted from 0, lines of the file from 1, in each source anew",
    )


def write_page(path: Path, views: list[RowView], facts: dict[str, Any], data: DataInput) -> None:
    """Write the HTML page.

    Raises:
        UserError: the file cannot be written.
    """
    from orpo.data.preview import render_html

    source = data.source if isinstance(data.source, str) else "several sources"
    try:
        path.write_text(render_html(views, facts, source=source, nll_scope=data.config["nll_scope"]), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), mend="choose another place") from None


def show(console: Console, view: RowView, *, with_ids: bool = False) -> None:
    """One row: in colours on a terminal, else run by run."""
    from rich.text import Text

    from orpo.data.preview import ids_line, plain_lines, runs, visible
    from orpo.system.console import say

    say(console)
    if not console.is_terminal:
        for line in plain_lines(view, with_ids=with_ids):
            say(console, line)
        return
    say(console, f"{view.place}: {view.dropped or f'{view.num_tokens} tokens'}")
    for note in view.notes:
        say(console, f"  note: {note}")
    for segment in view.segments:
        cut = ", cut to fit max_length" if segment.is_cut else ""
        say(console, f"  {segment.name} ({len(segment.tokens)} tokens{cut})")
        text = Text()
        for run_ in runs(segment.tokens):
            first = run_.tokens[0]
            style = _STYLES[run_.role] + " underline" * first.counts_in_nll + " bold" * first.counts_in_odds
            text.append(visible(run_.text), style=style)
        if segment.is_cut and segment.name != "prompt":
            text.append(" ✂", style="bold magenta")
        console.print(text)
        if with_ids:
            say(console, f"    {ids_line(segment)}")
    say(console, "  underlined: NLL; bold: OR; " + ", ".join(f"{role} {colour}" for role, colour in _STYLES.items()))
