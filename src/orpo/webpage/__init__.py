"""Pages that open offline: no request leaves them, and nothing that comes from data, models or names can run in them.

What the audit, the preview and the report share: one look, one policy, one way to draw figures. A page is a template that extends
`base.html.j2`. Its text goes through the template's escaping; figures are data in a JSON block, drawn by plotly, whose labels know a few
HTML tags and are therefore escaped once more (`label`). Above that, the page's policy names its scripts by their hashes: another one would
not run, wherever it came from.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo.errors import UserError

LABEL_CHARS = 60
"""Longer labels are cut."""

Figure = dict[str, Any]
"""`title`, `traces` and `layout` as plotly takes them, and a `note`. A colour may be `var(--name)`, a colour of the page's style."""


def require_plotly(where: str, mend: str) -> None:
    """Stop where the package that draws figures is not installed; `mend` is the command that installs it.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UserError("its figures need plotly", where=where, mend=mend)


def render(package: str, template: str, *, figures: Mapping[str, Figure | None] | None = None, **values: Any) -> str:
    """A page as text.

    Args:
        package: the package with the template.
        template: a file that extends `base.html.j2`.
        figures: by name; the template has a place for each (`{{ figure(name) }}` of the macros). None is left out.
        values: what the template speaks of.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("orpo.webpage", "."), jinja2.PackageLoader(package, ".")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {name: figure for name, figure in (figures or {}).items() if figure is not None}
    scripts = _scripts() if drawn else ()
    return environment.get_template(template).render(
        figures=drawn,
        figures_json=jinja2.utils.markupsafe.Markup(embedded_json({name: _drawing(figure) for name, figure in drawn.items()})),
        scripts=[jinja2.utils.markupsafe.Markup(script) for script in scripts],
        policy=policy(scripts),
        **values,
    )


def policy(scripts: Sequence[str]) -> str:
    """The Content-Security-Policy of a page with these scripts: no network, and no other script."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    # plotly draws heat maps as images that stand in the page itself.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def embedded_json(value: Any) -> str:
    """JSON that stands inside a script element: "<" is the one character that could end it, and JSON may always write it as an escape."""
    return json.dumps(_without_nan(value), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")


def label(text: object) -> str:
    """Text for a plotly label, which would read tags and entities."""
    whole = str(text)
    return html.escape(whole if len(whole) <= LABEL_CHARS else whole[: LABEL_CHARS - 1] + "…")


def figure(title: str, traces: Sequence[Mapping[str, Any]], *, x: str = "", y: str = "", note: str = "", **layout: Any) -> Figure | None:
    """A figure, or None where there is nothing to draw.

    Args:
        title: shown as text above it.
        traces: as plotly takes them; names and categories come from `label`.
        x, y: titles of the axes.
        note: a sentence under the title.
        layout: further fields of plotly's layout; they go before those that all figures share.
    """
    if not traces:
        return None
    axes = {name: {**({"title": {"text": text}} if text else {}), **layout.pop(name, {})} for name, text in (("xaxis", x), ("yaxis", y))}
    return {"title": title, "note": note, "traces": [dict(trace) for trace in traces], "layout": {**axes, **layout}}


def _drawing(figure: Figure) -> dict[str, Any]:
    """What the script needs of a figure; its title and note are text of the page."""
    return {"traces": figure["traces"], "layout": figure["layout"]}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def _scripts() -> tuple[str, str]:
    """plotly, and what draws the figures with it."""
    from plotly.offline import get_plotlyjs

    own = (Path(__file__).parent / "figures.js").read_text(encoding="utf-8")
    # A parser of HTML reads line ends as \n before it takes the hash.
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n"), own
