"""FlexAttention and variable-length flash attention for packed rows on CUDA: written, and off until they have been run there.

Both take the whole packed row in one call where the default takes one call per segment. `ORPO_ATTENTION_KERNEL=flex` or `=varlen` turns one
on for tensors on a GPU; what a kernel cannot do (learned sinks; for `varlen` float32 and soft caps) stays with the default. The comparison
of the engines at the start of a run is made in the weights' own precision: it covers `flex`, and `varlen` for bf16 weights only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orpo.engine.layout import PackedLayout
from orpo.errors import UserError

VARIABLE = "ORPO_ATTENTION_KERNEL"
KERNELS = ("flex", "varlen")


def wanted_kernel() -> str | None:
    """The kernel that the environment asks for, or None.

    Raises:
        UserError: there is none of that name.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in KERNELS:
        raise UserError(f"{name!r} is no attention kernel", where=VARIABLE, expected=" or ".join(KERNELS), mend="or leave it unset")
    return name or None


def kernel_for(query: Tensor, softcap: float | None, sinks_H: Tensor | None) -> str | None:
    """The kernel to use for these tensors; None leaves them to the default."""
    name = wanted_kernel() if query.device.type == "cuda" else None
    if name is None or sinks_H is not None:
        return None
    if name == "varlen" and (softcap is not None or query.dtype not in (torch.float16, torch.bfloat16)):
        return None
    return name


def run_kernel(
    name: str, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of a packed row: query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E)."""
    if name == "flex":
        return flex(query, key, value, layout, scale, window, softcap).transpose(1, 2).contiguous()
    return varlen(query, key, value, layout, scale, window)


def flex(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One FlexAttention call, shape (1, H, T, E). On a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    call: Any = _compiled_flex() if query.is_cuda else flex_attention

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    return call(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=_block_mask(layout, window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # packed rows have a new length at every step


def _block_mask(layout: PackedLayout, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    cache_key = ("flex", window, device)
    if cache_key not in layout.cache:
        rows = [(s.start, s.prefix_start, s.prefix_end, s.num_prefix) for s in layout.segments for _ in range(s.start, s.end)]
        start_T, prefix_start_T, prefix_end_T, num_prefix_T = torch.tensor(rows, device=device).unbind(1)
        position_T = torch.arange(len(rows), device=device) - start_T + num_prefix_T

        def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_own = (key >= start_T[query]) & (key <= query)
            is_prefix = (key >= prefix_start_T[query]) & (key < prefix_end_T[query])
            visible = is_own | is_prefix
            return visible if window is None else visible & (position_T[query] - position_T[key] < window)

        layout.cache[cache_key] = create_block_mask(is_visible, None, None, len(rows), len(rows), device=str(device))
    return layout.cache[cache_key]


def varlen(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None) -> Tensor:
    """One flash call in which every segment is a sequence whose keys are its prefix and itself; shape (1, T, H, E).

    Prompts are copied once per response, as keys and values only; causality is aligned to the last key, as flash attention has it.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows_K, cumulative_q, cumulative_k, max_q, max_k = _sequences(layout, query.device)
    output_THE: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, rows_K),
        value[0].transpose(0, 1).index_select(0, rows_K),
        cumulative_q,
        cumulative_k,
        max_q,
        max_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_THE[None]


def _sequences(layout: PackedLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """(packed row of every key, cumulative lengths of queries and of keys, the longest of each)."""
    cache_key = ("varlen", device)
    if cache_key not in layout.cache:
        rows = [torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]) for s in layout.segments]
        num_q, num_k = [s.end - s.start for s in layout.segments], [len(item) for item in rows]
        cumulative = [torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (num_q, num_k)]
        layout.cache[cache_key] = (torch.cat(rows).to(device), *cumulative, max(num_q), max(num_k))
    return layout.cache[cache_key]  # type: ignore[return-value]
