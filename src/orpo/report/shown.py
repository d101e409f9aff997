"""How a result is shown, as plain data: what a task of `orpo eval` writes beside its numbers, and the section that is drawn from it.

So a report draws a task that it has never heard of, and draws several models' results of one task in the same figures. The writer fills in
a `Shown`; the reader trusts nothing that it finds in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orpo.report.sections import (
    Answers,
    Bar,
    Cell,
    Row,
    Section,
    Statement,
    Table,
    estimate,
    excludes_zero,
    items,
    number,
    part,
    show,
    text,
)
from orpo.webpage import Figure, figure, label

Record = dict[str, Any]
BEFORE = "before training"
"""Name of the starting model among several; it is drawn grey, and the others keep their colours."""
KINDS = ("bars", "radar")
TONES = ("good", "bad", "open", "warn", "soft")
_OWN_KEYS = frozenset({"pairs", "retention", "ifeval", "mtbench", "alpacaeval", "custom"})
_STYLE = re.compile(r"\+?,?\.\d[f%]p?")
_MOST_COLUMNS = 6
"""More scores than this stand below each other, the models side by side."""
_MOST_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Score:
    """A number to stand for the result.

    Attributes:
        value: a number, or an estimate (`{"value", "low", "high"}`).
        style: as `format` takes it; `.1%` for shares, `+.1%p` for points.
        is_better: 1 where more is better, -1 where less is.
    """

    name: str
    value: Any
    style: str = ".3f"
    is_better: int = 0


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of values by name: horizontal bars, or a radar over three names or more.

    Attributes:
        values: name -> number or estimate.
        low, high: ends of the axis; None for what the values need.
        mark: where a line is drawn across the bars.
    """

    title: str
    values: Mapping[str, Any]
    kind: str = "bars"
    style: str = ".3f"
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class AnswerColumns:
    """Answers to be read side by side: a list of the result, and the keys of its rows.

    Attributes:
        key: of the list in the result; each row has `prompt`.
        versions: (key, name) of each answer.
        note: key of a word on the row.
    """

    key: str
    versions: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(slots=True)
class Shown:
    """What is shown of a result.

    Attributes:
        title, short: of the section, and among the links at the top.
        lead: sentences on what was measured.
        statements: what it says; those with the tone "warn" go before everything else on the page.
        scores, figures: drawn together with other models'.
        tables, answers: of this result alone.
    """

    title: str
    short: str = ""
    lead: list[str] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    figures: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    answers: AnswerColumns | None = None

    def to_dict(self) -> Record:
        """As JSON."""
        return asdict(self)


# ---- reading it ------------------------------------------------------------------------------------------------------------------------


def shown_section(task: str, everyone: Mapping[str, Any], *, own: bool = True) -> Section:
    """The section of a task.

    Args:
        task: its name.
        everyone: model -> what its result's `show` holds. Scores and figures are drawn of all.
        own: the first one is what the page is about: its sentences and tables are shown. Of the others there are warnings alone.
    """
    known = {name: one for name, one in everyone.items() if isinstance(one, Mapping)}
    first: Any = next(iter(known.values()), {})
    # The names of the page's other sections are words, too.
    section = Section(task if task in _OWN_KEYS else f"task-{task}", text(part(first, "title"), task), short=text(part(first, "short")))
    if own:
        section.lead += [text(line) for line in items(first, "lead") if text(line)]
        section.statements += statements_of(first)
        section.tables += filter(None, map(_table, items(first, "tables")))
    section.statements += warnings_among(dict(list(known.items())[1 if own else 0 :]))
    _add_figures(section, task, known)
    if not section.tables or len(known) > 1:
        section.tables[:0] = filter(None, [_score_table(known)])
    section.is_beside = any(part(one, "kind") == "radar" for one in items(first, "figures"))
    return section


def warnings_among(everyone: Mapping[str, Any]) -> list[Statement]:
    """Warnings of several models' results, each with the model's name."""
    return [
        Statement(f"{name}: {one.text}", one.tone, one.detail)
        for name, shown in everyone.items()
        for one in statements_of(shown)
        if one.tone == "warn"
    ]


