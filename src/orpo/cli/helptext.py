"""How help is laid out: commands by what they are for, and in a terminal headings and options in colour."""

from __future__ import annotations

import argparse
import os
import re
import sys

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


class Help(argparse.RawDescriptionHelpFormatter):
    """Help of one command. Colours are put in at the end, since argparse counts letters to break lines."""

    def format_help(self) -> str:
        text = super().format_help()
        return _coloured(text) if _has_colours() else text


class CommandsHelp(Help):
    """Help of the whole command line."""

    def format_help(self) -> str:
        text = argparse.RawDescriptionHelpFormatter.format_help(self)
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
