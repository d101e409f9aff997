"""How help is laid out: commands by what they are for, and in a terminal headings and options in colour."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from typing import Any

GROUPS = {
    "begin": ("demo", "init", "recipes"),
    "data": ("audit", "preview", "pairs"),
    "train": ("train", "check", "plan"),
    "measure": ("eval", "compare", "report"),
    "use": ("chat", "export"),
    "this machine": ("doctor", "completion"),
}
"""Heading -> commands, in the order of a run's life. A command that is in none stands at the end."""

ORDER = tuple(name for names in GROUPS.values() for name in names)

_HEADING, _OPTION, _END = "\x1b[1m", "\x1b[36m", "\x1b[0m"


_SOURCE_LINE = 110
"""A line of a docstring as long as this goes on in the next one."""
_MOST_HANGING = 34
"""A description beside a name that is set further in than this begins anew near the margin where it is broken."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help of one command, broken to the terminal's width. Colours are put in at the end, since argparse counts letters to break lines."""

    def format_help(self) -> str:
        text = self.plain_help()
        return _coloured(text) if _has_colours() else text

    def plain_help(self) -> str:
        """Without colours; a usage that a command has written itself is broken like the rest."""
        usage, gap, rest = super().format_help().partition("\n\n")
        width, hanging = self._width, " " * len("usage: orpo ")
        lines = [part for line in usage.splitlines() for part in textwrap.wrap(line, width, subsequent_indent=hanging, **_WHOLE_WORDS)]
        return "\n".join(lines) + (gap + rest or "\n")  # alone it stands before an error, which begins a line of its own

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """What argparse calls for descriptions: lines stay lines, tables stay tables, and nothing is wider than the terminal."""
        return "\n".join(indent + part for line in _joined(text.splitlines()) for part in _wrapped(line, width - len(indent)))


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _joined(lines: list[str]) -> list[str]:
    """Lines that were broken for the source alone, put together again."""
    joined: list[str] = []
    goes_on = False
    for line in lines:
        if goes_on and line and not line[0].isspace():
            joined[-1] += f" {line}"
        else:
            joined.append(line)
        goes_on = len(line) >= _SOURCE_LINE and not line[0].isspace()
    return joined


def _wrapped(line: str, width: int) -> list[str]:
    """A line in as many as it needs; what stands beside a name stays beside it."""
    if len(line) <= width:
        return [line]
    beside = re.match(r"\s*\S+(?: \S+)*\s{2,}(?=\S)", line)
    own = len(line) - len(line.lstrip())
    hanging = own + 4 if own else 0
    if beside is not None and len(beside[0]) <= _MOST_HANGING:
        hanging = len(beside[0])
    return textwrap.wrap(line, width, subsequent_indent=" " * hanging, **_WHOLE_WORDS)


class CommandsHelp(Help):
    """Help of the whole command line."""

    def format_help(self) -> str:
        text = self.plain_help()
        listed = re.findall(r"^    (\w+)(?:  |$)", text, re.MULTILINE)
        for title, names in GROUPS.items():
            if first := next((name for name in names if name in listed), None):
                text = re.sub(rf"^(?=    {first}(?:  |$))", f"  {title}:\n", text, count=1, flags=re.MULTILINE)
        return _coloured(text) if _has_colours() else text


def _has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _coloured(text: str) -> str:
    text = re.sub(r"^((?:  )?[a-z][\w ,]*:)$", rf"{_HEADING}\1{_END}", text, flags=re.MULTILINE)
    text = re.sub(r"^(usage:)", rf"{_HEADING}\1{_END}", text)
    return re.sub(r"(?<![\w-])(--?[A-Za-z][\w-]*)", rf"{_OPTION}\1{_END}", text)
