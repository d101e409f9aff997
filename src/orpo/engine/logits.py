"""What happens to a chunk of logits: log-probabilities of the targets, then the gradient of the logits in place.

Two small functions, in two forms. Written out, on a CPU, they work on a few rows at a time, which stay in the cache through all passes.
On a GPU each pass goes over memory, and there `torch.compile` makes one pass of each function: for bf16 logits 2 bytes of each read
for the log-probabilities, and 2 read and 2 written for the gradient, where the written form moves 40 (docs/performance.md).

Shape suffixes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FUSED_DEVICES = ("cuda",)
"""Where the compiled form is taken. On a CPU it gains 1 % of a step and takes half a minute and a C++ compiler (docs/performance.md)."""

ROWS_IN_CACHE = 16
"""Rows of float32 logits worked on at a time on a CPU: 16 rows of 49k entries stay in the cache through all passes."""

_is_fusing = True


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model does to its logits behind the head: `softcap * tanh(scale * x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: object) -> LogitRule:
        """Read from a model's configuration (Granite divides, Cohere multiplies, Gemma 2 caps)."""
        scale = 1.0
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            scale /= float(divisor)
        if (factor := getattr(config, "logit_scale", None)) is not None:
            scale *= float(factor)
        return cls(scale, getattr(config, "final_logit_softcapping", None))


PLAIN = LogitRule()


def log_softmax_in_place(logits_CV: Tensor, target_C: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """Target log-probabilities.

    Returns:
        (logp_C, factor_C), float32; `factor_C` is for `to_gradient`, as is what the logits are left as.
    """
    if _is_fused(logits_CV):
        try:
            return _compiled(read_logps, rule)(logits_CV, target_C)
        except Exception as error:
            _give_up(error)
    return _written_log_softmax(logits_CV, target_C, rule)


def to_gradient(logits_CV: Tensor, target_C: Tensor, grad_C: Tensor, factor_C: Tensor, rule: LogitRule) -> None:
    """Turn what `log_softmax_in_place` left into the gradient of the raw logits: `grad * (one_hot - softmax) * d(rule)`, in place."""
    if not _is_fused(logits_CV):
        _written_gradient(logits_CV, target_C, grad_C, factor_C, rule)
        return
    try:
        _compiled(write_gradient, rule)(logits_CV, target_C, grad_C, factor_C)
    except Exception as error:
        _give_up(error)
        write_gradient(logits_CV, target_C, grad_C, factor_C, rule)  # the logits are as the first function left them


def read_logps(logits_CV: Tensor, target_C: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """(log-probability, log-sum-exp) of each row; the logits stay as they are."""
    ruled_CV = _ruled(logits_CV, rule)
    lse_C = torch.logsumexp(ruled_CV, 1)
    return ruled_CV.gather(1, target_C[:, None])[:, 0] - lse_C, lse_C


def write_gradient(logits_CV: Tensor, target_C: Tensor, grad_C: Tensor, lse_C: Tensor, rule: LogitRule) -> None:
    """The gradient in place of the logits, from the logits themselves: rounded once, at its end."""
    ruled_CV = _ruled(logits_CV, rule)
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == target_C[:, None]
    gradient_CV = (is_target_CV.float() - torch.exp(ruled_CV - lse_C[:, None])) * (grad_C.float() * rule.scale)[:, None]
    if rule.softcap is not None:
        gradient_CV = gradient_CV * (1.0 - (ruled_CV / rule.softcap).square())
    logits_CV.copy_(gradient_CV)


def _ruled(logits_CV: Tensor, rule: LogitRule) -> Tensor:
    scaled_CV = logits_CV.float() * rule.scale
    return scaled_CV if rule.softcap is None else rule.softcap * torch.tanh(scaled_CV / rule.softcap)


def _is_fused(logits_CV: Tensor) -> bool:
    return _is_fusing and logits_CV.device.type in FUSED_DEVICES


@functools.cache
def _compiled(function: Callable[..., Any], rule: LogitRule) -> Callable[..., Any]:
    return torch.compile(functools.partial(function, rule=rule), dynamic=True)  # chunks have any number of rows


def _give_up(error: Exception) -> None:
    """Go on without the compiled form where there is no compiler; what fails at run time fails for everybody."""
    global _is_fusing
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _is_fusing = False
    logger.warning("the passes over the logits cannot be compiled (%s) and are made one by one, which is slower", type(error).__name__)


def _row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    size = ROWS_IN_CACHE if logits_CV.device.type == "cpu" else logits_CV.shape[0]
    for start in range(0, logits_CV.shape[0], size):
        yield slice(start, min(start + size, logits_CV.shape[0]))


def _written_log_softmax(logits_CV: Tensor, target_C: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """Target log-probabilities; leaves exp(logit - maximum) in place of the logits, with a soft cap the capped logits themselves.

    Returns:
        (logp_C, factor_C), float32. `factor_C` is what the gradient needs: 1 / sum of exponentials, with a soft cap log-sum-exp.
    """
    logp_C = torch.empty(logits_CV.shape[0], device=logits_CV.device)
    factor_C = torch.empty_like(logp_C)
    for rows in _row_blocks(logits_CV):
        block = logits_CV[rows]
        work = block.float() if block.dtype != torch.float32 else block
        if rule.scale != 1.0:
            work.mul_(rule.scale)
        if rule.softcap is not None:
            work.div_(rule.softcap).tanh_().mul_(rule.softcap)
        target = work.gather(1, target_C[rows, None])[:, 0]
        if rule.softcap is not None:
            factor_C[rows] = torch.logsumexp(work, 1)
            logp_C[rows] = target - factor_C[rows]
        else:
            maximum = work.amax(1)
            work.sub_(maximum[:, None]).exp_()
            total = work.sum(1)
            logp_C[rows] = target - maximum - total.log()
            factor_C[rows] = total.reciprocal()
        if work is not block:
            block.copy_(work)
    return logp_C, factor_C


def _written_gradient(logits_CV: Tensor, target_C: Tensor, grad_C: Tensor, factor_C: Tensor, rule: LogitRule) -> None:
    """Turn what `_written_log_softmax` left into the gradient of the raw logits: `grad * (one_hot - softmax) * d(rule)`, in place."""
    scaled_C = grad_C.to(factor_C.dtype) * rule.scale
    if rule.softcap is None:
        logits_CV.mul_((-scaled_C * factor_C).to(logits_CV.dtype)[:, None])
        _add_at(logits_CV, target_C, scaled_C)
        return
    for rows in _row_blocks(logits_CV):
        capped = logits_CV[rows].float()
        slope = 1.0 - (capped / rule.softcap).square()
        gradient = (capped - factor_C[rows, None]).exp_().mul_(-scaled_C[rows, None])
        _add_at(gradient, target_C[rows], scaled_C[rows])
        logits_CV[rows] = gradient.mul_(slope).to(logits_CV.dtype)


def _add_at(matrix_CV: Tensor, column_C: Tensor, value_C: Tensor) -> None:
    """Add one value per row. In float32: for a likely token the two nearly cancel, and bf16 would round twice.

    By indexing, not `scatter_`, which copies the whole matrix twice on a CPU.
    """
    row_C = torch.arange(matrix_CV.shape[0], device=matrix_CV.device)
    matrix_CV[row_C, column_C] = (matrix_CV[row_C, column_C].float() + value_C).to(matrix_CV.dtype)
