"""The paper's figure: how chosen and rejected answers part under each method, over the tokens that it computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from orpo.report.comparisonfacts import ComparisonFacts
from orpo.report.curves import CHOSEN, REJECTED
from orpo.report.sections import Section, items, number, part
from orpo.webpage import Figure, figure, label


def parting_section(facts: ComparisonFacts) -> Section:
    """The paper's figure: log-probabilities of chosen and rejected answers over tokens, one panel per method on one scale."""
    section = Section("parting", "How chosen and rejected answers part", short="Parting")
    curves = {name: [_curve(run) for run in items(method, "runs")] for name, method in facts.methods.items()}
    curves = {name: [curve for curve in found if curve] for name, found in curves.items()}
    values = [point[side] for found in curves.values() for curve in found for point in curve for side in ("chosen_logp", "rejected_logp")]
    if not values:
        return section
    pad = 0.05 * ((max(values) - min(values)) or 1.0)
    scale = [min(values) - pad, max(values) + pad]
    for place, (name, found) in enumerate(curves.items()):
        section.figures[f"parting{place}"] = _panel(facts.label_of(name), found, scale)
    margins = []
    for place, (name, found) in enumerate(curves.items()):
        for number_, curve in enumerate(found):
            line = {"color": f"var(--c{place % 6})", "width": 2}
            margins.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": label(facts.label_of(name)),
                    "legendgroup": str(place),
                    "showlegend": number_ == 0,
                    "x": [point["tokens"] for point in curve],
                    "y": [point["margin"] for point in curve],
                    "line": line,
                }
            )
    section.figures["margins"] = figure("Margin, all methods", margins, x="tokens computed, all stages", y="nats per token", height=340)
    section.wide.add("margins")
    section.lead.append(
        "Mean log-probabilities of held-out answers while training, over tokens counted in all stages, one scale for all panels. "
        "The dotted line is where the second stage begins."
    )
    return section


def _curve(run: Any) -> list[dict[str, float]]:
    """The points of a run that have all their numbers, with their stage."""
    points = []
    for point in items(run, "curve"):
        found = {key: number(part(point, key)) for key in ("stage", "tokens", "chosen_logp", "rejected_logp", "margin")}
        if found["margin"] is None and found["chosen_logp"] is not None and found["rejected_logp"] is not None:
            found["margin"] = found["chosen_logp"] - found["rejected_logp"]
        known = {key: value for key, value in found.items() if value is not None}
        if known.keys() >= {"tokens", "chosen_logp", "rejected_logp"}:
            points.append(known)
    return points


def _panel(title: str, curves: Sequence[Sequence[dict[str, float]]], scale: list[float]) -> Figure | None:
    traces = []
    for place, curve in enumerate(curves):
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": side,
                    "legendgroup": side,
                    "showlegend": place == 0,
                    "x": [point["tokens"] for point in curve],
                    "y": [point[f"{side}_logp"] for point in curve],
                    "line": {"color": colour, "width": 2},
                    "marker": {"color": colour, "size": 4},
                    "opacity": 1 if len(curves) == 1 else 0.7,
                }
            )
    second = [point["tokens"] for curve in curves[:1] for before, point in pairwise(curve) if point.get("stage") != before.get("stage")]
    style = {"color": "var(--soft)", "width": 1, "dash": "dot"}
    shapes = [{"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": style} for x in second]
    return figure(title, traces, x="tokens computed", y="nats per token", yaxis={"range": scale}, shapes=shapes)
