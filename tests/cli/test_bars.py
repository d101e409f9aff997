"""What a long command says of how far it is, and tables at every width of terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from orpo.cli.bars import PartBars
from orpo.cli.compare import _print_costs, _print_scores
from orpo.system.console import print_table
from reportfolders import comparison_facts

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_without_a_terminal_a_part_tells_its_beginning_its_pace_and_its_end() -> None:
    stream, now_s = io.StringIO(), 0.0
    with PartBars(Console(file=stream, width=200), clock=lambda: now_s) as bars:
        bars("answers", 10, 110)  # ten were known beforehand: they took no time
        for now_s in (5.0, 10.0, 15.0, 20.0):
            bars("answers", 10 + round(now_s), 110)
        bars("answers", 110, 110)
        bars("rows read", 1000, 0)
        bars("one piece", 7, 7)
        now_s = 40.0
        bars("rows read", 5000, 0)
    assert stream.getvalue().splitlines() == [
        "working      answers: 10 of 110",
        "working      answers: 20 of 110, 1 min 30 s left",
        "working      answers: 30 of 110, 1 min 20 s left",
        "done         answers: 110",
        "done         one piece: 7",
        "working      rows read: 5000",
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 130])
def test_bars_fit_a_terminal_of_any_width(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    with PartBars(console) as bars:
        bars("pairs scored by a model with a rather long name, /home/somebody/runs/first", 3, 100)
    assert all(cell_len(line) <= width for line in re.split(r"[\r\n]", ESCAPES.sub("", stream.getvalue())))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 130, 200])
def test_tables_of_a_comparison_lose_nothing_at_any_width(width: int) -> None:
    facts = comparison_facts() | {"options": {"seeds": [1, 2, 3]}}
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    for method in facts["methods"].values():
        for run in method["runs"]:
            run["totals"] |= {"reference_s": 0.0, "forward_tokens": 123456789}
    _print_scores(console, facts)
    _print_costs(console, facts)
    shown = ESCAPES.sub("", stream.getvalue())
    assert all(cell_len(line.rstrip()) <= width for line in shown.splitlines())
    for words in ("SFT + DPO", "ORPO", "88.0 (80.0 to 96.0)", "+1.250", "-3.250", "123,456,789", "orpo_alpha"):
        assert words in shown, words
    assert shown.count("┏") == (2 if width >= 200 else 1 if width >= 130 else 0)


def test_a_cell_holds_no_markup_and_no_control_character() -> None:
    stream = io.StringIO()
    print_table(Console(file=stream, width=100), "t", ("", "what"), [["[bold]x[/bold]", "a\x1b[2Jb"]])
    assert "[bold]x[/bold]" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
