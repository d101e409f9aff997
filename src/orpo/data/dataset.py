"""Whole data sets of token groups, and the account of what became of every row."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from orpo.data.stored.groups import content_of
from orpo.data.stored.measures import measures_of
from orpo.data.template import TemplateEncoder, unusable_row
from orpo.data.types import NOTES, REASONS, Dropped, Preference, TokenGroup, Where
from orpo.errors import DataError

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3
"""Locations kept per reason and note."""

_CHUNK_ROWS = 256
_NOT_SEEN = (
    "text_not_printed",
    "reasoning_not_printed",
    "tools_not_printed",
    "calls_not_printed",
    "variables_not_read",
    "name_not_printed",
    "rendered_otherwise",
)
_IDENTICAL = ("identical_answers", "identical_after_truncation")
_WARN_IDENTICAL_SHARE = 0.01
_MEASURED = ("prompt", "response", "sequence")
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_KEPT = ("num_rows", "num_groups", "num_pairs", "num_sft_only", "num_duplicates")


@dataclass
class DataReport:
    """What became of the rows of one data set.

    Attributes:
        num_rows: rows read, dropped ones included.
        num_groups: groups to train on.
        num_pairs: their pairs.
        num_sft_only: groups without a pair (they count in the next-token loss alone).
        dropped: rows per reason code.
        notes: rows per note code: what was altered.
        examples: per code, where the first few such rows are, with the detail.
        truncation: the policy that was applied.
        remarks: what is to be said of tokenizer and template.
        generation: how the prompt for generation differs from the trained one, from `TemplateEncoder.generation`.
    """

    num_rows: int = 0
    num_groups: int = 0
    num_pairs: int = 0
    num_sft_only: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[Where, str]]] = field(default_factory=dict)
    truncation: str = ""
    remarks: list[str] = field(default_factory=list)
    generation: dict[str, Any] | None = None
    _lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in _MEASURED}, repr=False)
    _digests: bytearray = field(default_factory=bytearray, repr=False)
    """Eight bytes of a hash for each group: few enough for sets of any size, and no two groups of any real set alike."""
    _counted_duplicates: tuple[int, int] = field(default=(0, 0), repr=False)
    _earlier_duplicates: int = field(default=0, repr=False)

    @property
    def lengths(self) -> dict[str, dict[str, float]]:
        """Tokens of prompts, responses, and longest sequences: mean, p50, p90, p99, max."""
        return {name: _summary(counts) for name, counts in self._lengths.items() if counts}

    @property
    def num_duplicates(self) -> int:
        """Groups whose ids all occurred before."""
        before, found = self._counted_duplicates
        if len(self._digests) != before:
            digests = np.frombuffer(bytes(self._digests), dtype=np.uint64)
            found = len(digests) - len(np.unique(digests)) + self._earlier_duplicates
            self._counted_duplicates = (len(self._digests), found)
        return found

    def add(self, result: TokenGroup | Dropped) -> None:
        """Count one row."""
        self.num_rows += 1
        if isinstance(result, Dropped):
            self.dropped[result.reason] += 1
            self._example(result.reason, result.where, result.detail)
            return
        self.num_groups += 1
        self.num_pairs += len(result.pairs)
        self.num_sft_only += not result.pairs
        self._digests += hashlib.blake2b(content_of(result).tobytes(), digest_size=8).digest()
        for note in result.notes:
            self.notes[note] += 1
            self._example(note, result.where, "")
        self._lengths["prompt"][len(result.prompt_ids)] += 1
        self._lengths["response"].update(len(ids) for ids in result.response_ids)
        self._lengths["sequence"][result.longest_tokens] += 1

    def merge(self, other: DataReport) -> None:
        """Count the rows that another report has counted, which come after those of this one."""
        for name in ("num_rows", "num_groups", "num_pairs", "num_sft_only"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        self.notes.update(other.notes)
        for name in _MEASURED:
            self._lengths[name].update(other._lengths[name])
        self._digests += other._digests
        for code, places in other.examples.items():
            for where, detail in places:
                self._example(code, where, detail)

    def to_state(self) -> dict[str, Any]:
        """All that was counted, as plain JSON types, for `restore`."""
        return {
            **{name: getattr(self, name) for name in _KEPT},
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "examples": {
                code: [[where.file, where.row, where.line, detail] for where, detail in places] for code, places in self.examples.items()
            },
            "lengths": {name: sorted(counts.items()) for name, counts in self._lengths.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Count what was counted then. Duplicates of the rows counted then and of rows to come are not looked for."""
        for name in ("num_rows", "num_groups", "num_pairs", "num_sft_only"):
            setattr(self, name, state[name])
        self._digests, self._earlier_duplicates = bytearray(), state["num_duplicates"]
        self._counted_duplicates = (0, state["num_duplicates"])
        self.dropped, self.notes = Counter(state["dropped"]), Counter(state["notes"])
        self.examples = {
            code: [(Where(file, row, line), detail) for file, row, line, detail in places] for code, places in state["examples"].items()
        }
        self._lengths = {name: Counter(dict(state["lengths"][name])) for name in _MEASURED}

    def forget_duplicates(self) -> None:
        """Look for duplicates among the rows to come alone: a stream's are looked for inside a window."""
        self._earlier_duplicates = self.num_duplicates
        self._digests = bytearray()
        self._counted_duplicates = (0, self._earlier_duplicates)

    def _example(self, code: str, where: Where, detail: str) -> None:
        kept = self.examples.setdefault(code, [])
        if len(kept) < NUM_EXAMPLES:
            kept.append((where, detail))

    def warnings(self) -> list[str]:
        """What a user should not overlook, one sentence each."""
        found = []
        identical = sum(self.dropped[reason] for reason in _IDENTICAL)
        if identical > _WARN_IDENTICAL_SHARE * self.num_rows:
            share = f"{identical / self.num_rows:.1%}"
            found.append(f"{identical} of {self.num_rows} rows have identical answers ({share}): check how they were made")
        if count := self.notes["special_tokens_in_text"]:
            found.append(
                f"{count} rows contain special-token text, which may open another role"
                f"{self._first('special_tokens_in_text')}; special_tokens_in_text: split makes it plain text"
            )
        if count := self.notes["already_rendered"]:
            found.append(
                f"{count} of {self.num_groups} prompts were already rendered with the chat template and are taken as they are"
                f"{self._first('already_rendered')}; give messages to have them rendered here"
            )
        for code in _NOT_SEEN:
            if count := self.notes[code]:
                found.append(f"{count} of {self.num_groups} rows: {NOTES[code]}{self._first(code)}")
        if count := self.notes["other_generation_prompt"]:
            found.append(self._generation_warning(count))
        if count := self.dropped["not_printed"]:
            found.append(f"{count} of {self.num_rows} rows are left out: {REASONS['not_printed']}{self._first('not_printed')}")
        return [*self.remarks, *found]

    def _generation_warning(self, count: int) -> str:
        """That the two prompts differ, with both texts and, where there is one, the switch that makes them agree."""
        what = f"{count} of {self.num_groups} rows are trained with another prompt than the template gives for generation"
        texts = self.generation
        if texts is None:
            return f"{what}, which depends on the answer there{self._first('other_generation_prompt')}"
        agreeing = texts["agreeing"]
        mend = (
            f"chat_template_kwargs: {json.dumps(agreeing)} makes them the same" if agreeing else "orpo's own commands use the trained one"
        )
        return f"{what}: trained {texts['trained']!r}, for generation {texts['generation']!r}; {mend}"

    def _first(self, code: str) -> str:
        return f" (first: {self.examples[code][0][0]})" if self.examples.get(code) else ""

    def lines(self) -> list[str]:
        """The report for a terminal."""
        head = f"{self.num_groups} of {self.num_rows} rows, {self.num_pairs} pairs"
        extras = [(self.num_sft_only, "SFT-only rows"), (self.num_duplicates, "exact duplicates")]
        found = [", ".join([head, *(f"{count} {name}" for count, name in extras if count)])]
        for name, values in self.lengths.items():
            found.append(f"  {name} tokens: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
        found += self.histogram()
        return found + [f"  warning: {text}" for text in self.warnings()]

    def histogram(self) -> list[str]:
        """Dropped and altered rows by code, most frequent first, with the first locations."""
        found = []
        for title, counts, meanings in (("dropped", self.dropped, REASONS), ("altered", self.notes, NOTES)):
            for code, count in counts.most_common():
                places = "; ".join(f"{where}" + (f" ({detail})" if detail else "") for where, detail in self.examples.get(code, []))
                found.append(f"  {title} {count}: {code}, {meanings.get(code, code)}. {places}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {
            "num_rows": self.num_rows,
            "num_groups": self.num_groups,
            "num_pairs": self.num_pairs,
            "num_sft_only": self.num_sft_only,
            "num_duplicates": self.num_duplicates,
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "examples": {code: [{"where": str(where), "detail": detail} for where, detail in rows] for code, rows in self.examples.items()},
            "lengths": self.lengths,
            "truncation": self.truncation,
            "warnings": self.warnings(),
        }

    def check(self, min_rows: int = 1, *, name: str = "the data") -> None:
        """Stop where too little is left to train on.

        Args:
            min_rows: groups needed, such as those of one batch.
            name: what the message calls the data set.

        Raises:
            DataError: fewer groups than that; the message holds the histogram of reasons.
        """
        if self.num_groups >= max(min_rows, 1):
            return
        problem = f"no row of {name} can be trained on" if self.num_groups == 0 else f"too few rows of {name} can be trained on"
        counts = f"{self.num_groups} of {self.num_rows} left, at least {max(min_rows, 1)} needed"
        raise DataError("\n".join([f"{problem}: {counts}", *self.histogram()]), mend=self._advice(min_rows))

    def _advice(self, min_rows: int) -> str:
        if not self.num_rows:
            return "the source is empty; check dataset_name and the split"
        if not self.dropped or self.num_rows < min_rows:
            return f"give at least {min_rows} rows, or lower per_device_train_batch_size, gradient_accumulation_steps or num_processes"
        reason = self.dropped.most_common(1)[0][0]
        if reason in ("too_long", "prompt_too_long"):
            return "raise max_length, or set truncation: keep_end"
        if reason in ("template_failed", "boundary"):
            return "give another template: chat_template: chatml, or chat_template: PATH to a Jinja file"
        return f"look at the rows named above (reason {reason}); `orpo audit` shows all of them"


def _summary(counts: Counter[int]) -> dict[str, float]:
    """Mean, quantiles (the value at or above the point) and maximum of counted lengths."""
    lengths, numbers = (np.asarray(column) for column in zip(*sorted(counts.items()), strict=True))
    cumulative = np.cumsum(numbers)
    last = int(cumulative[-1]) - 1
    points = {key: float(lengths[np.searchsorted(cumulative, math.ceil(share * last), side="right")]) for key, share in _QUANTILES.items()}
    return {"mean": round(float((lengths * numbers).sum() / (last + 1)), 1), **points, "max": float(lengths[-1])}


def empty_report(encoder: TemplateEncoder) -> DataReport:
    """A report of no row yet."""
    return DataReport(truncation=encoder.truncation, remarks=encoder.remarks(), generation=encoder.generation())


def prepare_groups(
    rows: Iterable[Preference | Dropped],
    encoder: TemplateEncoder,
    *,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[TokenGroup], DataReport]:
    """Tokenise a whole data set, once.

    The rows are read as a stream, a few hundred at a time. Warnings of the report are logged.

    Args:
        rows: preferences, and the rows already dropped on the way here; in the data set's order.
        encoder: the tokenizer and its length contract.
        strict: stop at the first dropped row instead, naming its file and line.
        progress: called with the number of rows done, after each few hundred; it may raise to stop.

    Raises:
        DataError: with `strict`, at the first dropped row; or what the encoder raises.
    """
    groups: list[TokenGroup] = []
    report = empty_report(encoder)
    for _, result in encode_rows(rows, encoder):
        if strict and isinstance(result, Dropped):
            raise unusable_row(result)
        report.add(result)
        if isinstance(result, TokenGroup):
            groups.append(result)
        if progress is not None and report.num_rows % _CHUNK_ROWS == 0:
            progress(report.num_rows)
    if progress is not None and report.num_rows % _CHUNK_ROWS:
        progress(report.num_rows)
    log_warnings(report)
    return groups, report


def log_warnings(report: DataReport) -> None:
    """Say what a user should not overlook."""
    for text in report.warnings():
        logger.warning("%s", text)


def encode_rows(
    rows: Iterable[Preference | Dropped], encoder: TemplateEncoder
) -> Iterator[tuple[Preference | Dropped, TokenGroup | Dropped]]:
    """Each row with what it becomes, in order; a few hundred are tokenised together."""
    for chunk in chunks(rows):
        encoded = iter(encoder.encode_many([row for row in chunk if isinstance(row, Preference)]))
        for row in chunk:
            yield row, row if isinstance(row, Dropped) else next(encoded)


def chunks(rows: Iterable[Preference | Dropped]) -> Iterator[list[Preference | Dropped]]:
    """Rows as many as are tokenised together."""
    stream = iter(rows)
    while chunk := list(itertools.islice(stream, _CHUNK_ROWS)):
        yield chunk


class Fingerprint:
    """sha256 over ids, ends and pairs in order: the same exactly where the same is trained in the same order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, group: TokenGroup) -> None:
        """The next row."""
        self._digest.update(content_of(group).tobytes())

    def hexdigest(self) -> str:
        """Of the rows so far."""
        return self._digest.hexdigest()


@runtime_checkable
class Fingerprinted(Protocol):
    """Rows that know their own: those in a file, and streams, whose content nobody reads to its end."""

    def fingerprint(self) -> str: ...


def fingerprint(groups: Iterable[TokenGroup] | Fingerprinted) -> str:
    """The `Fingerprint` of some rows."""
    if isinstance(groups, Fingerprinted):
        return groups.fingerprint()
    found = Fingerprint()
    for group in groups:
        found.add(group)
    return found.hexdigest()


@dataclass(frozen=True)
class Overlap:
    """Evaluation rows whose prompt is also trained on.

    Attributes:
        num_shared: such evaluation rows.
        num_eval: all evaluation rows.
        examples: the first few, each as (training row, evaluation row).
    """

    num_shared: int
    num_eval: int
    examples: tuple[tuple[Where, Where], ...]

    def check(self, *, allow: bool = False) -> None:
        """Stop at any overlap, unless it is allowed.

        Raises:
            DataError: training and evaluation share prompts.
        """
        if not self.num_shared:
            return
        places = "; ".join(f"{train} and {evaluation}" for train, evaluation in self.examples)
        what = f"{self.num_shared} of {self.num_eval} evaluation rows have a prompt that is also trained on ({places})"
        if not allow:
            raise DataError(what, expected="no shared prompts", mend="take them out of one side, or set allow_overlap: true")
        logger.warning("%s", what)


def find_overlap(train_groups: Sequence[TokenGroup], eval_groups: Sequence[TokenGroup]) -> Overlap:
    """Count evaluation rows whose prompt ids occur in training."""
    ours, theirs = measures_of(train_groups).prompt_hash, measures_of(eval_groups).prompt_hash
    hashes, first = np.unique(ours, return_index=True)
    # Hashes tell where to look; a leak is told where the prompts themselves are the same.
    candidates = [(int(first[np.searchsorted(hashes, theirs[row])]), int(row)) for row in np.flatnonzero(np.isin(theirs, hashes))]
    num_shared = 0
    examples: list[tuple[Where, Where]] = []
    for train_row, eval_row in candidates:
        if len(examples) < NUM_EXAMPLES:
            train, evaluation = train_groups[train_row], eval_groups[eval_row]
            if not np.array_equal(train.prompt_ids, evaluation.prompt_ids):
                continue
            examples.append((train.where, evaluation.where))
        num_shared += 1
    return Overlap(num_shared, len(eval_groups), tuple(examples))