def statements_of(shown: Any) -> list[Statement]:
    """The statements of a result."""
    found = [(text(part(one, "text")), _tone(part(one, "tone")), text(part(one, "detail"))) for one in items(shown, "statements")]
    return [Statement(*one) for one in found if one[0]]


def answers_of(record: Mapping[str, Any]) -> list[Answers]:
    """The answers of a result that are to be read side by side."""
    columns = part(record, "show", "answers")
    versions = [
        (text(part(dict(enumerate(pair)), 0)), text(part(dict(enumerate(pair)), 1)))  # type: ignore[arg-type]
        for pair in items(columns, "versions")
        if isinstance(pair, (list, tuple))
    ]
    found = []
    for row in items(record, "result", text(part(columns, "key"))):
        told = [(name, clipped(text(part(row, key)))) for key, name in versions if isinstance(part(row, key), str)]
        if told:
            found.append(Answers(clipped(text(part(row, "prompt"))), told, text(part(row, text(part(columns, "note"))))))
    return found


def clipped(whole: str) -> str:
    """A text of a length that a page can hold many of."""
    return whole if len(whole) <= _MOST_CHARS else whole[:_MOST_CHARS] + " …"


def style_of(value: Any) -> str:
    """A format that is none of those meant here is replaced: it comes from a file."""
    return value if isinstance(value, str) and _STYLE.fullmatch(value) else ".3f"


def _tone(value: Any) -> str:
    return value if value in TONES else ""


def _cell(value: Any, style: str, is_better: Any = 0) -> Cell:
    sign = excludes_zero(value) * int(number(is_better) or 0) if style.startswith("+") else 0
    if isinstance(value, Mapping):
        return estimate(value, style, tone={1: "good", -1: "bad"}.get(sign, ""))
    return Cell(show(value, style)) if number(value) is not None else Cell(text(value, "–"))


def _score_table(known: Mapping[str, Any]) -> Table | None:
    """Models down and scores across; the other way round where there are many scores."""
    names: dict[str, str] = {}
    values: dict[str, dict[str, Cell]] = {}
    for model, one in known.items():
        for score in items(one, "scores"):
            name, style = text(part(score, "name")), style_of(part(score, "style"))
            names.setdefault(name, name)
            values.setdefault(model, {})[name] = _cell(part(score, "value"), style, part(score, "is_better"))
    if not names:
        return None
    none = Cell("–", tone="soft")
    models = [model for model in known if model in values]
    if len(names) <= _MOST_COLUMNS:
        rows: list[Row] = [[Cell(model), *(values[model].get(name, none) for name in names)] for model in models]
        return Table(("model", *names), rows)
    return Table(("", *models), [[Cell(name), *(values[model].get(name, none) for model in models)] for name in names])


def _table(value: Any) -> Table | None:
    columns = tuple(text(column) for column in items(value, "columns"))
    if not columns:
        return None
    rows: list[Row] = []
    for found in items(value, "rows"):
        cells: Row = [_table_cell(one) for one in found] if isinstance(found, (list, tuple)) else []
        rows.append([*cells, *[Cell("")] * (len(columns) - len(cells))][: len(columns)])
    num_texts = number(part(value, "num_texts"))
    return Table(
        columns,
        rows,
        title=text(part(value, "title")),
        note=text(part(value, "note")),
        num_texts=1 if num_texts is None else int(num_texts),
        is_folded=part(value, "is_folded") is True,
    )


def _table_cell(value: Any) -> Cell:
    if not isinstance(value, Mapping):
        return Cell(text(value))
    low, middle, high = (number(part(value, "bar", key)) for key in ("low", "value", "high"))
    bar = None
    if low is not None and middle is not None and high is not None:
        bar = Bar(low, middle, high, number(part(value, "bar", "zero")))
    return Cell(text(value.get("text")), text(value.get("detail")), _tone(value.get("tone")), bar)


def _add_figures(section: Section, task: str, known: Mapping[str, Any]) -> None:
    """Figures of the same title are one, with a trace for each model."""
    by_title: dict[str, dict[str, Any]] = {}
    for model, one in known.items():
        for drawing in items(one, "figures"):
            by_title.setdefault(text(part(drawing, "title")), {})[model] = drawing
    for place, (title, drawings) in enumerate(by_title.items()):
        draw = _radar if part(next(iter(drawings.values())), "kind") == "radar" else _bars
        section.figures[f"{task}-{place + 1}"] = draw(title, drawings, known)
        if draw is _bars:
            section.wide.add(f"{task}-{place + 1}")


