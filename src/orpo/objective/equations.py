"""What objectives are made of: log-odds, means and sums of log-probabilities, the next-token term.

Shape suffixes: N predicted tokens, R responses, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOGP = -1e-12
"""log(1 - p) has no value at p = 1: a log-probability above this counts as this, with gradient 0 (docs/semantics.md, "Log-odds")."""


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


Terms = Mapping[str, Tensor]
Objective = Callable[[Tensor, ResponseIndex], Terms]
"""(logp_N, index) -> named terms, differentiable scalars; the loss is their sum. The next-token term is called "nll", and whatever else
there is weighs as the preference term."""
