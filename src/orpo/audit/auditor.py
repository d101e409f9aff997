"""The audit itself: one pass over the rows, then the findings."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orpo.audit import derive, references, tokens
from orpo.audit.findings import by_weight
from orpo.audit.inspect import InspectOptions, inspect_rows
from orpo.audit.result import Audit
from orpo.audit.scenarios import COLUMNS, MOST_SCENARIOS, ScenarioSample, find_scenarios
from orpo.audit.shortcuts import find_shortcuts
from orpo.audit.surprise import FitAndScore, Score, Surprise, as_it_stands, cross_fitted
from orpo.audit.table import AuditTable
from orpo.data.formats import Stream, stream_preferences
from orpo.data.reading.sources import MAX_ROW_BYTES, as_sources
from orpo.data.types import Preference
from orpo.errors import DataError, UserError
from orpo.system.installing import pip_line

Progress = Callable[[str, int, int], None]
"""Called now and then with what is done, how far it is, and of how much; 0 where that is not known."""


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What to audit besides the rows themselves.

    Attributes:
        split, column_map, pairs, sft_rows, streaming, max_rows, max_row_bytes: as in `load_preferences`.
        evaluation: evaluation data (any source) whose prompts the training data should not have; `evaluation_split`: its split.
        benchmarks: files with benchmark prompts.
        scenario_column: the column that names each row's scenario; None: a column such as `scenario` or `category` if there is one, else
            groups of similar prompts.
        encoder: a `TemplateEncoder`, for lengths in tokens and what the template does; `unlimited_encoder`: the same with a max_length that
            no row reaches, so that lengths are told beyond the real one.
        score: mean log-probabilities of each group's responses, for surprising pairs with a model as it stands.
        fit_and_score: the same for held-out groups after training on others, for cross-fitting with `num_folds` folds.
        num_workers: processes.

    Example:
        >>> from orpo.audit import AuditOptions
        >>> options = AuditOptions(evaluation="pairs.jsonl")
    """

    split: str | None = None
    column_map: Mapping[str, str] | None = None
    pairs: str = "best_worst"
    sft_rows: bool = False
    streaming: bool = False
    max_rows: int | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    evaluation: Any = None
    evaluation_split: str | None = None
    benchmarks: Sequence[Any] = ()
    scenario_column: str | None = None
    encoder: tokens.Encoder | None = None
    unlimited_encoder: tokens.Encoder | None = None
    score: Score | None = None
    fit_and_score: FitAndScore | None = None
    num_folds: int = 5
    num_workers: int = 1
    progress: Progress | None = field(default=None, compare=False)

    @property
    def reading(self) -> dict[str, Any]:
        """How a source is read, as `Stream` takes it."""
        return {name: getattr(self, name) for name in ("pairs", "sft_rows", "streaming", "max_row_bytes")}


_ROWS_BETWEEN = 1000


