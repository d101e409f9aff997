"""What is asked of all rows of a set at once, as arrays: their sizes, counts and prompts. No row is looked at twice for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np

from orpo.data.types import TokenGroup


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """One value per row; int32 but for `prompt_hash`.

    Attributes:
        prompt_tokens: of the prompt.
        num_tokens: of the packed form: the prompt once, each response once.
        longest_tokens: of the longest single sequence.
        answer_tokens: of the responses, each as often as it wins.
        num_wins: of all responses together.
        num_pairs: of the row.
        largest_id: of all its tokens.
        prompt_hash: uint64, the first eight bytes of the prompt's sha256. It says which side of a split the prompt is on.
    """

    prompt_tokens: np.ndarray
    num_tokens: np.ndarray
    longest_tokens: np.ndarray
    answer_tokens: np.ndarray
    num_wins: np.ndarray
    num_pairs: np.ndarray
    largest_id: np.ndarray
    prompt_hash: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    def nll_tokens(self, nll_scope: str) -> np.ndarray:
        """Tokens that each row counts in the next-token loss: `orpo.engine.layout.num_nll_tokens` for all of them."""
        prompts = self.num_wins * (self.prompt_tokens - 1) if nll_scope == "sequence" else 0
        return self.answer_tokens + prompts

    def take(self, rows: np.ndarray) -> Measures:
        """Those of some rows."""
        return Measures(*(getattr(self, item.name)[rows] for item in fields(self)))


@runtime_checkable
class Measured(Protocol):
    """A set of rows that knows its measures without reading the rows."""

    def measures(self) -> Measures: ...


def measures_of(groups: Sequence[TokenGroup]) -> Measures:
    """The measures of some rows: known, or computed."""
    return groups.measures() if isinstance(groups, Measured) else measure(groups)


def measure(groups: Iterable[TokenGroup]) -> Measures:
    """Look at each row once."""
    found: list[tuple[int, ...]] = []
    hashes: list[int] = []
    for group in groups:
        wins = group.num_wins
        ids = (group.prompt_ids, *group.response_ids)
        found.append(
            (
                len(group.prompt_ids),
                group.num_tokens,
                group.longest_tokens,
                sum(win * len(answer) for win, answer in zip(wins, group.response_ids, strict=True)),
                sum(wins),
                len(group.pairs),
                max((int(part.max()) for part in ids if len(part)), default=0),
            )
        )
        hashes.append(prompt_hash(group.prompt_ids))
    table = np.asarray(found, dtype=np.int32).reshape(-1, 7)
    columns: list[np.ndarray] = [*(np.ascontiguousarray(column) for column in table.T), np.asarray(hashes, dtype=np.uint64)]
    return Measures(*columns)


def prompt_hash(prompt_ids: np.ndarray, salt: bytes = b"") -> int:
    """A number below 2**64 that depends on the prompt's ids alone."""
    digest = hashlib.sha256(salt + np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "big")
