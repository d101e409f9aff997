"""Activation checkpointing by need: as few decoder layers as fit into memory are computed again in the backward pass.

A layer that is computed again keeps its input alone. The first ones are taken: when their turn comes, the layers behind them have been
gone through and have given back what they kept, so that computing them again adds nothing to the peak. The last layer gains nothing
by it: it would be computed again at once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from orpo.engine.parallel import decoder_layers, own_part

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig

logger = logging.getLogger(__name__)

AUTO = "auto"
SHARE_OF_FREE_MEMORY = 0.85
"""What a run may take of the memory that is free, where no budget is given: the estimate has no holes of the allocator in it."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What the largest micro-batch of a run needs, by the number of layers that are computed again; bytes.

    Attributes:
        fixed: weights, gradients, optimizer, logits, libraries.
        outside: kept for the backward pass outside of the layers.
        layer, layer_input: kept by one layer, and what is kept instead where it is computed again.
        num_layers: of the model.
    """

    fixed: float
    outside: float
    layer: float
    layer_input: float
    num_layers: int

    def activations(self, num_recomputed: int) -> float:
        """Kept for the backward pass."""
        again = self.layer if num_recomputed == self.num_layers else 0.0
        return self.outside + (self.num_layers - num_recomputed) * self.layer + num_recomputed * self.layer_input + again

    def peak(self, num_recomputed: int) -> float:
        """Memory in all."""
        return self.fixed + self.activations(num_recomputed)

    def fewest(self, budget: float | None) -> int:
        """The smallest number of layers that fits; the one that needs least where none does, or 0 where no budget is known."""
        if budget is None:
            return 0
        counts = range(self.num_layers + 1)
        return next((count for count in counts if self.peak(count) <= budget), min(counts, key=self.peak))


def budget_bytes(args: ORPOConfig, *, held: float = 0.0) -> float | None:
    """What a run may take of its device: `memory_budget_gib`, or most of what is free; None where the system does not say.

    Args:
        held: of the run's own need, what this process holds already.
    """
    from orpo.system.machine import memory_facts

    if args.memory_budget_gib is not None:
        return args.memory_budget_gib * GIB
    facts = memory_facts(args.device)
    free = facts["free_bytes"] or facts["total_bytes"]
    return None if free is None else (free + held) * SHARE_OF_FREE_MEMORY


def fewest_layers(model: nn.Module, need: MemoryNeed, args: ORPOConfig) -> int:
    """How many layers of a loaded model a run computes again."""
    stored = sum(part.numel() * part.element_size() for part in map(own_part, model.parameters()))
    budget = budget_bytes(args, held=stored)
    count = need.fewest(budget)
    if budget is not None and need.peak(count) > budget:
        logger.warning(
            "about %.2f GB are needed even with %d layers computed again, and %.2f GB are there: smaller micro-batches "
            "(max_tokens_per_microbatch), an adapter (use_peft: true) or a smaller model may fit",
            need.peak(count) / GIB,
            count,
            budget / GIB,
        )
    return count


@contextmanager
def recomputed(model: nn.Module, num_layers: int, settings: dict[str, Any] | None = None) -> Iterator[int]:
    """The model's first decoder layers computed again in the backward pass while the context lasts; gives their number.

    Args:
        settings: for `torch.utils.checkpoint.checkpoint`.
    """
    layers = decoder_layers(model)[:num_layers]
    before = [vars(layer).get("forward") for layer in layers]  # compiled, perhaps
    function = functools.partial(checkpoint, **{"use_reentrant": False, **(settings or {})})
    for layer in layers:
        layer.forward = _recomputing(layer, layer.forward, function)
    try:
        yield len(layers)
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _recomputing(layer: nn.Module, forward: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **keywords: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return function(forward, *inputs, **keywords)
        return forward(*inputs, **keywords)

    return run
