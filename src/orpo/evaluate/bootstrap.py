"""Means with intervals over prompts: a bootstrap, and for shares of independent prompts what is honest for small counts.

Pairs that share a prompt are not independent, so prompts are drawn with replacement and bring all their pairs along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from orpo.system.intervals import paired_shares, smallest_shown, wilson

LEVEL = 0.95
NUM_BOOTSTRAP = 2000
_CHUNK_NUMBERS = 4_000_000
"""Draws are counted in pieces of this many numbers, so that memory does not grow with the data."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval; `low` and `high` are NaN where a single prompt leaves nothing to draw from."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}" if math.isnan(self.low) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | None]:
        """As JSON; None for what has no value."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}

    @property
    def smallest_shown(self) -> float | None:
        """The difference that so many prompts would have shown with 80 % power; None without an interval."""
        return smallest_shown(self.low, self.high)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def estimate_means(columns: np.ndarray, clusters: Sequence[object], *, seed: int = 0, num_bootstrap: int = NUM_BOOTSTRAP) -> list[Estimate]:
    """Mean of every column, with percentile intervals from the same draws of clusters.

    Args:
        columns: float64, shape (rows, columns), at least one row.
        clusters: a hashable per row; rows with equal ones are drawn together.
        seed: of the draws.
        num_bootstrap: draws.
    """
    names, member = np.unique(np.fromiter(_codes(clusters), dtype=np.int64, count=len(clusters)), return_inverse=True)
    num_clusters = len(names)
    sums = np.zeros((num_clusters, columns.shape[1] + 1))
    np.add.at(sums, member, np.column_stack([columns, np.ones(len(columns))]))
    means = columns.mean(axis=0)
    if num_clusters < 2:
        return [Estimate(float(mean), math.nan, math.nan) for mean in means]
    generator = np.random.default_rng(seed)
    draws = []
    size = max(1, _CHUNK_NUMBERS // num_clusters)
    for start in range(0, num_bootstrap, size):
        picks = generator.integers(num_clusters, size=(min(size, num_bootstrap - start), num_clusters))
        # Draw by draw: all at once the gathered sums would be as many numbers again for every column.
        totals = np.stack([sums[row].sum(axis=0) for row in picks])
        draws.append(totals[:, :-1] / totals[:, -1:])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail], axis=0)
    return [Estimate(float(mean), float(a), float(b)) for mean, a, b in zip(means, low, high, strict=True)]


def estimate_mean(values: Iterable[float], clusters: Sequence[object] | None = None, **options: int) -> Estimate:
    """Mean of one column; every value is its own cluster where none are given."""
    column = np.asarray(list(values), dtype=np.float64)[:, None]
    return estimate_means(column, range(len(column)) if clusters is None else clusters, **options)[0]


def estimate_share(
    values: Iterable[float], clusters: Sequence[object] | None = None, *, seed: int = 0, num_bootstrap: int = NUM_BOOTSTRAP
) -> Estimate:
    """Mean of zeros and ones (and ties, halves), with an interval that is honest for small counts.

    Wilson's interval where every prompt has one row; where prompts have several, or values are weights and no counts, the bootstrap by
    prompt; and Wilson's interval for as many cases as there are prompts where the draws all say the same.
    """
    column = list(values)
    found = estimate_mean(column, clusters, seed=seed, num_bootstrap=num_bootstrap)
    num_prompts = len(column) if clusters is None else len(set(clusters))
    are_counts = num_prompts == len(column) and all(value in (0.0, 0.5, 1.0) for value in column)
    if num_prompts < 2 or (not are_counts and found.low < found.high):
        return found
    return Estimate(found.value, *wilson(found.value * num_prompts, num_prompts))


def estimate_share_change(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[object] | None = None,
    *,
    seed: int = 0,
    num_bootstrap: int = NUM_BOOTSTRAP,
) -> Estimate:
    """Change of a share between two measurements of the same cases: Newcombe's paired interval, or the bootstrap by prompt.

    Args:
        before, after: zeros and ones, case by case.
        clusters, seed, num_bootstrap: as in `estimate_share`.
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    found = estimate_mean(changes, clusters, seed=seed, num_bootstrap=num_bootstrap)
    num_prompts = len(changes) if clusters is None else len(set(clusters))
    if num_prompts < 2 or (num_prompts < len(changes) and found.low < found.high):
        return found
    if num_prompts < len(changes):  # every draw says the same: as many cases as prompts, each with the change that all have
        half = 1 - wilson(num_prompts, num_prompts)[0]
        return Estimate(found.value, max(found.value - half, -1.0), min(found.value + half, 1.0))
    counts = [
        sum(bool(old) is first and bool(new) is second for old, new in zip(before, after, strict=True))
        for first, second in ((True, True), (True, False), (False, True), (False, False))
    ]
    return Estimate(found.value, *paired_shares(*counts))


def _codes(clusters: Sequence[object]) -> Iterable[int]:
    """Clusters numbered by first appearance, so that the draws depend on the data alone and not on hashing."""
    seen: dict[object, int] = {}
    for cluster in clusters:
        yield seen.setdefault(cluster, len(seen))
