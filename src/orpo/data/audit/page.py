"""The audit as one HTML file that opens offline: no request leaves it, and nothing in the data can run in it.

Text goes through the template's escaping. Figures are data in a JSON block, drawn by plotly, whose labels know a few HTML tags and are
therefore escaped once more.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from orpo.data.audit.report import Audit
from orpo.data.audit.run import require_extras

_NUM_BINS = 40
_MOST_SHORTCUTS = 12
_MOST_SCENARIOS = 20
_LABEL_CHARS = 60

Figure = dict[str, Any]


def write_page(audit: Audit, path: str | Path) -> None:
    """Write the page.

    Raises:
        UserError: plotly or jinja2 is missing.
    """
    require_extras("plotly", "jinja2")
    Path(path).write_text(render_page(audit), encoding="utf-8")


def render_page(audit: Audit) -> str:
    """The page as text."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orpo.data.audit", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    figures = _figures(audit)
    # "<" is the one character that could end the block; JSON may always write it as an escape.
    data = json.dumps(figures, ensure_ascii=True).replace("<", "\\u003c")
    return environment.get_template("page.html.j2").render(
        audit=audit,
        facts=audit.to_dict(),
        titles={name: figure["title"] for name, figure in figures.items()},
        figures_json=jinja2.utils.markupsafe.Markup(data),
        plotly_js=jinja2.utils.markupsafe.Markup(get_plotlyjs()),
    )


def label(text: str) -> str:
    """Text for a plotly label, which would read tags and entities."""
    return html.escape(text if len(text) <= _LABEL_CHARS else text[: _LABEL_CHARS - 1] + "…")


def _histogram(values: dict[str, np.ndarray], *, title: str, x: str, line: float | None = None) -> Figure | None:
    """Overlaid histograms with common bins, cut at the 99.5th percentile so that one outlier does not flatten them."""
    filled = {name: array for name, array in values.items() if len(array)}
    if not filled:
        return None
    joint = np.concatenate(list(filled.values()))
    low, high = np.percentile(joint, [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1, _NUM_BINS + 1)
    traces = []
    for name, array in filled.items():
        counts, _ = np.histogram(np.clip(array, edges[0], edges[-1]), bins=edges)
        centres = ((edges[:-1] + edges[1:]) / 2).round(3)
        traces.append({"type": "bar", "name": label(name), "x": centres.tolist(), "y": counts.tolist(), "opacity": 0.65})
    return {"title": title, "traces": traces, "x": x, "y": "rows", "line": line, "overlay": True}


def _bars(
    names: list[str], values: list[float], *, title: str, x: str, errors: list[float] | None = None, line: float | None = None
) -> Figure:
    """Horizontal bars, the first on top."""
    trace: dict[str, Any] = {"type": "bar", "orientation": "h", "y": [label(name) for name in names], "x": values}
    if errors is not None:
        trace["error_x"] = {"type": "data", "array": errors, "visible": True}
    return {"title": title, "traces": [trace], "x": x, "y": "", "line": line, "overlay": False}


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
