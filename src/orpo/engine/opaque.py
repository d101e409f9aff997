"""Packed attention as one operator that `torch.compile` takes as it is.

Dynamo would trace through the segments of a layout and compile anew for every micro-batch, or give up at the attention's own backward
pass. As an operator of torch it is one node of a layer's graph, forward and backward. A layout is no tensor, so it travels as a number.

The operator runs what runs without a compiler, as it would outside of any operator (`_outside`): masks are made by functions that torch
maps over rows, a kernel may be compiled itself, and gradients are recorded. Block attention, with a backward pass of its own, costs the
same; the other ways are gone through once more in the backward pass, which keeps nothing of them.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from orpo.engine.layout import PackedLayout, Segment
from orpo.engine.rule import AttentionRule

_NUMBERS = itertools.count()
_LAYOUTS: weakref.WeakValueDictionary[int, PackedLayout] = weakref.WeakValueDictionary()
_SEEN: OrderedDict[int, tuple[tuple[Segment, ...], str]] = OrderedDict()
"""What newer layouts were, for a backward pass after its micro-batch is gone; without their masks, which are large."""
REMEMBERED = 4096
_ways: dict[str, Callable[..., Any]] = {}
_KEYS = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
"""What torch's dispatcher looks at in ordinary code. The body of an operator lies below autograd and below `vmap`."""


def _outside() -> AbstractContextManager[Any]:
    """Ordinary code again, inside an operator."""
    return torch._C._ForceDispatchKeyGuard(*_KEYS)


def announce(layout: PackedLayout) -> None:
    """Give a layout its number, outside of any graph."""
    if layout.handle is None:
        number = next(_NUMBERS)
        _LAYOUTS[number], _SEEN[number] = layout, (layout.segments, layout.kernel)
        if len(_SEEN) > REMEMBERED:
            _SEEN.popitem(last=False)
        # A tensor, not an int: a graph takes another value of it without being compiled again.
        layout.handle = torch.tensor(number)


def _layout(handle: Tensor) -> PackedLayout:
    number = int(handle)
    layout = _LAYOUTS.get(number)
    return PackedLayout(*_SEEN[number]) if layout is None else layout


def use(run: Callable[..., Tensor], block: type[torch.autograd.Function], is_block: Callable[..., bool]) -> None:
    """What the operator runs: attention as without a compiler, and its form with a backward pass of its own where `is_block` says so."""
    _ways.update(run=run, forward=block.forward, backward=block.backward, is_block=is_block)


@torch.library.custom_op("orpo::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, handle: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(1, H, T, E), (1, K, T, E), (1, K, T, E) -> (1, T, H, E)."""
    with _outside(), torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return _ways["run"](query, key, value, _layout(handle), AttentionRule(scale, window, softcap, sinks)).contiguous()


@packed_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, handle: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("orpo::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    handle: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and sinks; of sinks that there are none of an empty tensor."""
    layout, rule = _layout(handle), AttentionRule(scale, window, softcap, sinks)
    found: tuple[Tensor | None, ...]
    with _outside(), torch.autocast(query.device.type, enabled=False):
        if _ways["is_block"](query, layout, rule):
            context = SimpleNamespace(saved_tensors=(query, key, value, output[0]), layout=layout, rule=rule)
            found = (*_ways["backward"](context, grad)[:3], None)
        else:
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value, sinks) if tensor is not None]
            with torch.enable_grad():
                again = _ways["run"](*inputs[:3], layout, replace(rule, sinks_H=None if sinks is None else inputs[3]))
            found = torch.autograd.grad(again, inputs, grad)
    like = (query, key, value, query.new_empty(0) if sinks is None else sinks)
    pairs = itertools.zip_longest(found, like)
    return tuple(torch.zeros_like(one) if gradient is None else gradient.contiguous() for gradient, one in pairs)  # type: ignore[return-value]


@packed_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    handle: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (query, key, value, query.new_empty(0) if sinks is None else sinks)
    return tuple(one.new_empty(one.shape) for one in like)  # type: ignore[return-value]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    query, key, value, sinks, handle, *settings = inputs
    ctx.save_for_backward(query, key, value, sinks, output, handle)
    ctx.settings = settings  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, output, handle = ctx.saved_tensors  # type: ignore[attr-defined]
    found = packed_attention_backward(grad.contiguous(), query, key, value, sinks, output, handle, *ctx.settings)  # type: ignore[attr-defined]
    return (*found[:3], None if sinks is None else found[3], None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_keep)
