"""An audit as a notebook's cell shows it: the tables of `print(audit)`."""

from __future__ import annotations

from typing import Any

from orpo.data.types import NOTES, REASONS
from orpo.webpage.inline import listed, paragraph, table


def audit_cell(audit: Any) -> str:
    """An `Audit`, whole; everything in it that comes from the rows is escaped."""
    pieces = [paragraph(f"{audit.source}: {audit.num_rows} rows, {audit.num_usable} usable, {audit.num_pairs} pairs", is_strong=True)]
    pieces.append(listed(audit.shapes))
    pieces.append(_findings(audit) if audit.findings else paragraph(audit.nothing_found()))
    pieces.append(_lengths(audit))
    if audit.shortcuts:
        best = [*audit.shortcuts[:3], audit.shortcuts[-1]]
        rows = [[f"{one.accuracy:.2f} ± {one.error:.2f}", one.feature, one.direction or ""] for one in best]
        pieces.append(paragraph("Best predictors of the choice by surface alone; 0.50 is chance"))
        pieces.append(table(["accuracy", "feature", ""], rows, num_texts=3))
    if audit.scenarios:
        first = audit.scenarios[:12]
        rows = [[one.name, str(one.num_pairs), f"{100 * one.share:.1f} %", f"{100 * one.chosen_longer:.0f} %"] for one in first]
        by = audit.scenario_column or "groups of similar prompts"
        pieces += [paragraph(f"Scenarios ({by})"), table(["scenario", "pairs", "share", "chosen longer"], rows)]
    pieces.append(listed([surprise.sentence() for surprise in audit.surprises]))
    return "".join(pieces)


def _findings(audit: Any) -> str:
    rows = []
    for finding in audit.findings:
        what = f"{finding.kind.title}. {finding.note}".strip() if finding.note else finding.kind.title
        places = audit.places_of(finding, 5) if finding.places else ""
        count = f"{finding.num_rows} ({100 * finding.share:.1f} %)" if finding.num_rows else ""
        rows.append([finding.severity, finding.code, what, finding.kind.mend, places, count])
    return table(["severity", "finding", "what", "what to do", "rows", "number"], rows, num_texts=5)


def _lengths(audit: Any) -> str:
    rows = [
        [unit, side, *(str(numbers[name]) for name in ("p50", "p95", "p100"))]
        for unit, sides in audit.lengths.items()
        for side, numbers in sides.items()
        if numbers
    ]
    told = []
    if audit.tokens is not None:
        rows += [
            ["tokens", name, *(str(numbers[key]) for key in ("p50", "p95", "p100"))]
            for name, numbers in audit.tokens.percentiles().items()
            if numbers
        ]
        codes = {**audit.tokens.dropped, **audit.tokens.notes}
        told = [f"{len(places)} rows: {REASONS.get(code) or NOTES.get(code, code)}" for code, places in codes.items()]
    if audit.num_pairs:
        told.append(f"chosen answer longer (words): {100 * audit.chosen_longer:.0f} % of the pairs")
    return (table(["length in", "of", "median", "95 %", "longest"], rows, num_texts=2) if rows else "") + listed(told)
