"""A run or a comparison as a notebook's cell shows it: the curves that matter, the newest values, the notes."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo.report.curves import thinned
from orpo.report.facts import ComparisonFacts, Logs
from orpo.report.sections import number, part
from orpo.webpage.inline import FIRST, INK, SECOND, Curve, chart, listed, paragraph, row_of, table

MOST_ROWS = 12
"""Logs that are listed: the newest ones, since the curves show the others."""
_COLUMNS = (
    ("loss", "loss", ".3f"),
    ("nll_loss", "next-token", ".3f"),
    ("rewards/accuracies", "accuracy", ".0%"),
    ("margin", "margin", "+.3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)


def run_cell(logs: Logs, head: str) -> str:
    """Curves and newest values of a run; `head` stands above them."""
    known = [record for record in logs.training if any(name in record for name, _, _ in _COLUMNS)]
    known = [{**record, "margin": _margin(record)} for record in known]
    columns = [item for item in _COLUMNS if any(number(record.get(item[0])) is not None for record in known)]
    rows = [[_shown(record.get("step"), "g"), *(_shown(record.get(name), style) for name, _, style in columns)] for record in known]
    charts = [_chart("Loss", logs, (("loss", "loss", INK), ("nll_loss", "next-token", FIRST))), _margin_chart(logs)]
    charts.append(_chart("Log-probability", logs, (("logps/chosen", "chosen", FIRST), ("logps/rejected", "rejected", SECOND))))
    pieces = [paragraph(head, is_strong=True), row_of([piece for piece in charts if piece])]
    if rows:
        pieces.append(table(["step", *(words for _, words, _ in columns)], rows[-MOST_ROWS:], num_texts=0))
    held_out = [record for record in logs.evaluation if number(record.get("step")) is not None]
    if held_out:
        pieces += [paragraph("Held out"), _held_out(held_out[-MOST_ROWS:], logs.evaluation_prefixes)]
    return "".join(pieces)


def _margin(record: Mapping[str, Any], prefix: str = "") -> float | None:
    """Of the mean log-probabilities, nats per token, as everywhere; the logged `rewards/margins` is that times a strength."""
    chosen, rejected = (number(record.get(f"{prefix}logps/{side}")) for side in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else chosen - rejected


def _shown(value: Any, style: str) -> str:
    """A number in its style; what is none as it is, since hiding a NaN is how runs die unseen."""
    if value is None:
        return ""
    known = number(value)
    return format(known, style) if known is not None and math.isfinite(known) else str(value)


def _held_out(records: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> str:
    rows = [
        [
            _shown(record.get("step"), "g"),
            prefix.removeprefix("eval_").strip("_"),
            _shown(record.get(f"{prefix}loss"), ".3f"),
            _shown(record.get(f"{prefix}rewards/accuracies"), ".0%"),
            _shown(_margin(record, prefix), "+.3f"),
        ]
        for record in records
        for prefix in prefixes
        if f"{prefix}nll_loss" in record
    ]
    return table(["step", "rows", "loss", "accuracy", "margin"], rows, num_texts=0)


def _chart(title: str, logs: Logs, wanted: Sequence[tuple[str, str, str]]) -> str:
    return chart(title, [_curve(words, colour, *logs.series(name)) for name, words, colour in wanted])


def _margin_chart(logs: Logs) -> str:
    points = [(number(record.get("step")), _margin(record)) for record in logs.training]
    known = [(step, margin) for step, margin in points if step is not None and margin is not None]
    return chart("Margin, nats per token", [_curve("", FIRST, [step for step, _ in known], [margin for _, margin in known])])


def _curve(name: str, colour: str, steps: Sequence[float], values: Sequence[float]) -> Curve:
    return Curve(name, colour, *thinned(steps, values))


def comparison_cell(facts: ComparisonFacts, head: str) -> str:
    """The methods of a comparison on its test pairs, with their intervals."""
    metrics = (("accuracy", ".1%"), ("margin", "+.3f"), ("chosen_logp", "+.3f"), ("rejected_logp", "+.3f"))
    rows = []
    for name, method in facts.methods.items():
        summary = part(method, "summary") or {}
        rows.append([facts.label_of(name), *(_estimate(part(summary, metric), style) for metric, style in metrics)])
    columns = ["method", "accuracy", "margin", "log-probability of chosen", "of rejected"]
    return paragraph(head, is_strong=True) + table(columns, rows)


def _estimate(value: Any, style: str) -> str:
    middle, low, high = (number(part(value, name)) for name in ("value", "low", "high"))
    if middle is None:
        return ""
    return format(middle, style) + ("" if low is None or high is None else f" ({format(low, style)} to {format(high, style)})")


def link(page: Path, notes: Sequence[str]) -> str:
    """Where the page lies, and what is to be known of it."""
    return f"<p>The page: <a href='{html.escape(page.as_posix(), quote=True)}'>{html.escape(str(page))}</a></p>" + listed(notes)
