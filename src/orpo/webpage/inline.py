"""Pieces of HTML for the cells of a notebook: tables and small charts, without a script, so that an untrusted notebook shows them too.

Jupyter, Colab and VS Code put a cell's HTML into a page of their own, whose policy is not ours. So what comes from data, models or names is
escaped here, and a chart is an image that stands in the page itself: nothing in an image can run or ask the network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 26, 22
INK, FIRST, SECOND = "#888888", "#2f7ed8", "#d9822b"
"""Middle tones: an image does not know whether the notebook around it is light or dark."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line of a chart; places and values are finite and equally many."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int = 1) -> str:
    """A table; the first `num_texts` columns are text and on the left, the others numbers."""
    left, right = "text-align:left;vertical-align:top", "text-align:right;vertical-align:top;white-space:nowrap"
    styles = [f"padding:2px 8px;{left if place < num_texts else right}" for place in range(len(columns))]

    def cells(tag: str, texts: Sequence[str]) -> str:
        made = (f"<{tag} style='{style}'>{html.escape(text)}</{tag}>" for text, style in zip(texts, styles, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f"<div style='overflow-x:auto'><table><thead>{cells('th', columns)}</thead><tbody>{body}</tbody></table></div>"


def paragraph(text: str, *, is_strong: bool = False) -> str:
    """A paragraph of plain text."""
    said = html.escape(text)
    return f"<p><b>{said}</b></p>" if is_strong else f"<p>{said}</p>"


def listed(texts: Sequence[str]) -> str:
    """A list of plain texts; nothing for none."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def row_of(pieces: Sequence[str]) -> str:
    """Pieces beside each other, below each other where there is no room."""
    return f"<div style='display:flex;flex-wrap:wrap;gap:12px'>{''.join(pieces)}</div>"


def chart(title: str, curves: Sequence[Curve], *, x: str = "step") -> str:
    """A line chart as an image; empty where no curve has two points."""
    drawn = [curve for curve in curves if len(curve.y) > 1]
    if not drawn:
        return ""
    told = f"{title}: " + "; ".join(f"{curve.name} {curve.y[0]:.4g} to {curve.y[-1]:.4g}" for curve in drawn)
    data = base64.b64encode(_svg(title, drawn, x).encode("utf-8", "replace")).decode()
    return f"<img alt='{html.escape(told, quote=True)}' style='max-width:100%' src='data:image/svg+xml;base64,{data}'>"


def _svg(title: str, curves: Sequence[Curve], x: str) -> str:
    lowest_x, highest_x = _span([value for curve in curves for value in curve.x])
    lowest_y, highest_y = _span([value for curve in curves for value in curve.y])
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(step: float, value: float) -> str:
        across = _LEFT + width * (step - lowest_x) / (highest_x - lowest_x)
        return f"{across:.1f},{_TOP + height * (highest_y - value) / (highest_y - lowest_y):.1f}"

    parts = [_text(_LEFT, 15, title, weight="bold")]
    legend = _LEFT + width
    for curve in reversed(curves):
        parts.append(_text(legend, 15, curve.name, colour=curve.colour, anchor="end"))
        legend -= 7 * len(curve.name) + 10
    for share in (0.0, 0.5, 1.0):
        value, y = lowest_y + share * (highest_y - lowest_y), _TOP + height * (1 - share)
        parts.append(f"<line x1='{_LEFT}' x2='{_LEFT + width}' y1='{y:.1f}' y2='{y:.1f}' stroke='{INK}' stroke-opacity='.35'/>")
        parts.append(_text(_LEFT - 5, y + 4, f"{value:.3g}", anchor="end"))
    parts.append(_text(_LEFT, HEIGHT - 6, f"{lowest_x:g}"))
    parts.append(_text(_LEFT + width, HEIGHT - 6, f"{x} {highest_x:g}", anchor="end"))
    for curve in curves:
        points = " ".join(place(step, value) for step, value in zip(curve.x, curve.y, strict=True))
        parts.append(f"<polyline fill='none' stroke='{curve.colour}' stroke-width='2' points='{points}'/>")
    size = f"width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size}>{''.join(parts)}</svg>"


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, apart from each other also where all values are one."""
    lowest, highest = min(values), max(values)
    margin = 0.0 if highest > lowest else abs(lowest) * 0.1 or 1.0
    return lowest - margin, highest + margin


def _text(x: float, y: float, text: str, *, colour: str = INK, anchor: str = "start", weight: str = "normal") -> str:
    style = f"font-family='sans-serif' font-size='12' font-weight='{weight}' fill='{colour}' text-anchor='{anchor}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{html.escape(text)}</text>"
