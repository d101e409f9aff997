"""What an engine returns for a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """One micro-batch through an engine.

    Attributes:
        loss: float32 scalar with a graph to the model; this micro-batch's part of the optimizer step's loss.
        logp_N: float32 token log-probabilities in the batch's order, detached.
        sums: float64, the names of `orpo.objective.METRICS`.
    """

    loss: Tensor
    logp_N: Tensor
    sums: Tensor
