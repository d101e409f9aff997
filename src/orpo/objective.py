"""The equations: from token log-probabilities to a loss and its derivative. No model, no input or output.

An objective is a function of the log-probabilities of N predicted tokens and of index tensors that say which response each token
belongs to and which responses form pairs. It returns named terms whose sum is the loss; `evaluate` adds the derivative with respect to
every token log-probability, which is all an engine needs to go on to the model's weights.

Shape suffixes: N predicted tokens, R responses, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGP = -1e-12
"""log(1 - p) has no value at p = 1: a log-probability above this counts as this, with gradient 0 (docs/semantics.md, "Log-odds")."""

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
class ResponseIndex:
    """Which token belongs to which response, and which responses form pairs.

    Attributes:
        response_N: int64; the response of each predicted token, -1 for prompt tokens.
        nll_weight_N: float32; how often the token counts in the next-token loss (0: not at all).
        num_tokens_R: float32; predicted tokens of each response, at least 1.
        chosen_B, rejected_B: int64; the responses of each pair.
        num_nll_tokens: counted tokens of the whole optimizer step, over all micro-batches and ranks; a share of them per rank where
            gradients are averaged over ranks, so it need not be whole.
        num_pairs: pairs of the whole optimizer step, likewise; below 1 where a step has fewer pairs than ranks.
        reference_logp_sum_R: float32; summed log-probabilities under a frozen reference, for DPO; else None.
    """

    response_N: Tensor
    nll_weight_N: Tensor
    num_tokens_R: Tensor
    chosen_B: Tensor
    rejected_B: Tensor
    num_nll_tokens: float
    num_pairs: float
    reference_logp_sum_R: Tensor | None = None


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p.

    Source: ORPO (arXiv 2403.07691), equation 4.

    Args:
        logp: log-probabilities in nats, at most 0, any shape.

    Returns:
        float32 (float64 for float64 input), same shape. Finite, with a finite gradient, for every finite input: values above
        `MAX_LOGP` count as `MAX_LOGP`, with gradient 0.

    Example:
        >>> round(log_odds(torch.tensor(0.5).log()).item(), 6) == 0
        True
    """
    logp = logp if logp.dtype == torch.float64 else logp.float()
    # The clamp comes first: behind it no branch can see log(0), so no NaN can leak through an unselected one (trl's log1mexp does).
    clamped = logp.clamp(max=MAX_LOGP)
    return clamped - torch.log(-torch.expm1(clamped))


def log_odds_ratio(chosen_logp_B: Tensor, rejected_logp_B: Tensor) -> Tensor:
    """Log odds ratio of the chosen answers over the rejected ones.

    Source: ORPO (arXiv 2403.07691), equations 4 and 7.

    Args:
        chosen_logp_B: mean log-probability per answer token, nats, shape (B,), at most 0.
        rejected_logp_B: the same for the rejected answers.

    Returns:
        float32, shape (B,). Finite, with a finite gradient, for every finite input.
    """
    return log_odds(chosen_logp_B) - log_odds(rejected_logp_B)


def mean_logp(logp_N: Tensor, index: ResponseIndex) -> Tensor:
    """Mean log-probability per token of each response, shape (R,)."""
    return sum_logp(logp_N, index) / index.num_tokens_R.to(logp_N.dtype)


def sum_logp(logp_N: Tensor, index: ResponseIndex) -> Tensor:
    """Summed log-probability of each response, shape (R,). Prompt tokens (response -1) go to a spare slot that is cut off."""
    num_responses = index.num_tokens_R.shape[0]
    slots = logp_N.new_zeros(num_responses + 1)
    return slots.index_add(0, index.response_N + 1, logp_N)[1:]


def nll_term(logp_N: Tensor, index: ResponseIndex) -> Tensor:
    """Next-token loss of the step that these tokens contribute: sum of counted tokens / counted tokens of the whole step."""
    if index.num_nll_tokens == 0:
        return logp_N.sum() * 0.0
    return -(logp_N * index.nll_weight_N.to(logp_N.dtype)).sum() / index.num_nll_tokens


