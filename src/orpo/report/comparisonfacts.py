"""comparison.json, read without trust: what `orpo compare` has found so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.errors import UserError
from orpo.report.facts import COMPARISON_FILE, read_json
from orpo.report.sections import number, part, parts, text


@dataclass
class ComparisonFacts:
    """A comparison's folder, read.

    Attributes:
        found: comparison.json, without secrets.
        notes: what is missing or damaged.
    """

    folder: Path
    found: dict[str, Any]
    notes: list[str]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Name -> what is known of a method, in the order of the comparison."""
        return {name: dict(value) for name, value in parts(self.found, "methods").items() if isinstance(value, Mapping)}

    def label_of(self, name: str) -> str:
        """A method's name for people."""
        return text(part(self.found, "methods", name, "label"), name)


def read_comparison(folder: Path) -> ComparisonFacts:
    """Everything in a comparison's folder.

    Raises:
        UserError: comparison.json is damaged; there is nothing else to go by.
    """
    notes: list[str] = []
    found = read_json(folder / COMPARISON_FILE, notes)
    if found is None or not isinstance(found.get("methods"), dict):
        problem = notes[0] if notes else "holds no methods"
        raise UserError(
            problem, where=str(folder / COMPARISON_FILE), expected="what `orpo compare` writes", mend="run `orpo compare` again"
        )
    facts = ComparisonFacts(folder, found, notes)
    _note_state(facts)
    return facts


def _note_state(facts: ComparisonFacts) -> None:
    status = text(facts.found.get("status"), "unknown")
    if status == "complete":
        return
    done = [
        facts.label_of(name) for name, method in facts.methods.items() if number(part(method, "summary", "margin", "value")) is not None
    ]
    missing = [facts.label_of(name) for name in facts.methods if facts.label_of(name) not in done]
    told = f"done: {', '.join(done) or 'nothing'}; missing: {', '.join(missing) or 'nothing'}"
    facts.notes.append(f"The comparison is not complete ({status}). {told}. The same `orpo compare` command goes on from there.")