def require_extras(*modules: str) -> None:
    """Stop where an optional package of the audit is not installed.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the audit needs {', '.join(missing)}", where="orpo audit", mend=pip_line("audit"))


def run_audit(source: Any, options: AuditOptions | None = None) -> Audit:
    """Audit a source of preferences.

    Args:
        source: whatever `load_preferences` reads; an iterator that can be read only once is held as a list.
        options: see `AuditOptions`.

    Raises:
        DataError: a source cannot be read at all (broken file, missing column, unpaired data, …).
        UserError: an optional package is missing.

    Example: training data whose prompts are all in the evaluation data; `options` are those of `AuditOptions`.

        >>> from orpo.audit import run_audit
        >>> found = run_audit("pairs.jsonl", options)
        >>> found.findings[0].code, found.findings[0].num_rows
        ('evaluation_overlap', 12)
    """
    require_extras("datasketch", "sklearn")
    started = time.monotonic()
    options = options or AuditOptions()
    source = list(source) if hasattr(source, "__next__") else source
    auditor = _Auditor(source, options)
    table, sample = auditor.read()
    shortcuts = find_shortcuts(table)
    scenarios = find_scenarios(table, sample, has_column=auditor.scenario_column is not None)
    token_facts, surprises = _with_tokenizer(auditor)
    found = derive.Findings(table)
    found.add_rows()
    found.add_copies()
    found.add_overlaps(auditor.evaluation, auditor.benchmarks)
    found.add_shortcuts(shortcuts)
    found.add_scenarios(scenarios, is_column=auditor.scenario_column is not None)
    if token_facts is not None:
        found.add_tokens(token_facts)
    for surprise in surprises:
        found.add_surprise(surprise)
    longer = table.chosen_features[:, 0] > table.rejected_features[:, 0]
    audit = Audit(
        source=", ".join(item.label for item in auditor.sources),
        shapes=auditor.shapes,
        num_rows=table.num_rows,
        num_usable=int(table.is_kept.sum()),
        num_pairs=len(table.pair_rows),
        reasons=table.reasons(),
        findings=by_weight(found.items),
        lengths=derive.lengths(table),
        chosen_longer=float(np.mean(longer)) if len(longer) else 0.0,
        shortcuts=shortcuts,
        scenarios=scenarios[:MOST_SCENARIOS],
        scenario_column=auditor.scenario_column,
        tokens=token_facts,
        surprises=surprises,
        table=table,
        leaving=found.leaving,
    )
    audit.seconds = time.monotonic() - started
    return audit


def _with_tokenizer(auditor: _Auditor) -> tuple[tokens.TokenFacts | None, list[Surprise]]:
    """The second pass, where a tokenizer is given: lengths in tokens, and what a model says of the pairs."""
    options = auditor.options
    if options.encoder is None:
        return None, []
    wants_groups = options.score is not None or options.fit_and_score is not None
    facts = tokens.encode_rows(auditor.told_preferences(), options.encoder, options.unlimited_encoder, keeps_groups=wants_groups)
    surprises = []
    if options.score is not None:
        surprises.append(as_it_stands(facts.groups, options.score))
    if options.fit_and_score is not None:
        surprises.append(cross_fitted(facts.groups, options.fit_and_score, options.num_folds))
    return facts, surprises


class _Auditor:
    """The sources of one audit, and what the passes over them share."""

    def __init__(self, source: Any, options: AuditOptions) -> None:
        self.options = options
        self.sources = as_sources(source, split=options.split, column_map=options.column_map)
        self.shapes: list[str] = []
        self.scenario_column: str | None = None
        self.evaluation: references.References | None = None
        self.benchmarks: references.References | None = None

    def read(self) -> tuple[AuditTable, ScenarioSample]:
        """The pass over all rows."""
        options = self.options
        if options.evaluation is not None:
            reading = {"column_map": options.column_map, "pairs": options.pairs, "sft_rows": options.sft_rows}
            prompts = references.evaluation_prompts(options.evaluation, split=options.evaluation_split, **reading)
            self.evaluation = references.references_of(prompts)
        if options.benchmarks:
            self.benchmarks = references.references_of(references.benchmark_prompts(options.benchmarks))
        table, sample = AuditTable(), ScenarioSample()
        for stream in self.streams():
            self._take_in(stream, table, sample)
        table.finish()
        if table.num_rows == 0:
            raise DataError("no rows", where=self.sources[0].label, expected="at least one row", mend="check the path and the split")
        return table, sample

    def streams(self) -> Iterator[Stream]:
        """Each source, opened anew."""
        options = self.options
        for source in self.sources:
            yield Stream(source, **options.reading)

    def _take_in(self, stream: Stream, table: AuditTable, sample: ScenarioSample) -> None:
        self.shapes.append(str(stream.shape))
        options = self._inspect_options(stream)
        rows = _first(iter(stream), None if self.options.max_rows is None else self.options.max_rows - table.num_rows)
        for chunk in inspect_rows(rows, stream.shape, stream.head, options, self.options.num_workers, sample.cutoff):
            for key, index, prompt, chosen in chunk.samples:
                sample.offer(key, table.num_rows + index, prompt, chosen)
            table.add(chunk)
            if self.options.progress is not None:
                self.options.progress("rows read", table.num_rows, 0)

    def _inspect_options(self, stream: Stream) -> InspectOptions:
        wanted = self.options.scenario_column
        if wanted is not None and not any(isinstance(row, Mapping) and wanted in row for row in stream.head):
            columns = sorted({key for row in stream.head if isinstance(row, Mapping) for key in row if isinstance(key, str)})
            raise DataError(
                f"no column {wanted!r} (found: {', '.join(map(repr, columns))})",
                where=stream.source.label,
                expected="the column that names each row's scenario",
                mend="correct the name, or leave it out to group similar prompts",
            )
        column = wanted or _scenario_column(stream.head, stream.shape.used)
        self.scenario_column = self.scenario_column or column
        empty = np.empty(0, np.uint64)
        return InspectOptions(
            pairs=self.options.pairs,
            sft_rows=self.options.sft_rows,
            column_map=stream.source.column_map,
            scenario_column=column,
            benchmark_runs=self.benchmarks.runs if self.benchmarks else empty,
            benchmark_keys=self.benchmarks.keys if self.benchmarks else empty,
            evaluation_keys=self.evaluation.keys if self.evaluation else empty,
        )

    def told_preferences(self) -> Iterator[Preference]:
        """The usable rows, with a word now and then on how many they were."""
        for number, preference in enumerate(self.preferences(), start=1):
            if self.options.progress is not None and number % _ROWS_BETWEEN == 0:
                self.options.progress("rows tokenised", number, 0)
            yield preference

    def preferences(self) -> Iterator[Preference]:
        """The usable rows, read again."""
        options = self.options
        items = stream_preferences(
            [replace(source, weight=None) for source in self.sources],
            **options.reading,
        )
        for item in _first(items, options.max_rows):
            if isinstance(item, Preference):
                yield item


def _first(items: Iterator[Any], most: int | None) -> Iterator[Any]:
    for number, item in enumerate(items):
        if most is not None and number >= most:
            return
        yield item


def _scenario_column(head: Sequence[Any], used: frozenset[str]) -> str | None:
    """A column that divides the rows into a few groups by a telling name."""
    rows = [row for row in head if isinstance(row, Mapping)]
    for column in COLUMNS:
        values = [row[column] for row in rows if isinstance(row.get(column), str)]
        num = len(set(values))
        if column not in used and len(values) > 0.9 * len(rows) and 2 <= num <= min(MOST_SCENARIOS, len(values) // 5):
            return column
    return None