Terms = dict[str, Tensor]
Objective = Callable[[Tensor, ResponseIndex], Terms]
"""(logp_N, index) -> named terms, differentiable; the loss is their sum. The next-token term is called "nll"."""


@dataclass(frozen=True, slots=True)
class ORPO:
    """Next-token loss plus the weighted odds-ratio term: `L = NLL + orpo_alpha * mean(-log sigmoid(orpo_beta * log OR))`.

    Source: ORPO (arXiv 2403.07691), equations 6 and 7; `orpo_alpha` is the paper's lambda, and `orpo_beta` = 1 its form.

    Relations: with `orpo_alpha` = 0 this is SFT. To first order around log OR = 0 the gradient scales with `orpo_alpha * orpo_beta`.
    """

    orpo_alpha: float = 0.1
    orpo_beta: float = 1.0

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        logp_R = mean_logp(logp_N, index)
        ratio_B = log_odds_ratio(logp_R[index.chosen_B], logp_R[index.rejected_B])
        loss_B = -F.logsigmoid(self.orpo_beta * ratio_B)
        preference = self.orpo_alpha * loss_B.sum() / (index.num_pairs or 1.0)
        return {"nll": nll_term(logp_N, index), "preference": preference}


@dataclass(frozen=True, slots=True)
class SFT:
    """The next-token loss alone: the baseline that ORPO adds its term to."""

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        return {"nll": nll_term(logp_N, index), "preference": logp_N.sum() * 0.0}


@dataclass(frozen=True, slots=True)
class DPO:
    """Direct preference optimization with the sigmoid loss; needs `reference_logp_sum_R`.

    Source: DPO (arXiv 2305.18290), equation 7.
    """

    beta: float = 0.1

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        if index.reference_logp_sum_R is None:
            raise ValueError("DPO needs the reference log-probabilities of every response")
        ratio_R = sum_logp(logp_N, index) - index.reference_logp_sum_R.to(logp_N.dtype)
        margin_B = ratio_R[index.chosen_B] - ratio_R[index.rejected_B]
        preference = -F.logsigmoid(self.beta * margin_B).sum() / (index.num_pairs or 1.0)
        return {"nll": logp_N.sum() * 0.0, "preference": preference}


@dataclass(frozen=True, slots=True)
class SimPO:
    """Reference-free preference optimization on mean log-probabilities with a target margin.

    Source: SimPO (arXiv 2405.14734), equation 6; `gamma` is the target reward margin.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        logp_R = mean_logp(logp_N, index)
        margin_B = self.beta * (logp_R[index.chosen_B] - logp_R[index.rejected_B]) - self.gamma
        preference = -F.logsigmoid(margin_B).sum() / (index.num_pairs or 1.0)
        return {"nll": logp_N.sum() * 0.0, "preference": preference}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an objective says of some tokens.

    Attributes:
        loss: float32 scalar; these tokens' part of the step's loss.
        grad_N: float32; derivative of `loss` with respect to each token log-probability.
        sums: float64, one value per name in `METRICS`.
    """

    loss: Tensor
    grad_N: Tensor
    sums: Tensor


def evaluate(objective: Objective, logp_N: Tensor, index: ResponseIndex) -> Evaluation:
    """Loss, derivative and metrics of an objective at given token log-probabilities.

    Runs in float32 whatever the model's dtype (float64 input stays float64), on detached values: nothing here holds on to a model.
    """
    leaf_N = logp_N.detach().to(torch.float64 if logp_N.dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.enable_grad():
        terms = objective(leaf_N, index)
        nll_grad_N = _grad(terms["nll"], leaf_N)
        preference_grad_N = _grad(terms["preference"], leaf_N)
    loss = (terms["nll"] + terms["preference"]).detach()
    sums = _metric_sums(leaf_N.detach(), index, nll_grad_N, preference_grad_N)
    return Evaluation(loss, nll_grad_N + preference_grad_N, sums)


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