def _values(drawing: Any) -> dict[str, Any]:
    values = part(drawing, "values")
    found = values if isinstance(values, Mapping) else {}
    return {str(name): value for name, value in found.items() if number(value) is not None or number(part(value, "value")) is not None}


def _middle(value: Any) -> float | None:
    return number(value) if number(value) is not None else number(part(value, "value"))


def _bars(title: str, drawings: Mapping[str, Any], everyone: Iterable[str]) -> Figure | None:
    first = next(iter(drawings.values()))
    traces = []
    for model, drawing in drawings.items():
        values = _values(drawing)
        if values:
            names = [label(name) for name in values]
            traces.append(
                bar_trace(
                    model, [_middle(one) for one in values.values()], names, colour_of(model, everyone), estimates=list(values.values())
                )
            )
    style, ends = style_of(part(first, "style")), [number(part(first, key)) for key in ("low", "high")]
    axis: Record = {"tickformat": style.removesuffix("p")}
    if None not in ends:
        axis["range"] = ends
    mark = number(part(first, "mark"))
    line = {"color": "var(--soft)", "width": 1, "dash": "dot"}
    shapes = [] if mark is None else [{"type": "line", "x0": mark, "x1": mark, "yref": "paper", "y0": 0, "y1": 1, "line": line}]
    return figure(
        title,
        traces,
        note=text(part(first, "note")),
        xaxis=axis,
        yaxis={"autorange": "reversed"},
        shapes=shapes,
        showlegend=len(traces) > 1,
        height=100 + 30 * max((len(trace["y"]) for trace in traces), default=0) * max(1, len(traces)),
        barmode="group",
    )


def _radar(title: str, drawings: Mapping[str, Any], everyone: Iterable[str]) -> Figure | None:
    names = list(dict.fromkeys(name for drawing in drawings.values() for name in _values(drawing)))
    first = next(iter(drawings.values()))
    traces = []
    for model, drawing in drawings.items():
        values = [_middle(_values(drawing).get(name)) for name in names]
        if len(names) > 2:
            trace: Record = {"type": "scatterpolar", "name": label(model), "fill": "toself", "opacity": 0.75}
            trace |= {"r": [*values, values[0]], "theta": [label(name) for name in [*names, names[0]]]}
            traces.append(trace | {"line": {"color": colour_of(model, everyone), "width": 2}})
    ends = [number(part(first, key)) for key in ("low", "high")]
    radial: Record = {"angle": 90, "tickangle": 90, **({} if None in ends else {"range": ends})}
    polar = {"radialaxis": radial, "angularaxis": {"direction": "clockwise", "rotation": 90}}
    margin = {"l": 70, "r": 70, "t": 40, "b": 40}
    note = text(part(first, "note"))
    return figure(title, traces, note=note, polar=polar, height=420, margin=margin, showlegend=len(traces) > 1)


def colour_of(name: str, everyone: Iterable[str]) -> str:
    """The colour of a model among others."""
    others = [one for one in everyone if one != BEFORE]
    return f"var(--c{others.index(name) % 6})" if name in others else "var(--soft)"


def bar_trace(name: str, values: Sequence[Any], names: Sequence[str], colour: str, *, estimates: Sequence[Any]) -> Record:
    """Horizontal bars of one colour; names are labels already."""
    trace: Record = {"type": "bar", "orientation": "h", "name": label(name), "x": list(values), "y": list(names)}
    return trace | {"marker": {"color": colour}, "error_x": error_bar(estimates, "var(--soft)")}


def error_bar(values: Sequence[Any], colour: str) -> Record:
    """plotly's error bar from estimates; no bar where there is no interval."""
    triples = [[number(part(value, key)) for key in ("low", "value", "high")] for value in values]
    up = [high - middle if middle is not None and high is not None else 0 for _, middle, high in triples]
    down = [middle - low if middle is not None and low is not None else 0 for low, middle, _ in triples]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "thickness": 1.5, "width": 5}
