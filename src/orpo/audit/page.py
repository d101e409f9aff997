"""The audit as one HTML file that opens offline (`orpo.webpage`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from orpo.audit.result import Audit
from orpo.system.installing import pip_line
from orpo.webpage import Figure, figure, label, render, require_plotly

_NUM_BINS = 40
_MOST_SHORTCUTS = 12
_MOST_SCENARIOS = 20


def write_page(audit: Audit, path: str | Path) -> None:
    """Write the page.

    Raises:
        UserError: plotly is missing.
    """
    require_plotly("orpo audit --html", pip_line("audit"))
    Path(path).write_text(render_page(audit), encoding="utf-8")


def render_page(audit: Audit) -> str:
    """The page as text."""
    return render("orpo.audit", "page.html.j2", figures=_figures(audit), audit=audit, facts=audit.to_dict())


def _histogram(values: dict[str, np.ndarray], *, title: str, x: str, line: float | None = None) -> Figure | None:
    """Overlaid histograms with common bins, cut at the 99.5th percentile so that one outlier does not flatten them."""
    filled = {name: array for name, array in values.items() if len(array)}
    if not filled:
        return None
    joint = np.concatenate(list(filled.values()))
    low, high = np.percentile(joint, [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1, _NUM_BINS + 1)
    traces: list[Figure] = []
    for name, array in filled.items():
        counts, _ = np.histogram(np.clip(array, edges[0], edges[-1]), bins=edges)
        centres = ((edges[:-1] + edges[1:]) / 2).round(3)
        marker = {"color": f"var(--c{len(traces)})"}
        traces.append({"type": "bar", "name": label(name), "x": centres.tolist(), "y": counts.tolist(), "opacity": 0.65, "marker": marker})
    return figure(title, traces, x=x, y="rows", barmode="overlay", bargap=0.02, showlegend=len(traces) > 1, shapes=_mark(line))


def _bars(
    names: list[str], values: list[float], *, title: str, x: str, errors: list[float] | None = None, line: float | None = None
) -> Figure | None:
    """Horizontal bars, the first on top."""
    trace: dict[str, Any] = {"type": "bar", "orientation": "h", "y": [label(name) for name in names], "x": values}
    trace["marker"] = {"color": "var(--c0)"}
    if errors is not None:
        trace["error_x"] = {"type": "data", "array": errors, "visible": True, "color": "var(--soft)", "thickness": 1.2}
    return figure(title, [trace], x=x, yaxis={"autorange": "reversed"}, bargap=0.25, shapes=_mark(line))


def _mark(line: float | None) -> list[dict[str, Any]]:
    """A dotted upright line at a value that matters."""
    if line is None:
        return []
    style = {"color": "var(--line)", "width": 1.5, "dash": "dot"}
    return [{"type": "line", "x0": line, "x1": line, "yref": "paper", "y0": 0, "y1": 1, "line": style}]


def _figures(audit: Audit) -> dict[str, Figure]:
    table = audit.table
    figures: dict[str, Figure | None] = {}
    words = {"chosen": np.expm1(table.chosen_features[:, 0]), "rejected": np.expm1(table.rejected_features[:, 0])}
    figures["lengths"] = _histogram(words, title="Length of the answers", x="words")
    difference = {"difference": words["chosen"] - words["rejected"]}
    figures["difference"] = _histogram(difference, title="Chosen minus rejected", x="words more in the chosen answer", line=0)
    if audit.shortcuts:
        strongest = [*audit.shortcuts[:_MOST_SHORTCUTS], audit.shortcuts[-1]]
        figures["shortcuts"] = _bars(
            [shortcut.feature for shortcut in strongest],
            [round(shortcut.accuracy, 4) for shortcut in strongest],
            errors=[round(shortcut.error, 4) for shortcut in strongest],
            title="How well the surface alone predicts the choice",
            x="cross-validated accuracy",
            line=0.5,
        )
    if len(audit.scenarios) > 1:
        largest = audit.scenarios[:_MOST_SCENARIOS]
        figures["scenarios"] = _bars([s.name for s in largest], [s.num_pairs for s in largest], title="Pairs per scenario", x="pairs")
    if audit.tokens is not None:
        longest = {"prompt and longest answer": audit.tokens.lengths["longest"]}
        figures["tokens"] = _histogram(longest, title="Length in tokens", x="tokens", line=audit.tokens.max_length)
    for number, surprise in enumerate(audit.surprises):
        margins = {surprise.method: surprise.margins}
        figures[f"margins{number}"] = _histogram(margins, title="What the model says", x="margin, nats per token", line=0)
    return {name: figure for name, figure in figures.items() if figure is not None}
