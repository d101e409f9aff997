"""Linear layers with their weights laid out as a processor's bfloat16 product wants them, for as long as a model decodes.

A product with few rows is mostly the reading of its weights, which oneDNN otherwise rearranges at every call: with up to eight rows it
takes little more than half the time, with 64 rows a tenth less. Rearranging takes about as long as a dozen tokens gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo.system.machine import bf16_is_fast, memory_facts

MIN_NEW_TOKENS = 24
"""For fewer it is not worth it."""
MEMORY_SHARE = 0.25
"""Most of the memory that is left which the second copy of the weights may take."""
_ROWS = 64
"""The layout is chosen for so many; it serves others as well."""


@contextmanager
def packed_linears(model: nn.Module, max_new_tokens: int) -> Iterator[int]:
    """The model's bfloat16 linear layers on a CPU compute from rearranged weights inside; gives how many do."""
    layers: list[Any] = (
        [module for module in model.modules() if _is_plain(module)] if max_new_tokens >= MIN_NEW_TOKENS and _can_pack() else []
    )
    free = memory_facts(torch.device("cpu"))["free_bytes"] if layers else None
    if free is not None and sum(layer.weight.nbytes for layer in layers) > MEMORY_SHARE * free:
        layers = []
    try:
        for layer in layers:
            layer.forward = _forward(torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, _ROWS), layer)
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _can_pack() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    is_there = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return is_there and bf16_is_fast("cpu")


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer as torch has it, whose forward nobody has replaced."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()


def _forward(packed: Tensor, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    linear: Any = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return F.linear(x, layer.weight, layer.bias)
        # Flat and contiguous: a slice of the last positions would be taken for many products, each with weights of its own.
        flat = x.reshape(-1, x.shape[-1])
        return linear(flat, packed, layer.bias, "none", [], "").view(*x.shape[:-1], -1)

    return forward
