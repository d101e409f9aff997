"""An objective at given log-probabilities: loss, derivative and the sums that metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo.errors import UserError
from orpo.objective.equations import Objective, ResponseIndex, log_odds_ratio, mean_logp

METRICS = (
    "num_nll_tokens",
    "nll_sum",
    "num_pairs",
    "odds_ratio_loss_sum",
    "chosen_logp_sum",
    "rejected_logp_sum",
    "accuracy_sum",
    "log_odds_ratio_sum",
    "log_sigmoid_sum",
    "nll_grad_square",
    "preference_grad_square",
    "chosen_tokens",
    "rejected_tokens",
)
"""What every step adds up, in this order. All are plain sums, so that micro-batches, steps and ranks add to the exact mean."""


@dataclass(frozen=True, slots=True)
class ObjectiveValue:
    """What an objective says of some tokens.

    Attributes:
        loss: float32 scalar; these tokens' part of the step's loss.
        grad_N: float32; derivative of `loss` with respect to each token log-probability.
        sums: float64, one value per name in `METRICS`.

    Example: `value` is that of `evaluate`.

        >>> from orpo.objective import METRICS
        >>> dict(zip(METRICS, value.sums.tolist()))["accuracy_sum"]
        1.0
    """

    loss: Tensor
    grad_N: Tensor
    sums: Tensor


def evaluate(objective: Objective, logp_N: Tensor, index: ResponseIndex) -> ObjectiveValue:
    """Loss, derivative and metrics of an objective at given token log-probabilities.

    Runs in float32 whatever the model's dtype (float64 input stays float64), on detached values: nothing here holds on to a model.

    Args:
        objective: `ORPO()`, or any function of the same form.
        logp_N: log-probabilities of the predicted tokens, nats, shape (N,); any float dtype.
        index: what they belong to.

    Raises:
        UserError: the objective returned something else than named scalars.

    Example: `logp_N` and `index` are those of `ResponseIndex`. A step against it pushes the rejected answer down, the rest up.

        >>> from orpo.objective import ORPO, evaluate
        >>> value = evaluate(ORPO(orpo_alpha=0.1), logp_N, index)
        >>> value.loss
        tensor(0.7121)
        >>> value.grad_N
        tensor([-0.3333, -0.3460, -0.3460,  0.0132])
    """
    leaf_N = logp_N.detach().to(torch.float64 if logp_N.dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.enable_grad():
        nll, preference = _two_terms(objective, leaf_N, index)
        nll_grad_N = _grad(nll, leaf_N)
        preference_grad_N = _grad(preference, leaf_N)
    loss = (nll + preference).detach()
    sums = _metric_sums(leaf_N.detach(), index, nll_grad_N, preference_grad_N)
    return ObjectiveValue(loss, nll_grad_N + preference_grad_N, sums)


def _two_terms(objective: Objective, logp_N: Tensor, index: ResponseIndex) -> tuple[Tensor, Tensor]:
    """The next-token term, and the sum of all others; what an objective does not have is 0."""
    terms = objective(logp_N, index)
    if not isinstance(terms, Mapping) or not all(isinstance(term, Tensor) and term.ndim == 0 for term in terms.values()):
        found = {name: tuple(getattr(term, "shape", ())) for name, term in terms.items()} if isinstance(terms, Mapping) else terms
        raise UserError(
            f"the objective gave {found!r}"[:300],
            where=type(objective).__name__,
            expected='named terms, each a tensor of one number: {"nll": …, "preference": …}',
        )
    zero = logp_N.new_zeros(())
    others = [term for name, term in terms.items() if name != "nll"]
    return terms.get("nll", zero), sum(others[1:], others[0]) if others else zero


def _grad(term: Tensor, leaf_N: Tensor) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(leaf_N)
    return torch.autograd.grad(term, leaf_N)[0]


def _metric_sums(logp_N: Tensor, index: ResponseIndex, nll_grad_N: Tensor, preference_grad_N: Tensor) -> Tensor:
    """The step's contribution to every name in `METRICS`, as one float64 vector on the device: no synchronisation here."""
    weight_N = index.nll_weight_N.to(logp_N.dtype)
    logp_R = mean_logp(logp_N, index)
    chosen_B, rejected_B = logp_R[index.chosen_B], logp_R[index.rejected_B]
    ratio_B = log_odds_ratio(chosen_B, rejected_B)
    log_sigmoid_B = F.logsigmoid(ratio_B)
    values = {
        "num_nll_tokens": weight_N.sum(),
        "nll_sum": -(logp_N * weight_N).sum(),
        "num_pairs": torch.ones_like(chosen_B).sum(),
        "odds_ratio_loss_sum": -log_sigmoid_B.sum(),
        "chosen_logp_sum": chosen_B.sum(),
        "rejected_logp_sum": rejected_B.sum(),
        "accuracy_sum": (chosen_B > rejected_B).sum(),
        "log_odds_ratio_sum": ratio_B.sum(),
        "log_sigmoid_sum": log_sigmoid_B.sum(),
        "nll_grad_square": nll_grad_N.square().sum(),
        "preference_grad_square": preference_grad_N.square().sum(),
        "chosen_tokens": index.num_tokens_R[index.chosen_B].sum(),
        "rejected_tokens": index.num_tokens_R[index.rejected_B].sum(),
    }
    return torch.stack([values[name].to(torch.float64) for name in METRICS])
