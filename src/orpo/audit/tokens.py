"""Lengths in tokens against max_length, and what the chat template and the length policy do to each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from orpo.data.dataset import Fingerprint
from orpo.data.types import Dropped, Preference, TokenGroup, Where

_BATCH = 256
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)


class Encoder(Protocol):
    """What is needed of `orpo.data.template.TemplateEncoder`."""

    max_length: int
    max_prompt_length: int | None

    def encode_many(self, preferences: list[Preference]) -> list[TokenGroup | Dropped]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(slots=True)
class TokenFacts:
    """What tokenising found.

    Attributes:
        lengths: "prompt", "chosen", "rejected", "longest" (prompt and longest answer) -> tokens per row, as the rows are.
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
    fingerprint: str = ""
    """Of all rows that can be trained on, as `run.json` and `orpo check` have it."""

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
            "fingerprint": self.fingerprint,
        }


def percentiles(values: np.ndarray) -> dict[str, int]:
    """PERCENTILES of some counts, by name; empty without values."""
    if not len(values):
        return {}
    return {f"p{p}": round(float(q)) for p, q in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def encode_rows(
    preferences: Iterable[Preference], encoder: Encoder, unlimited: Encoder | None = None, *, keeps_groups: bool = False
) -> TokenFacts:
    """Tokenise all preferences as training would.

    Args:
        encoder: the one of training, with its max_length and truncation policy.
        unlimited: the same without a length limit. With it, lengths are those of the rows as they are, and only rows that are too long go
            through `encoder` as well; without it, lengths are those of what the policy leaves.
    """
    found = _Found()
    if unlimited is None:
        for _, item in _encoded(preferences, encoder):
            found.measure(item)
            found.take(item, keeps_groups=keeps_groups)
    else:
        for preference, item in _encoded(preferences, unlimited):
            found.measure(item)
            is_long = isinstance(item, TokenGroup) and not _fits(item, encoder)
            found.take(encoder.encode_many([preference])[0] if is_long else item, keeps_groups=keeps_groups)
    arrays = {name: np.asarray(values, dtype=np.int64) for name, values in found.lengths.items()}
    fingerprint = found.fingerprint.hexdigest()
    return TokenFacts(arrays, found.dropped, found.notes, encoder.max_length, encoder.describe(), found.groups, fingerprint)


def _fits(group: TokenGroup, encoder: Encoder) -> bool:
    return group.longest_tokens <= encoder.max_length and len(group.prompt_ids) <= (encoder.max_prompt_length or encoder.max_length)


class _Found:
    """What `encode_rows` collects."""

    def __init__(self) -> None:
        self.lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "longest": []}
        self.dropped: dict[str, list[Where]] = {}
        self.notes: dict[str, list[Where]] = {}
        self.groups: list[TokenGroup] = []
        self.fingerprint = Fingerprint()

    def measure(self, item: TokenGroup | Dropped) -> None:
        """Note a row's lengths."""
        if isinstance(item, Dropped):
            return
        chosen, rejected = item.pairs[0] if item.pairs else (0, None)
        self.lengths["prompt"].append(len(item.prompt_ids))
        self.lengths["chosen"].append(len(item.response_ids[chosen]))
        if rejected is not None:
            self.lengths["rejected"].append(len(item.response_ids[rejected]))
        self.lengths["longest"].append(item.longest_tokens)

    def take(self, item: TokenGroup | Dropped, *, keeps_groups: bool) -> None:
        """Note what became of a row."""
        if isinstance(item, Dropped):
            self.dropped.setdefault(item.reason, []).append(item.where)
            return
        self.fingerprint.add(item)
        for note in item.notes:
            self.notes.setdefault(note, []).append(item.where)
        if keeps_groups:
            self.groups.append(item)


def _encoded(preferences: Iterable[Preference], encoder: Encoder) -> Iterator[tuple[Preference, TokenGroup | Dropped]]:
    iterator = iter(preferences)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield from zip(batch, encoder.encode_many(batch), strict=True)
