"""Rows to micro-batches: bins as few and as even as limits of rows and tokens allow, the same on every rank without a word between them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(sizes: Sequence[int], *, num_ranks: int, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Spread items over bins: a multiple of `num_ranks` bins, as few as the limits allow, as even as largest-first gives.

    Args:
        sizes: tokens of each item.
        num_ranks: the number of bins is a multiple of this.
        max_rows, max_tokens: limits of a bin; an item larger than `max_tokens` has a bin of its own.

    Returns:
        Item indices per bin, fullest bins first, so that dealing them out in turn gives every rank like work.

    Example:
        >>> from orpo.engine.packing import pack
        >>> pack([700, 300, 600, 200], num_ranks=1, max_rows=4, max_tokens=1024)
        [[0, 3], [2, 1]]
    """
    # Ties by place, not by whatever order a sort leaves them in: every rank must come to the same bins.
    order = sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
    # An item above the limit fills a bin of its own; counted in full it would ask for bins that stay empty.
    num_tokens = sum(min(size, max_tokens) for size in sizes)
    per_rank = max(1, -(-len(sizes) // (num_ranks * max_rows)), -(-num_tokens // (num_ranks * max_tokens)))
    while True:
        bins = _fill(order, sizes, num_ranks * per_rank, max_rows)
        if all(len(content) <= 1 or sum(sizes[item] for item in content) <= max_tokens for content in bins):
            return sorted(bins, key=lambda content: -sum(sizes[item] for item in content))
        per_rank += 1  # the bound above is of the sums; the items themselves may not part so evenly


def _fill(order: Sequence[int], sizes: Sequence[int], num_bins: int, max_rows: int) -> list[list[int]]:
    """Each item into the emptiest bin that still takes one. A heap: evaluation packs whole data sets at once."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, index) for index in range(num_bins)]
    for item in order:
        load, target = heapq.heappop(emptiest)
        bins[target].append(item)
        if len(bins[target]) < max_rows:
            heapq.heappush(emptiest, (load + sizes[item], target))
    return bins
