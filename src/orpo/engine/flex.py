"""FlexAttention over a packed row: one call a layer, with a mask by blocks; no key or value is copied.

The row is padded to whole blocks (`padded_rows`), and the call is compiled once for dynamic lengths, so that nothing is compiled again in
the middle of a run. The mask by blocks is written down from the segments, not found by trying every pair of rows as
`create_block_mask` does, which for 16,384 rows looks at 268 million.

On a CPU it has a forward pass alone.

Shape suffixes: H query heads, K key heads, T packed rows, E head width, Q and L blocks of query and of key rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo.engine.layout import PackedLayout, sent
from orpo.engine.rule import AttentionRule

COMPILED_DEVICES = ("cuda",)
"""Where the call is compiled; elsewhere torch writes out all scores."""

BLOCK = 128
"""Rows of a block of the mask, in both directions: FlexAttention's own."""


def padded_rows(num_rows: int) -> int:
    """Rows of whole blocks, and of three at least.

    One block would be compiled by itself, as every size of 1. Two are as many rows as a head of Gemma is wide, and a compiler that sees the
    two alike takes them for one and the same size, until another length comes.
    """
    return max(3, -(-num_rows // BLOCK)) * BLOCK


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule) -> Tensor:
    """Attention of a packed row: query (1, H, T, E), key and value (1, K, T, E) -> (1, H, T, E).

    Rows behind the last segment are padding: each sees itself.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    call: Any = _compiled() if query.device.type in COMPILED_DEVICES else flex_attention
    output, extra = call(
        query,
        key,
        value,
        score_mod=None if rule.softcap is None else _cap(rule.softcap, query.device),
        block_mask=block_mask(layout, query.shape[2], rule.window, query.device),
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if rule.sinks_H is None:
        return output
    # A sink is one more key without a value: it takes its share of the softmax, sigmoid(lse - sink) is what is left for the others.
    left_HT = torch.sigmoid(extra.lse - rule.sinks_H.to(extra.lse)[None, :, None])
    return (output * left_HT[..., None]).to(output.dtype)


@functools.cache
def _compiled(backend: str = "inductor") -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, backend=backend)


@functools.cache
def _cap(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """The soft cap as a change of scores, one for each value and device."""
    # A tensor: a number would become a symbol, at which the graph ends, and the operator would write out all scores.
    cap = torch.full((), softcap, device=device)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(layout: PackedLayout, num_rows: int, window: int | None, device: torch.device) -> Any:
    """The mask of a row of `num_rows`, made once per micro-batch and window."""
    from torch.nn.attention.flex_attention import BlockMask

    cache_key = ("flex", num_rows, window, device)
    if cache_key not in layout.cache:
        start_T, prefix_start_T, prefix_end_T, position_T = sent(layout.table(num_rows), device).unbind(0)
        # A tensor, and there without a window too: a number, or another function, would be compiled anew for each window.
        reach = torch.full((), num_rows if window is None else window, dtype=torch.int32, device=device)

        def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_own = (key >= start_T[query]) & (key <= query)
            is_prefix = (key >= prefix_start_T[query]) & (key < prefix_end_T[query])
            return (is_own | is_prefix) & (position_T[query] - position_T[key] < reach)

        some_QL, all_QL = visible_blocks(layout, num_rows, window)
        blocks = [sent(array, device)[None, None] for matrix in (some_QL & ~all_QL, all_QL) for array in _listed(matrix)]
        num_some, some, num_all, whole = blocks
        mask: Any = BlockMask.from_kv_blocks(
            num_some, some, num_all, whole, BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(num_rows, num_rows)
        )
        for name in (f"{full}{side}_{kind}" for full in ("", "full_") for side in ("q", "kv") for kind in ("num_blocks", "indices")):
            # Of what hangs on an object Dynamo takes the first sizes for fixed, though it was told that they are not.
            for size in range(2, getattr(mask, name).ndim):
                torch._dynamo.maybe_mark_dynamic(getattr(mask, name), size)
        layout.cache[cache_key] = mask
    return layout.cache[cache_key]


def visible_blocks(layout: PackedLayout, num_rows: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys some row of a block of queries may see, and which every row of it sees whole: two bool arrays, shape (Q, L)."""
    num_blocks = -(-num_rows // BLOCK)
    some_QL, all_QL = (np.zeros((num_blocks, num_blocks), dtype=bool) for _ in range(2))
    reach = num_rows if window is None else window
    for segment in layout.segments:
        for block in range(segment.start // BLOCK, -(-segment.end // BLOCK)):
            first, last = max(segment.start, block * BLOCK), min(segment.end, (block + 1) * BLOCK) - 1
            # The prefix stands before the segment's own rows: this far from its end a row at the segment's start still looks.
            far, near = (max(segment.prefix_start, segment.prefix_end - reach + 1 + row - segment.start) for row in (first, last))
            _mark(some_QL[block], far, segment.prefix_end, is_touched=True)
            _mark(some_QL[block], max(segment.start, first - reach + 1), last + 1, is_touched=True)
            if last - first + 1 == BLOCK:
                own = max(segment.start, last - reach + 1)
                if segment.prefix_end == segment.start and own == segment.start:
                    own = min(near, own)  # prefix and own rows lie side by side
                else:
                    _mark(all_QL[block], near, segment.prefix_end, is_touched=False)
                _mark(all_QL[block], own, first + 1, is_touched=False)
    padding = np.arange(layout.num_rows // BLOCK, num_blocks)
    some_QL[padding, padding] = True
    return some_QL, all_QL


def _mark(row_L: np.ndarray, first: int, end: int, *, is_touched: bool) -> None:
    """Mark the blocks that keys [first, end) touch, or those that they fill."""
    if first < end:
        blocks = slice(first // BLOCK, -(-end // BLOCK)) if is_touched else slice(-(-first // BLOCK), end // BLOCK)
        row_L[blocks] = True


def _listed(matrix_QL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of marked blocks of each row, their numbers first), int32, as `BlockMask` takes them."""
    return matrix_QL.sum(1, dtype=np.int32), np.argsort(~matrix_QL, axis=1, kind="stable").astype(np.int32)
