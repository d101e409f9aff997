"""The result of an audit, for the terminal, for machines and for the HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orpo.audit.findings import Finding
from orpo.audit.scenarios import Scenario
from orpo.audit.shortcuts import MIN_PAIRS, Shortcut
from orpo.audit.surprise import Surprise
from orpo.audit.table import AuditTable
from orpo.audit.tokens import TokenFacts
from orpo.data.types import NOTES, REASONS

FORMAT = 1
"""Version of the JSON that `to_dict` gives."""


@dataclass(slots=True, repr=False)
class Audit:
    """What was found.

    Attributes:
        source: what was audited, as given.
        shapes: one line per source: how its rows are read.
        num_rows: rows read. `num_usable`: preferences they make. `num_pairs`: pairs in those.
        reasons: why rows make none.
        findings: gravest first.
        lengths: percentiles of "prompt", "chosen", "rejected" in words and in characters.
        leaving: row index -> finding codes for which `write_clean` leaves the row out.

    Example:
        >>> from orpo import audit
        >>> found = audit("pairs.jsonl")
        >>> print(found)
        pairs.jsonl: 12 rows, 12 usable, 12 pairs
        ...
        >>> sorted(found.to_dict())[:3]
        ['chosen_longer', 'findings', 'format']
    """

    source: str
    shapes: list[str]
    num_rows: int
    num_usable: int
    num_pairs: int
    reasons: Counter[str]
    findings: list[Finding]
    lengths: dict[str, dict[str, dict[str, int]]]
    chosen_longer: float
    shortcuts: list[Shortcut]
    scenarios: list[Scenario]
    scenario_column: str | None
    tokens: TokenFacts | None
    surprises: list[Surprise]
    table: AuditTable
    leaving: dict[int, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """No finding that `--strict` stops at."""
        return not any(finding.severity in {"error", "warning"} for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format": FORMAT,
            "source": self.source,
            "shapes": self.shapes,
            "num_rows": self.num_rows,
            "num_usable": self.num_usable,
            "num_pairs": self.num_pairs,
            "is_clean": self.is_clean,
            "reasons": dict(self.reasons),
            "findings": [finding.to_dict() for finding in self.findings],
            "lengths": self.lengths,
            "chosen_longer": round(self.chosen_longer, 4),
            "shortcuts": [shortcut.to_dict() for shortcut in self.shortcuts],
            "scenario_column": self.scenario_column,
            "scenarios": [scenario.to_dict() for scenario in self.scenarios],
            "tokens": self.tokens.to_dict() if self.tokens else None,
            "model": [surprise.to_dict() for surprise in self.surprises],
            "seconds": round(self.seconds, 2),
        }

    def lines(self, num_places: int = 5) -> Iterator[str]:
        """The report as text, line by line."""
        yield f"{self.source}: {self.num_rows} rows, {self.num_usable} usable, {self.num_pairs} pairs"
        for shape in self.shapes:
            yield f"  {shape}"
        yield ""
        if not self.findings:
            yield self.nothing_found()
        for finding in self.findings:
            yield from self._finding_lines(finding, num_places)
        yield from self._length_lines()
        if self.num_pairs:
            yield f"chosen answer longer (words): {100 * self.chosen_longer:.0f} % of the pairs"
        if self.shortcuts:
            yield "best predictors of the choice by surface alone (cross-validated accuracy; 0.50 is chance):"
            for shortcut in [*self.shortcuts[:3], self.shortcuts[-1]]:
                more = f" ({shortcut.direction})" if shortcut.direction else ""
                yield f"  {shortcut.accuracy:.2f} ± {shortcut.error:.2f}  {shortcut.feature}{more}"
        if self.scenarios:
            by = self.scenario_column or "groups of similar prompts"
            yield f"scenarios ({by}): pairs, share, chosen longer, variety of the chosen answers"
            for scenario in self.scenarios[:12]:
                variety = f"{scenario.variety:.2f}" if scenario.variety == scenario.variety else "-"
                numbers = f"{scenario.num_pairs:>7}  {100 * scenario.share:5.1f} %  {100 * scenario.chosen_longer:4.0f} %  {variety:>5}"
                yield f"  {numbers}  {scenario.name}"
        for surprise in self.surprises:
            yield surprise.sentence()

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        from orpo.audit.inline_audit import audit_cell

        return audit_cell(self)

    def nothing_found(self) -> str:
        """What is said where there is no finding."""
        if not self.num_usable:
            return "No row can be trained on."
        if self.num_pairs >= MIN_PAIRS:
            return "Nothing found that would hurt."
        return f"Nothing found in single rows. Shortcuts and scenarios were not looked for: that takes {MIN_PAIRS} pairs."

    @staticmethod
    def places_of(finding: Finding, num_places: int) -> str:
        """The first rows of a finding, their common file named once, and how many more there are."""
        more = f", and {finding.num_rows - num_places} more" if finding.num_rows > num_places else ""
        return f"{_short(finding.places[:num_places])}{more}"

    def _finding_lines(self, finding: Finding, num_places: int) -> Iterator[str]:
        count = f"{finding.num_rows} ({100 * finding.share:.1f} %) " if finding.num_rows else ""
        yield f"[{finding.severity}] {finding.code}: {count}{finding.kind.title}"
        if finding.note:
            yield f"    {finding.note}"
        yield f"    why: {finding.kind.why}"
        yield f"    do:  {finding.kind.mend}"
        if finding.places:
            yield f"    rows: {self.places_of(finding, num_places)}"
        yield ""

    def _length_lines(self) -> Iterator[str]:
        for unit, sides in self.lengths.items():
            told = [f"{side} {n['p50']} / {n['p95']} / {n['p100']}" for side, n in sides.items() if n]
            if told:
                yield f"{unit} (median / 95 % / longest): {', '.join(told)}"
        if self.tokens is not None:
            yield f"tokens by the {self.tokens.template.get('template', 'template')}, max_length {self.tokens.max_length}:"
            for name, numbers in self.tokens.percentiles().items():
                if numbers:
                    yield f"  {name}: median {numbers['p50']}, 95 % {numbers['p95']}, longest {numbers['p100']}"
            for code, places in {**self.tokens.dropped, **self.tokens.notes}.items():
                yield f"  {len(places)} rows: {REASONS.get(code) or NOTES.get(code, code)}"


def _short(places: list[str]) -> str:
    """Places with their common file named once: `data.jsonl:3, :7, :9`."""
    files = {place.rpartition(":")[0] for place in places}
    if len(files) > 1 or "" in files:
        return ", ".join(places)
    return ", ".join([places[0], *(f":{place.rpartition(':')[2]}" for place in places[1:])])
