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

    Example: a prompt token, a chosen answer of two tokens, a rejected answer of one. The other examples of this page use it.

        >>> import torch
        >>> from orpo.objective import ResponseIndex
        >>> index = ResponseIndex(
        ...     response_N=torch.tensor([-1, 0, 0, 1]),
        ...     nll_weight_N=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        ...     num_tokens_R=torch.tensor([2.0, 1.0]),
        ...     chosen_B=torch.tensor([0]),
        ...     rejected_B=torch.tensor([1]),
        ...     num_nll_tokens=3,
        ...     num_pairs=1,
        ... )
        >>> logp_N = torch.tensor([-0.9, -0.5, -0.7, -2.0])  # nats
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
        >>> from orpo.objective import log_odds
        >>> log_odds(torch.tensor([0.8]).log())  # odds 4: log 4
        tensor([1.3863])
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

    Example:
        >>> from orpo.objective import log_odds_ratio
        >>> log_odds_ratio(torch.tensor([0.8]).log(), torch.tensor([0.5]).log())  # odds 4 over odds 1: log 4
        tensor([1.3863])
    """
    return log_odds(chosen_logp_B) - log_odds(rejected_logp_B)


def mean_logp(logp_N: Tensor, index: ResponseIndex) -> Tensor:
    """Mean log-probability per token of each response, shape (R,).

    Args:
        logp_N: log-probability of each predicted token, nats, float32 or float64.
        index: which response each token belongs to.

    Returns:
        Nats per token, in the dtype of `logp_N`; tokens of the prompt count nowhere. Differentiable.

    Example: `logp_N` and `index` are those of `ResponseIndex`.

        >>> from orpo.objective import mean_logp
        >>> mean_logp(logp_N, index)
        tensor([-0.6000, -2.0000])
    """
    return sum_logp(logp_N, index) / index.num_tokens_R.to(logp_N.dtype)


def sum_logp(logp_N: Tensor, index: ResponseIndex) -> Tensor:
    """Summed log-probability of each response, shape (R,). Prompt tokens (response -1) go to a spare slot that is cut off.

    Arguments as of `mean_logp`.

    Example: `logp_N` and `index` are those of `ResponseIndex`.

        >>> from orpo.objective import sum_logp
        >>> sum_logp(logp_N, index)
        tensor([-1.2000, -2.0000])
    """
    num_responses = index.num_tokens_R.shape[0]
    slots = logp_N.new_zeros(num_responses + 1)
    return slots.index_add(0, index.response_N + 1, logp_N)[1:]


def nll_term(logp_N: Tensor, index: ResponseIndex) -> Tensor:
    """Next-token loss of the step that these tokens contribute: sum of counted tokens / counted tokens of the whole step.

    Source: ORPO (arXiv 2403.07691), the first term of equation 6, over prompt and chosen answer as its authors train it.

    Returns:
        A scalar in the dtype of `logp_N`, nats per token; 0 with a gradient of 0 where the step counts no token.

    Example: `logp_N` and `index` are those of `ResponseIndex`; the rejected answer counts nothing, so (0.9 + 0.5 + 0.7) / 3.

        >>> from orpo.objective import nll_term
        >>> nll_term(logp_N, index)
        tensor(0.7000)
    """
    if index.num_nll_tokens == 0:
        return logp_N.sum() * 0.0
    return -(logp_N * index.nll_weight_N.to(logp_N.dtype)).sum() / index.num_nll_tokens


Terms = Mapping[str, Tensor]
Objective = Callable[[Tensor, ResponseIndex], Terms]
"""(logp_N, index) -> named terms, differentiable scalars; the loss is their sum. The next-token term is called "nll", and whatever else
there is weighs as the preference term."""
