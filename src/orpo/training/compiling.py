"""`torch_compile: true` in a run: tried on the first rows, beside the layers as they are, before anything is trained."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from orpo.engine.choose import GRADIENT_TOLERANCE, LOGP_TOLERANCE, rows_for_check
from orpo.engine.compiled import compiled_layers, why_not
from orpo.engine.layout import PreferenceBatch, collate
from orpo.engine.parallel import gradients_of, is_sharded, norm_of
from orpo.system.ranks import all_reduce_max

logger = logging.getLogger(__name__)


def compile_layers(trainer: Any, stack: ExitStack) -> str | None:
    """The layers compiled until the stack is closed, if they are one graph each and compute the same.

    Args:
        trainer: an `ORPOTrainer` whose engine is chosen.

    Returns:
        None where they are; else why not, which has been told.
    """
    args, model = trainer.args, trainer.model
    batch = collate(rows_for_check(trainer.known_rows), args.nll_scope).to(args.device)
    expected = _values(trainer, batch)
    with ExitStack() as attempt:
        try:
            count = attempt.enter_context(compiled_layers(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode))
            logger.info("compiling %d decoder layers", count)
            difference = _difference(_values(trainer, batch), expected)
            if is_sharded(model):  # all come to one decision
                difference = tuple(all_reduce_max(torch.tensor(difference, dtype=torch.float64, device=args.device)).tolist())
        except Exception as error:  # Dynamo's, a backend's, a compiler's that is missing
            problem: str | None = why_not(error)
        else:
            problem = _problem(difference, trainer.compute_dtype)
        if problem is None:
            stack.push(attempt.pop_all())
            return None
    logger.warning("torch_compile: the layers run as they are, not compiled (%s)", problem)
    return problem


def _values(trainer: Any, batch: PreferenceBatch) -> tuple[Tensor, list[Tensor]]:
    """Token log-probabilities and two gradients, from the model in training mode; no gradient is left behind."""
    model: nn.Module = trainer.model
    is_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [] if trainer.args.device.type == "cpu" else [trainer.args.device]
    model.train()
    try:
        with torch.random.fork_rng(devices, device_type=trainer.args.device.type), torch.enable_grad(), trainer._computing():
            result = trainer.engine.step(model, batch, trainer.training_objective)
            gradients = gradients_of(result.loss, [trained[0], trained[-1]], model)
    finally:
        model.train(is_training)
    return result.logp_N, [gradient for gradient in gradients if gradient is not None]


def _difference(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """The mean of log-probabilities, nats, and the largest of gradients, in their norm."""
    pairs = zip(found[1], expected[1], strict=True)
    gradient = max((float(norm_of([a - b]) / norm_of([b]).clamp(min=1e-12)) for a, b in pairs), default=0.0)
    return float((found[0] - expected[0]).abs().mean()), gradient


def _problem(difference: tuple[float, float], dtype: torch.dtype) -> str | None:
    logp, gradient = difference
    if logp <= LOGP_TOLERANCE[dtype] and gradient <= GRADIENT_TOLERANCE[dtype]:
        return None
    return f"compiled, log-probabilities differ by {logp:.1e} nats in the mean and gradients by {gradient:.1e} of their norm"
