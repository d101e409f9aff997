"""The objectives that come with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from orpo.objective.equations import ResponseIndex, Terms, log_odds_ratio, mean_logp, nll_term, sum_logp
from orpo.objective.registry import option, register


@register(
    "orpo",
    label="ORPO",
    formula="{nll} + {orpo_alpha} × odds-ratio term (orpo_beta {orpo_beta})",
    preference="odds-ratio term",
    has_nll=True,
    reward="orpo_alpha",  # TRL's convention
    strength="orpo_alpha",
    strengths=(0.1, 1.0),
    sweep=(0.05, 0.2, 0.5, 1.0, 2.0),
    about="next-token loss on the chosen answers plus a term that raises their odds over the rejected ones', in one stage, without a "
    "reference model",
    source="https://arxiv.org/abs/2403.07691",
)
@dataclass(frozen=True, slots=True)
class ORPO:
    """Next-token loss plus the weighted odds-ratio term: `L = NLL + orpo_alpha * mean(-log sigmoid(orpo_beta * log OR))`.

    Source: ORPO (arXiv 2403.07691), equations 6 and 7; `orpo_alpha` is the paper's lambda, and `orpo_beta` = 1 its form.

    Relations: with `orpo_alpha` = 0 this is SFT. To first order around log OR = 0 the gradient scales with `orpo_alpha * orpo_beta`.

    Example: `logp_N` and `index` are those of `ResponseIndex`.

        >>> from orpo.objective import ORPO
        >>> terms = ORPO(orpo_alpha=0.1)(logp_N, index)
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'nll': 0.7, 'preference': 0.0121}
    """

    orpo_alpha: float = option(
        0.1, help="Lambda: weight of the odds-ratio term.", at_least=0, mend="0 leaves the next-token loss alone; the paper uses 0.1"
    )
    orpo_beta: float = option(1.0, help="Temperature inside the odds-ratio term; 1 is the paper's form.", more_than=0)

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        logp_R = mean_logp(logp_N, index)
        ratio_B = log_odds_ratio(logp_R[index.chosen_B], logp_R[index.rejected_B])
        loss_B = -F.logsigmoid(self.orpo_beta * ratio_B)
        preference = self.orpo_alpha * loss_B.sum() / (index.num_pairs or 1.0)
        return {"nll": nll_term(logp_N, index), "preference": preference}


@register(
    "sft",
    label="SFT",
    formula="{nll}",
    preference=None,
    has_nll=True,
    needs_rejected=False,
    about="next-token loss on the chosen answers alone; the rejected ones were measured and not trained on",
)
@dataclass(frozen=True, slots=True)
class SFT:
    """The next-token loss alone: the baseline that ORPO adds its term to.

    Example: `logp_N` and `index` are those of `ResponseIndex`.

        >>> from orpo.objective import SFT
        >>> SFT()(logp_N, index)
        {'nll': tensor(0.7000)}
    """

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        return {"nll": nll_term(logp_N, index)}


@register(
    "dpo",
    label="DPO",
    formula="-log sigmoid of {beta} × the difference of the answers' log-ratios to the reference",
    strength="beta",
    strengths=(0.05, 0.1),
    sweep=(0.01, 0.05, 0.1, 0.3, 1.0),
    needs_reference=True,
    about="the log-ratio to a frozen reference raised for the chosen answers over the rejected ones'",
    source="https://arxiv.org/abs/2305.18290",
)
@dataclass(frozen=True, slots=True)
class DPO:
    """Direct preference optimization with the sigmoid loss; needs `reference_logp_sum_R`.

    Source: DPO (arXiv 2305.18290), equation 7.

    Raises:
        ValueError: when called without the reference's log-probabilities.

    Example: `logp_N` and `index` are those of `ResponseIndex`; with a reference that thinks the same, nothing is preferred: log 2.

        >>> from dataclasses import replace
        >>> from orpo.objective import DPO
        >>> DPO(beta=0.1)(logp_N, replace(index, reference_logp_sum_R=torch.tensor([-1.2, -2.0])))
        {'preference': tensor(0.6931)}
    """

    beta: float = option(0.1, help="Strength of the pull to the reference.", more_than=0)

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        if index.reference_logp_sum_R is None:
            raise ValueError("DPO needs the reference log-probabilities of every response")
        ratio_R = sum_logp(logp_N, index) - index.reference_logp_sum_R.to(logp_N.dtype)
        margin_B = ratio_R[index.chosen_B] - ratio_R[index.rejected_B]
        preference = -F.logsigmoid(self.beta * margin_B).sum() / (index.num_pairs or 1.0)
        return {"preference": preference}


@register(
    "simpo",
    label="SimPO",
    formula="-log sigmoid of ({beta} × the difference of the answers' mean log-probabilities - {margin})",
    reward="beta",
    strength="beta",
    strengths=(2.0, 10.0),
    about="the mean log-probability per token raised for the chosen answers over the rejected ones' by a target margin, without a "
    "reference model",
    source="https://arxiv.org/abs/2405.14734",
)
@dataclass(frozen=True, slots=True)
class SimPO:
    """Reference-free preference optimization on mean log-probabilities with a target margin.

    Source: SimPO (arXiv 2405.14734), equation 6; `gamma` is the target reward margin. Unset it is half of beta: its authors tune the
    ratio of the two, in the neighbourhood of 0.5 (appendix on hyperparameters), so that another beta needs another gamma.

    Example: `logp_N` and `index` are those of `ResponseIndex`; -log sigmoid(2 · (-0.6 + 2.0) - 1).

        >>> from orpo.objective import SimPO
        >>> SimPO(beta=2.0)(logp_N, index)
        {'preference': tensor(0.1530)}
    """

    beta: float = option(2.0, help="Scale of the implicit reward.", more_than=0)
    gamma: float | None = option(None, help="Target margin of the rewards; unset: half of simpo_beta.", at_least=0)

    @property
    def margin(self) -> float:
        """The target margin that counts."""
        return self.beta / 2 if self.gamma is None else self.gamma

    def __call__(self, logp_N: Tensor, index: ResponseIndex) -> Terms:
        logp_R = mean_logp(logp_N, index)
        margin_B = self.beta * (logp_R[index.chosen_B] - logp_R[index.rejected_B]) - self.margin
        preference = -F.logsigmoid(margin_B).sum() / (index.num_pairs or 1.0)
        return {"preference": preference}
