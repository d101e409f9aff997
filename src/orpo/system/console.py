"""What commands share: a console on stderr, JSON on stdout, warnings as one line."""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Any

from orpo.system.place import own_rank
from orpo.system.redact import redact, redact_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

LABEL_CELLS = 13
"""Width of the labels that lines begin with (`folder       …`); what does not fit on such a line goes on below its text."""


def stderr_console() -> Console:
    """The rich console on stderr; plain text at full width where stderr is no terminal (a log keeps its lines whole).

    Under a launcher of several processes all but the first are silent.
    """
    # While a bar is up, sys.stderr is rich's stand-in: another console would write through it into the bar's own line.
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return _console_on(stream, own_rank() != 0)


@functools.lru_cache(maxsize=1)
def _console_on(stream: Any, is_quiet: bool) -> Console:
    """One console for a stream, since a bar keeps free only the lines of the console it was made on."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, quiet=is_quiet)
    return console if console.is_terminal else Console(stderr=True, highlight=False, quiet=is_quiet, width=200)


def report_console(*, is_json: bool) -> Console:
    """Where a command's report goes: stdout, or stderr where stdout is kept for the JSON object."""
    from rich.console import Console

    if is_json:
        return stderr_console()
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def say(console: Console, text: str = "", *, label_cells: int = LABEL_CELLS) -> None:
    """One line as it is: no markup is read in it and it cannot steer the terminal, which breaks it between words; a log never does."""
    shown = printable(redact_text(text))
    if console.is_terminal:
        shown = "\n".join(piece for line in shown.split("\n") for piece in pieces_of(line, console.width, label_cells))
    console.print(shown, markup=False, emoji=False, soft_wrap=True)


def say_on_stderr(text: str) -> None:
    """A warning or an error, of whichever process: above a bar that is up, and broken between words, as `say` does."""
    console = stderr_console()
    if console.quiet:
        print(printable(redact_text(text)), file=sys.stderr)
    else:
        say(console, text)


def pieces_of(line: str, width: int, label_cells: int = LABEL_CELLS) -> list[str]:
    """A line in pieces of at most `width` cells, cut between words; where fields stand two blanks apart, between those.

    What does not fit goes on below the text of a label that is `label_cells` wide, else two cells further in than the line began. A word
    that is longer than a line (a path) stays whole: the terminal goes on in the next line, and it can be copied.
    """
    from rich.cells import cell_len

    if cell_len(line) <= width:
        return [line]
    is_labelled = width >= 3 * label_cells and line[:label_cells].endswith("  ") and not line[label_cells].isspace()
    start = label_cells if is_labelled else len(line) - len(line.lstrip())
    hanging = start if is_labelled else start + 2
    indent = " " * (hanging if hanging <= width // 3 else 2)
    fields = re.split(" {2,}", line[start:])
    has_fields = len(fields) > 2 and all(cell_len(indent + field) <= width for field in fields)
    words, joint = (fields, "  ") if has_fields else (line[start:].split(" "), " ")
    pieces, piece, is_empty = [], line[:start], True
    for word in words:
        longer = piece + ("" if is_empty else joint) + word
        if is_empty or cell_len(longer) <= width:
            piece, is_empty = longer, is_empty and not word
        else:
            pieces.append(piece.rstrip())
            piece, is_empty = indent + word, not word
    return [*pieces, piece]


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int = 1) -> None:
    """A table where the terminal is wide enough for all of it, else its rows one after the other, a cell on each line.

    Args:
        columns: the first one names the rows and may have no name.
        rows: texts.
        num_texts: columns from the left that are text; the others are numbers.
    """
    from rich.cells import cell_len
    from rich.table import Table

    table = Table(title=title)
    for place, name in enumerate(columns):
        table.add_column(name, no_wrap=True, justify="left" if place < num_texts else "right")
    for row in rows:
        table.add_row(*map(printable, row))
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table, markup=False)
        return
    say(console, title)
    indent = max(cell_len(name) for name in columns[1:])
    for first, *cells in rows:
        say(console, first)
        for name, cell in zip(columns[1:], cells, strict=True):
            if cell:
                say(console, f"  {name:<{indent}}  {cell}")


class ConsoleHandler(logging.Handler):
    """Log records through `say_on_stderr`, so that they neither break a bar nor are broken in mid-word."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say_on_stderr(self.format(record))
        except Exception:
            self.handleError(record)


def printable(text: str) -> str:
    """Without control characters but line ends and tabs: what a model or a file says must not move the cursor or set colours."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def print_json(facts: dict[str, Any]) -> None:
    """The one object that `--json` prints on stdout."""
    print(json.dumps(redact(facts), ensure_ascii=False, default=str))


def human_bytes(number: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
