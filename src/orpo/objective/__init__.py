"""The equations: from token log-probabilities to a loss and its derivative. No model, no input or output.

An objective is a function of the log-probabilities of N predicted tokens and of index tensors that say which response each token
belongs to and which responses form pairs. It returns named terms whose sum is the loss; `evaluate` adds the derivative with respect to
every token log-probability, which is all an engine needs to go on to the model's weights.

`register` is the one place where an objective says what it is called, which options it has and what the metrics mean for it; an
objective from outside of the package registers itself the same way (docs/objectives.md).
"""

from orpo.objective.equations import (
    MAX_LOGP,
    Objective,
    ResponseIndex,
    Terms,
    log_odds,
    log_odds_ratio,
    mean_logp,
    nll_term,
    sum_logp,
)
from orpo.objective.known import DPO, ORPO, SFT, SimPO
from orpo.objective.registry import KINDS, ObjectiveKind, Option, kind_of, option, register
from orpo.objective.value import METRICS, ObjectiveValue, evaluate

__all__ = [
    "DPO",
    "KINDS",
    "MAX_LOGP",
    "METRICS",
    "ORPO",
    "SFT",
    "Objective",
    "ObjectiveKind",
    "ObjectiveValue",
    "Option",
    "ResponseIndex",
    "SimPO",
    "Terms",
    "evaluate",
    "kind_of",
    "log_odds",
    "log_odds_ratio",
    "mean_logp",
    "nll_term",
    "option",
    "register",
    "sum_logp",
]
