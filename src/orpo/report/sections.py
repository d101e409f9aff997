"""What a report is made of: sections of text, tables, figures, answers and tokens, ready to be shown.

The readers of runs and comparisons fill these in from files that may be old, half-written or hostile; the one template (`page.html.j2`)
shows whatever is there. So what is missing is decided in Python, and the template has nothing to stumble over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo.system.intervals import smallest_shown
from orpo.webpage import Figure


@dataclass(frozen=True, slots=True)
class Bar:
    """An interval drawn in a cell: places from 0 to 100 across its width; `zero` is None where 0 is out of sight."""

    low: float
    value: float
    high: float
    zero: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what stands in it.
        detail: smaller, beside it: an interval.
        tone: "good", "bad", "soft" or "".
        bar: drawn instead of text.
    """

    text: str
    detail: str = ""
    tone: str = ""
    bar: Bar | None = None


Row = list[Cell | str]


def row(*cells: Cell | str) -> Row:
    """A row of a table."""
    return list(cells)


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first `num_texts` columns are text, the others numbers.

    Attributes:
        is_folded: shown only when it is asked for.
    """

    columns: tuple[str, ...]
    rows: Sequence[Row]
    title: str = ""
    note: str = ""
    num_texts: int = 1
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to one prompt, side by side."""

    prompt: str
    versions: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer and the classes of its three colourings; `title` says its numbers."""

    text: str
    classes: str
    title: str


@dataclass(frozen=True, slots=True)
class TokenText:
    """An answer token by token.

    Attributes:
        name: chosen or rejected.
        summary: how its mean moved.
    """

    name: str
    summary: str
    tokens: Sequence[Token]


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair token by token."""

    where: str
    summary: str
    prompt: str
    answers: Sequence[TokenText]


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence with a mark: "good", "bad", "open", "warn" or ""; a warning goes before every praise."""

    text: str
    tone: str = ""
    detail: str = ""


@dataclass(slots=True)
class Section:
    """A part of the page; shown in the order of its fields, empty ones not at all.

    Attributes:
        short: its name among the links at the top; the title where it is empty.
        is_beside: its figures and tables stand side by side where there is room.
    """

    key: str
    title: str
    short: str = ""
    is_beside: bool = False
    lead: list[str] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Figure | None] = field(default_factory=dict)
    wide: set[str] = field(default_factory=set)
    tables: list[Table] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    pairs: list[TokenPair] = field(default_factory=list)
    codes: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show but words about it."""
        things = (self.statements, self.facts, self.tables, self.answers, self.pairs, self.codes)
        return not any(things) and not any(self.figures.values())


@dataclass(slots=True)
class Page:
    """The whole report.

    Attributes:
        kind: run or comparison.
        status: one word, with its tone.
        lead: what was trained on what.
        counts: the numbers to see first, with what they are.
        notes: what is missing, damaged or unusual.
    """

    title: str
    kind: str
    status: str
    tone: str
    lead: list[str]
    counts: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by name."""
        return {name: figure for section in self.sections for name, figure in section.figures.items() if figure is not None}


# ---- reading what may not be there -----------------------------------------------------------------------------------------------------


def part(value: Any, *keys: str) -> Any:
    """`value[a][b]…`, or None as soon as something is not a dictionary or has no such key."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def parts(value: Any, *keys: str) -> dict[str, Any]:
    """The dictionary at a place, or an empty one."""
    found = part(value, *keys)
    return dict(found) if isinstance(found, Mapping) else {}


def items(value: Any, *keys: str) -> list[Any]:
    """The list at a place, or an empty one."""
    found = part(value, *keys)
    return list(found) if isinstance(found, (list, tuple)) else []


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def text(value: Any, default: str = "") -> str:
    """A text as it is, a number as text, messages as their contents, anything else as the default."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        said = [(text(part(message, "role")), text(part(message, "content"))) for message in value]
        return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {content}" for role, content in said if content)
    return default


# ---- numbers as text -------------------------------------------------------------------------------------------------------------------

NONE = "–"


def show(value: Any, style: str = ".3f") -> str:
    """A number in a format, with a proper minus; a dash for what is not there.

    `%` has a space before it, and `%p` in place of it are percentage points: what a change of shares is counted in.
    """
    found = number(value)
    if found is None:
        return NONE
    shown = format(found, style.removesuffix("p"))
    unit = " points" if style.endswith("p") else " %"
    return (shown[:-1] + unit if shown.endswith("%") else shown).replace("-", "\N{MINUS SIGN}")


def estimate(value: Any, style: str = ".3f", *, tone: str = "") -> Cell:
    """An estimate (`{"value", "low", "high"}`) as a cell with its interval."""
    if number(part(value, "value")) is None:
        return Cell(NONE, tone="soft")
    low, high = part(value, "low"), part(value, "high")
    has_interval = number(low) is not None and number(high) is not None
    detail = f"{_bare(show(low, style))} to {_bare(show(high, style))}" if has_interval else ""
    return Cell(show(part(value, "value"), style), detail, tone)


def _bare(shown: str) -> str:
    """A shown number without its unit."""
    return shown.partition(" ")[0]


def excludes_zero(value: Any) -> int:
    """1 where an estimate's interval lies above zero, -1 below, 0 where it does not part from zero or there is none."""
    low, high = number(part(value, "low")), number(part(value, "high"))
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def power(value: Any, what: str, style: str = ".1%p", *, num: Any = None, of: str = "prompts") -> str:
    """What a measurement of this size would have shown, from an estimate's interval; empty where there is none.

    Args:
        what: "a change of accuracy": the sentence goes on with "of 12.3 points or more".
        num, of: how many, of what.
    """
    found = smallest_shown(number(part(value, "low")), number(part(value, "high")))
    if found is None:
        return ""
    many = f"{human_count(num)} {of}" if number(num) is not None else f"so many {of}"
    return f"{many} would have shown {what} of {show(found, style)} or more (80 % power)"


def bars(estimates: Sequence[Any], *, with_zero: bool = True) -> list[Cell]:
    """Estimates as bars on one scale; an empty cell where one has no value."""
    numbers = [[number(part(value, key)) for key in ("low", "value", "high")] for value in estimates]
    seen = [one for triple in numbers for one in triple if one is not None] + ([0.0] if with_zero else [])
    if not seen:
        return [Cell("") for _ in estimates]
    low, high = min(seen), max(seen)
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / width, 2)

    cells = []
    for left, middle, right in numbers:
        if middle is None:
            cells.append(Cell(""))
            continue
        ends = (middle if left is None else left, middle if right is None else right)
        cells.append(Cell("", bar=Bar(place(ends[0]), place(middle), place(ends[1]), place(0.0) if low <= 0 <= high else None)))
    return cells


def human_count(value: Any) -> str:
    """`1,234`, `134.5 M`, `2.1 G` …: a count that may be large."""
    found = number(value)
    if found is None:
        return NONE
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(found) >= unit:
            return f"{found / unit:,.1f} {name}"
    return f"{found:,.0f}"


def human_bytes(value: Any) -> str:
    """`1.5 GiB`."""
    found = number(value)
    if found is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if abs(found) < 1024:
            return f"{found:.0f} B" if unit == "B" else f"{found:.1f} {unit}"
        found /= 1024
    return f"{found:.1f} GiB"


def human_seconds(value: Any) -> str:
    """`0.4 s`, `45 s`, `3 min 20 s`, `2 h 05 min`."""
    found = number(value)
    if found is None:
        return NONE
    if found < 10:
        return f"{found:.1f} s"
    whole = round(found)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
