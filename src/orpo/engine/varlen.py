"""Variable-length flash attention over a packed row: one call a layer, in half precision, on CUDA.

The kernel has no mask, so each answer's keys are a copy of its prompt's and its own: keys and values of prompts are copied once per answer.

Shape suffixes: H query heads, K key heads, T packed rows, L rows of all copies, E head width.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo.engine.layout import PackedLayout, sent
from orpo.engine.rule import AttentionRule


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule) -> Tensor:
    """Query (1, H, T, E), key and value (1, K, T, E) -> (1, H, T, E).

    Every segment is a sequence of its own; causality and window are aligned to the last key, as flash attention has it.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows_L, cumulative_q, cumulative_k, max_q, max_k = _sequences(layout, query.device)
    key_LKE, value_LKE = (tensor[0].transpose(0, 1).index_select(0, rows_L) for tensor in (key, value))
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _has_grouped_heads(varlen_attn):
            options["enable_gqa"] = True
        else:  # torch 2.11
            key_LKE, value_LKE = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_LKE, value_LKE))
    output_THE: Any = varlen_attn(
        query[0].transpose(0, 1), key_LKE, value_LKE, cumulative_q, cumulative_k, max_q, max_k,
        scale=rule.scale, window_size=(-1 if rule.window is None else rule.window - 1, 0), **options,
    )  # fmt: skip
    return output_THE.transpose(0, 1)[None]


@functools.cache
def _has_grouped_heads(function: Any) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


def _sequences(layout: PackedLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """(packed row of every key, cumulative lengths of queries and of keys, the longest of each)."""
    cache_key = ("varlen", device)
    if cache_key not in layout.cache:
        rows = [np.r_[s.prefix_start : s.prefix_end, s.start : s.end] for s in layout.segments]
        num_q, num_k = [s.end - s.start for s in layout.segments], [len(item) for item in rows]
        cumulative = [sent(np.cumsum([0, *lengths], dtype=np.int32), device) for lengths in (num_q, num_k)]
        layout.cache[cache_key] = (sent(np.concatenate(rows), device), *cumulative, max(num_q), max(num_k))
    return layout.cache[cache_key]  # type: ignore[return-value]
