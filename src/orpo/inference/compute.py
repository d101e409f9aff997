"""A model in the state in which it is evaluated: nothing trains, no dropout, no graph, the dtype that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def inference(model: nn.Module, compute_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode without gradients; the model leaves as it came.

    Args:
        model: any causal language model, adapted or not.
        compute_dtype: None for the dtype of the weights; bfloat16 computes with working copies of float32 weights (half the traffic, so
            that generation is about twice as fast) and leaves the weights themselves alone.
    """
    import torch

    from orpo.system.allocator import limit_kernel_cache

    limit_kernel_cache()  # a scoring, or the demo's answers, may hold the process's first bf16 product
    is_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.callback(model.train, is_training)
        model.eval()
        stack.callback(_set_requires_grad, trainable, True)
        # Without a trainable weight the engines' self-check compares log-probabilities alone: no backward is paid for.
        _set_requires_grad(trainable, False)
        stack.enter_context(torch.no_grad())
        if compute_dtype is not None and _has_other_weights(model, compute_dtype):
            from orpo.engine.precision import WorkingWeights

            stack.enter_context(WorkingWeights(model, compute_dtype).active())
        yield


def _set_requires_grad(parameters: list[Any], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)


def _has_other_weights(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether there are float32 weights to make working copies of. Quantized models compute in a dtype of their own."""
    import torch

    return not getattr(model, "is_quantized", False) and any(
        parameter.dtype == torch.float32 and parameter.dtype != dtype for parameter in model.parameters()
    )
