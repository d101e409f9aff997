"""Lengths in tokens against max_length, and what the chat template and the length policy do to each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from orpo.data.types import Dropped, Preference, TokenGroup, Where

_BATCH = 256
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)


class Encoder(Protocol):
    """What is needed of `orpo.data.template.TemplateEncoder`."""

    max_length: int

    def encode_many(self, preferences: list[Preference]) -> list[TokenGroup | Dropped]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(slots=True)
class TokenFacts:
    """What tokenising found.

    Attributes:
        lengths: "prompt", "chosen", "rejected", "longest" (prompt and longest answer) -> tokens per row.
        dropped: reason -> rows.
        notes: note -> rows.
        max_length: the encoder's.
        template: the encoder's facts.
    """

    lengths: dict[str, np.ndarray]
    dropped: dict[str, list[Where]]
    notes: dict[str, list[Where]]
    max_length: int
    template: dict[str, Any]
    groups: list[TokenGroup] = field(default_factory=list)

    def percentiles(self) -> dict[str, dict[str, int]]:
        """Of each length, PERCENTILES."""
        return {name: percentiles(values) for name, values in self.lengths.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "max_length": self.max_length,
            "percentiles": self.percentiles(),
            "share_within_max_length": round(float(np.mean(self.lengths["longest"] <= self.max_length)), 6)
            if len(self.lengths["longest"])
            else None,
            "dropped": {reason: len(places) for reason, places in self.dropped.items()},
            "notes": {note: len(places) for note, places in self.notes.items()},
            "template": self.template,
        }


def percentiles(values: np.ndarray) -> dict[str, int]:
    """PERCENTILES of some counts, by name; empty without values."""
    if not len(values):
        return {}
    return {f"p{p}": round(float(q)) for p, q in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def encode_rows(preferences: Iterable[Preference], encoder: Encoder, *, keeps_groups: bool = False) -> TokenFacts:
    """Tokenise all preferences as training would.

    Lengths are those of the rows that are kept, after any trimming; what is dropped for its length is counted under its reason.
    """
    dropped: dict[str, list[Where]] = {}
    notes: dict[str, list[Where]] = {}
    groups: list[TokenGroup] = []
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "longest": []}
    for item in _encoded(preferences, encoder):
        if isinstance(item, Dropped):
            dropped.setdefault(item.reason, []).append(item.where)
            continue
        for note in item.notes:
            notes.setdefault(note, []).append(item.where)
        chosen, rejected = item.pairs[0] if item.pairs else (0, None)
        lengths["prompt"].append(len(item.prompt_ids))
        lengths["chosen"].append(len(item.response_ids[chosen]))
        if rejected is not None:
            lengths["rejected"].append(len(item.response_ids[rejected]))
        lengths["longest"].append(item.longest_tokens)
        if keeps_groups:
            groups.append(item)
    arrays = {name: np.asarray(values, dtype=np.int64) for name, values in lengths.items()}
    return TokenFacts(arrays, dropped, notes, encoder.max_length, encoder.describe(), groups)


def _encoded(preferences: Iterable[Preference], encoder: Encoder) -> Iterator[TokenGroup | Dropped]:
    iterator = iter(preferences)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield from encoder.encode_many(batch)
