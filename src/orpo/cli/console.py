"""What commands share: a console on stderr, JSON on stdout, warnings as one line."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from orpo.redact import redact, redact_text

if TYPE_CHECKING:
    from rich.console import Console


def stderr_console() -> Console:
    """A rich console on stderr; plain text at full width where stderr is no terminal (a log keeps its lines whole).

    Under a launcher of several processes all but the first are silent.
    """
    from rich.console import Console

    is_quiet = os.environ.get("RANK", "0") != "0"
    console = Console(stderr=True, highlight=False, quiet=is_quiet)
    return console if console.is_terminal else Console(stderr=True, highlight=False, quiet=is_quiet, width=200)


def report_console(*, is_json: bool) -> Console:
    """Where a command's report goes: stdout, or stderr where stdout is kept for the JSON object."""
    from rich.console import Console

    if is_json:
        return stderr_console()
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def say(console: Console, text: str = "") -> None:
    """One line as it is: no markup is read in it, it is never broken, and it cannot steer the terminal."""
    console.print(printable(redact_text(text)), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """Without control characters but line ends and tabs: what a model or a file says must not move the cursor or set colours."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def print_json(facts: dict[str, Any]) -> None:
    """The one object that `--json` prints on stdout."""
    print(json.dumps(redact(facts), ensure_ascii=False, default=str))


def show_warnings_plainly() -> None:
    """Python warnings as `warning: text` on stderr, each once, without the source line that means nothing to a user."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if issubclass(category, UserWarning) and not issubclass(category, (FutureWarning, DeprecationWarning)):
            print(f"warning: {redact_text(str(message))}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]


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


def quiet_libraries() -> None:
    """Keep transformers', datasets' and Python's own notes from breaking into ours; errors still show."""
    import datasets
    import transformers

    show_warnings_plainly()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
