"""Packed rows for tests of attention, and attention written out in float64 as their oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from orpo.engine.layout import PackedLayout


def full_mask(layout: PackedLayout, window: int | None = None) -> Tensor:
    """(T, T): which rows each row may see, one by one."""
    total = layout.segments[-1].end
    mask = torch.zeros(total, total, dtype=torch.bool)
    for segment in layout.segments:
        for row in range(segment.start, segment.end):
            seen = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, row + 1)]
            mask[row, seen if window is None else seen[-window:]] = True
    return mask


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask_TT: Tensor, scale: float, softcap: float | None = None, sinks_H: Tensor | None = None
) -> Tensor:
    """softmax(cap(scale * q k)) v for every head, with the sink as one more key without a value."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // groups].T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask_TT, -torch.inf)
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H[head].expand(len(scores), 1)], dim=1)
        weights = torch.softmax(scores, dim=1)[:, : mask_TT.shape[1]]
        outputs.append(weights @ value[0, head // groups])
    return torch.stack(outputs, dim=1)[None]


def inputs(num_tokens: int, *, heads: int = 4, kv: int = 2, width: int = 8, value_width: int | None = None, seed: int = 0) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = [(heads, width), (kv, width), (kv, value_width or width)]
    # Laid out as transformers does: (1, T, heads, width) transposed, so not contiguous.
    return [torch.randn(1, num_tokens, count, size, generator=chance, dtype=torch.float64).transpose(1, 2) for count, size in shapes]


SMALL = PackedLayout.of([(5, 3, 4), (1, 1, 1), (7, 2), (3, 6, 1, 2, 9)])
