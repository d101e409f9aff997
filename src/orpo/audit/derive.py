"""From the facts of the rows to findings."""

from __future__ import annotations

import numpy as np

from orpo.audit import duplicates
from orpo.audit.findings import KINDS, MOST_PLACES, Finding, Severity
from orpo.audit.inspect import LOW_CONTRAST
from orpo.audit.references import References
from orpo.audit.scenarios import DOMINANT_SHARE, FLAT_VARIETY, THIN_SHARE, Scenario
from orpo.audit.shortcuts import Shortcut
from orpo.audit.surprise import Surprise
from orpo.audit.table import AuditTable
from orpo.audit.tokens import TokenFacts, percentiles
from orpo.data.types import Where

_NUM_EXAMPLES = 5
_FLAGS_AS_FOUND = ("replacement_character", "mojibake", "control_characters", "special_token_text", "turn_in_answer", "low_contrast")
_LENGTH_CODES = ("too_long", "prompt_too_long", "identical_after_truncation", "prompt_trimmed", "answer_cut")
_LOOKS_CUT_SHARE = 0.05
_MANY = 0.01
"""Share of the rows from which identical pairs are warned about beyond their being dropped."""


class Findings:
    """Collects findings, and for each row the ones for which `write_clean` leaves it out."""

    def __init__(self, table: AuditTable) -> None:
        self.table = table
        self.items: list[Finding] = []
        self.leaving: dict[int, list[str]] = {}

    def _add(
        self,
        code: str,
        rows: np.ndarray,
        *,
        severity: Severity | None = None,
        note: str = "",
        numbers: dict[str, object] | None = None,
    ) -> None:
        """A finding on some rows; nothing where there are none."""
        if not len(rows):
            return
        table, first = self.table, rows[:MOST_PLACES].tolist()
        if KINDS[code].leaves:
            for row in rows.tolist():
                self.leaving.setdefault(row, []).append(code)
        self.items.append(
            Finding(
                code=code,
                num_rows=len(rows),
                share=len(rows) / table.num_rows,
                places=[table.place(row) for row in first],
                examples=[(table.place(row), self._example(row)) for row in first[:_NUM_EXAMPLES]],
                numbers=numbers or {},
                note=note,
                severity=severity or KINDS[code].severity,
            )
        )

    def _example(self, row: int) -> str:
        """What is wrong with a row and how its prompt begins, whichever of them is known."""
        return " · ".join(filter(None, (self.table.details.get(row), self.table.excerpts[row])))

    def add_rows(self) -> None:
        """Rows that make no preference, and what the texts of the others show."""
        table = self.table
        for reason in table.reasons():
            rows = table.with_reason(reason)
            is_much = reason == "identical_answers" and len(rows) > _MANY * table.num_rows
            self._add(reason, rows, note=f"More than {_MANY:.0%} of the rows: check how the pairs were made." if is_much else "")
        for flag in _FLAGS_AS_FOUND:
            note = f"At least {LOW_CONTRAST:.0%} of their words are the same." if flag == "low_contrast" else ""
            self._add(flag, table.with_flag(flag), note=note)
        cut = table.with_flag("looks_cut")
        if len(cut) > _LOOKS_CUT_SHARE * table.num_rows:
            self._add("looks_cut", cut)

    def add_copies(self) -> None:
        """Exact and near duplicates, contradictions, prompts and answers that come again."""
        table = self.table
        exact = duplicates.later_copies(table.row_keys)
        num_unusable = int((~table.is_kept[exact]).sum())
        note = f"{num_unusable} of them cannot be trained on anyway." if num_unusable else ""
        self._add("duplicates", exact, note=note)
        others = np.setdiff1d(np.flatnonzero(table.is_kept), exact)
        near = duplicates.near_copies(table.signatures, table.prompt_signatures, others)
        rows = np.asarray(sorted(near), dtype=np.int64)
        like = ", ".join(f"{table.place(row)} like {_line_of(table, near[row], row)}" for row in rows[:3].tolist())
        self._add("near_duplicates", rows, note=f"At least {duplicates.NEAR:.0%} of their word runs in common: {like}." if like else "")
        self._add("contradictions", duplicates.contradictions(table))
        self._add("repeated_prompts", duplicates.repeated_prompts(table, exact))
        self._add("repeated_chosen", duplicates.repeated_chosen(table, exact))

    def add_overlaps(self, evaluation: References | None, benchmarks: References | None) -> None:
        """Prompts that evaluation data or benchmarks have too, exactly or nearly."""
        table = self.table
        for code, references in (("evaluation_overlap", evaluation), ("benchmark_overlap", benchmarks)):
            if references is None:
                continue
            exact = table.with_flag(code)
            near = duplicates.near_prompts(table.prompt_signatures, references.signatures)
            note = f"{len(exact)} with the same prompt or a long run of it, {len(np.setdiff1d(near, exact))} with nearly the same prompt."
            self._add(code, np.union1d(exact, near), note=note, numbers={"num_reference_prompts": references.num_prompts})

    def add_shortcuts(self, shortcuts: list[Shortcut]) -> None:
        """Surface features that predict the choice well, the strongest first."""
        strong = [shortcut for shortcut in shortcuts[:-1] if shortcut.is_warned_of]
        if not strong:
            return
        note = "By one of these alone, chance being 0.50: " + "; ".join(shortcut.sentence() for shortcut in strong[:4]) + "."
        numbers: dict[str, object] = {"shortcuts": [shortcut.to_dict() for shortcut in strong]}
        self.items.append(Finding("shortcut", 0, strong[0].coverage, numbers=numbers, note=note, severity="warning"))

    def add_scenarios(self, scenarios: list[Scenario], *, is_column: bool) -> None:
        """Coverage and balance. Groups found by words are a help for the eye, so what is thin among them is told, not warned of."""
        if len(scenarios) < 2:
            return
        severity: Severity = "warning" if is_column else "info"
        thin = [s for s in scenarios if s.share < THIN_SHARE / len(scenarios)]
        flat = [s for s in scenarios if s.variety < FLAT_VARIETY]
        dominant = [s for s in scenarios if s.share > DOMINANT_SHARE]
        for code, found in (("thin_scenarios", thin), ("dominant_scenario", dominant), ("flat_chosen", flat)):
            if found:
                note = ", ".join(f"{s.name} ({s.num_pairs} pairs)" for s in found[:8])
                numbers = {"scenarios": [s.to_dict() for s in found]}
                share = sum(s.share for s in found)
                self.items.append(Finding(code, 0, share, numbers=numbers, note=note, severity=severity))

    def add_tokens(self, facts: TokenFacts) -> None:
        """What the template and the length policy do."""
        rows = self._rows_by_where({where for places in (*facts.dropped.values(), *facts.notes.values()) for where in places})
        for code, places in (*facts.dropped.items(), *facts.notes.items()):
            code = "special_token_text" if code == "special_tokens_in_text" else code
            if code not in KINDS:
                continue
            indices = np.asarray(sorted(rows[where] for where in places if where in rows), dtype=np.int64)
            if code == "special_token_text":
                self.items = [item for item in self.items if item.code != code]
            self._add(code, indices, note=f"With max_length {facts.max_length}." if code in _LENGTH_CODES else "")

    def _rows_by_where(self, wanted: set[Where]) -> dict[Where, int]:
        if not wanted:
            return {}
        table = self.table
        names = table.file_names.names
        of_place = {(where.file, where.row): where for where in wanted}
        found = {}
        for index in range(table.num_rows):
            where = of_place.get((names[table.files[index]], int(table.rows[index])))
            if where is not None:
                found[where] = index
        return found

    def add_surprise(self, surprise: Surprise) -> None:
        """The pairs that a model sees the other way round, where it can tell pairs apart."""
        if not surprise.suspects:
            return
        places = [f"{suspect.where} (margin {suspect.margin:.3f})" for suspect in surprise.suspects]
        rows = self._rows_by_where({suspect.where for suspect in surprise.suspects[:_NUM_EXAMPLES]})
        first = [(place, suspect.where) for place, suspect in zip(places, surprise.suspects, strict=True)][:_NUM_EXAMPLES]
        self.items.append(
            Finding(
                code="possible_flips",
                num_rows=len(places),
                share=len(places) / surprise.num_pairs,
                places=places[:MOST_PLACES],
                examples=[(place, self.table.excerpts[rows[where]]) for place, where in first if where in rows],
                numbers=surprise.to_dict() | {"suspects": None},
                note=f"{surprise.sentence()} Ranked, the most surprising first; the margin is in nats per token.",
                severity="info",
            )
        )


def _line_of(table: AuditTable, row: int, beside: int) -> str:
    """A row's place, by its line alone where it is in the same file as the one it is named beside."""
    place = table.place(row)
    is_same = table.files[row] == table.files[beside] and table.lines[row]
    return f":{place.rpartition(':')[2]}" if is_same else place


def lengths(table: AuditTable) -> dict[str, dict[str, dict[str, int]]]:
    """Percentiles of the usable rows' lengths, in words and in characters."""
    kept = table.is_kept
    found: dict[str, dict[str, dict[str, int]]] = {}
    for column, (unit, of_prompts) in enumerate((("words", table.prompt_words), ("characters", table.prompt_chars))):
        found[unit] = {
            "prompt": percentiles(of_prompts[kept]),
            "chosen": percentiles(np.expm1(table.chosen_features[:, column])),
            "rejected": percentiles(np.expm1(table.rejected_features[:, column])),
        }
    return found
