"""What each method of a comparison cost, how it was tuned, and how much depends on its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from orpo.report.curves import CHOSEN, REJECTED
from orpo.report.facts import ComparisonFacts
from orpo.report.sections import (
    Cell,
    Row,
    Section,
    Table,
    bars,
    estimate,
    human_bytes,
    human_count,
    human_seconds,
    items,
    number,
    part,
    parts,
    show,
    text,
)
from orpo.webpage import Figure, figure, label

_COSTS = (
    ("num_steps", "optimizer steps", human_count),
    ("pairs", "pairs", human_count),
    ("forward_passes", "forward passes", human_count),
    ("backward_passes", "backward passes", human_count),
    ("forward_tokens", "tokens forward", human_count),
    ("backward_tokens", "tokens backward", human_count),
    ("reference_tokens", "tokens of the reference", human_count),
    ("flops", "floating-point operations", human_count),
    ("train_s", "training time", human_seconds),
    ("reference_s", "time for the reference", human_seconds),
    ("peak_bytes", "peak memory", human_bytes),
)


def cost_section(facts: ComparisonFacts) -> Section:
    """Passes, tokens, operations, time and memory of each method, over all its stages, mean over seeds; with the ratio to ORPO."""
    section = Section("cost", "Cost")
    totals = {name: _mean_totals(items(method, "runs")) for name, method in facts.methods.items()}
    totals = {name: total for name, total in totals.items() if total}
    if not totals:
        return section
    base = totals.get("orpo", {})
    rows: list[Row] = []
    for key, words, told in _COSTS:
        if not any(total.get(key) for total in totals.values()):
            continue
        cells: Row = [Cell(words)]
        for name, total in totals.items():
            has_ratio = name != "orpo" and total.get(key) is not None and base.get(key)
            cells.append(Cell(told(total.get(key)), f"{total[key] / base[key]:.2f} ×" if has_ratio else ""))
        rows.append(cells)
    section.tables.append(Table(("", *map(facts.label_of, totals)), rows))
    section.lead.append(
        "Of one run, over all its stages, mean over seeds; in brackets: times ORPO's. Time and memory depend on what else the machine did."
    )
    section.tables += [table for table in [_stage_table(facts)] if table is not None]
    section.figures = {
        key: _cost_bars(facts, totals, key, words)
        for key, words in (("flops", "Floating-point operations"), ("train_s", "Training time, seconds"))
    }
    return section


def _mean_totals(runs: Sequence[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, _, _ in _COSTS:
        values = [value for value in (number(part(run, "totals", key)) for run in runs) if value is not None]
        if values:
            found[key] = sum(values) / len(values)
    return found


def _stage_table(facts: ComparisonFacts) -> Table | None:
    """Stages of each method's first run."""
    rows: list[Row] = []
    for name, method in facts.methods.items():
        for place, stage in enumerate(items(items(method, "runs")[0], "stages") if items(method, "runs") else []):
            told = [shown(part(stage, key)) for key, _, shown in _COSTS]
            rows.append([Cell(facts.label_of(name)), f"{place + 1}: {text(part(stage, 'objective'), '?')}", *told])
    if not rows:
        return None
    return Table(
        ("method", "stage", *(words for _, words, _ in _COSTS)), rows, title="Stage by stage (first seed)", num_texts=2, is_folded=True
    )


def _cost_bars(facts: ComparisonFacts, totals: Mapping[str, dict[str, float]], key: str, words: str) -> Figure | None:
    known = [(name, total[key]) for name, total in totals.items() if total.get(key)]
    colours = [f"var(--c{list(facts.methods).index(name) % 6})" for name, _ in known]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [value for _, value in known],
        "y": [label(facts.label_of(name)) for name, _ in known],
        "marker": {"color": colours},
    }
    axis = {"autorange": "reversed"}
    return figure(words, [trace] if known else [], yaxis=axis, height=100 + 30 * len(known), bargap=0.35)


def trial_section(facts: ComparisonFacts) -> Section:
    """What was tried on the validation rows, and what was chosen."""
    section = Section("tuning", "Tuning on the validation rows", short="Tuning")
    rows: list[Row] = []
    estimates = []
    for name, method in facts.methods.items():
        chosen = parts(method, "options")
        for trial in items(method, "trials"):
            options = parts(trial, "options")
            told = ", ".join(f"{key} {text(value)}" for key, value in options.items())
            is_chosen = bool(chosen) and all(options.get(key) == value for key, value in chosen.items() if key in options)
            rows.append(
                [
                    Cell(facts.label_of(name)),
                    Cell(told + (" (chosen)" if is_chosen else ""), tone="good" if is_chosen else ""),
                    estimate(part(trial, "validation", "accuracy"), ".1%"),
                    estimate(part(trial, "validation", "margin"), "+.3f"),
                ]
            )
            estimates.append(part(trial, "validation", "margin"))
    if rows:
        drawn: list[Row] = [[*cells, bar] for cells, bar in zip(rows, bars(estimates), strict=True)]
        section.tables.append(Table(("method", "options", "accuracy", "margin, nats per token", "margin, from 0"), drawn, num_texts=2))
        section.lead.append("Every method got the same small grid; the test rows had no part in the choice.")
    return section


def sweep_section(facts: ComparisonFacts) -> Section:
    """Margins over learning rate and strength as heat maps on one colour scale."""
    section = Section("sweep", "Sweep: how much depends on the options", short="Sweep")
    tables = {name: value for name, value in parts(facts.found, "sweep").items() if isinstance(value, Mapping) and items(value, "margin")}
    grids = {
        name: [[number(cell) for cell in row] if isinstance(row, list) else [] for row in items(value, "margin")]
        for name, value in tables.items()
    }
    seen = [cell for grid in grids.values() for row in grid for cell in row if cell is not None]
    if not seen:
        return section
    span = {"zmin": min(*seen, 0.0), "zmax": max(*seen, 0.0) or 1.0}
    for place, (name, value) in enumerate(tables.items()):
        strength = text(part(facts.found, "methods", name, "strength_name"), "strength")
        heat = {
            "type": "heatmap",
            "z": grids[name],
            **span,
            "texttemplate": "%{z:.2f}",
            "colorscale": [[0, "var(--card)"], [1, "var(--first)"]],
            "x": [text(one) for one in items(value, "strengths")],
            "y": [text(one) for one in items(value, "learning_rates")],
            "colorbar": {"thickness": 10, "title": {"text": "margin"}},
            "xgap": 2,
            "ygap": 2,
        }
        section.figures[f"sweep{place}"] = figure(
            facts.label_of(name),
            [heat],
            x=label(strength),
            y="learning rate",
            note="margin on the validation rows, nats per token",
            xaxis={"type": "category"},
            yaxis={"type": "category"},
            height=320,
        )
        rows: list[Row] = [
            [
                Cell(text(rate)),
                *(f"{show(margin, '+.3f')} ({show(accuracy, '.0%')})" for margin, accuracy in zip(margins, accuracies, strict=False)),
            ]
            for rate, margins, accuracies in zip(items(value, "learning_rates"), grids[name], items(value, "accuracy"), strict=False)
            if isinstance(accuracies, list)
        ]
        head = ("learning rate", *(f"{strength} {text(one)}" for one in items(value, "strengths")))
        section.tables.append(Table(head, rows, title=f"{facts.label_of(name)}: margin in nats per token (accuracy)", is_folded=True))
    section.lead.append(
        "Final margin (nats per token) over a grid of learning rate and each method's own strength; one colour scale for all. Even "
        "colour is what robust looks like."
    )
    return section


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
