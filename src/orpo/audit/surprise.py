"""Pairs whose labels a model doubts: candidates for annotation errors.

A model that can tell the pairs of a data set apart gives most chosen answers the higher mean log-probability; the pairs that it sees the
other way round most clearly are the ones to read again. A model that cannot tell them apart ranks at random, or worse: small models as
they stand often prefer the shorter or the duller answer. So the first thing measured is whether it can, and where it cannot, there is no
ranking.

Cross-fitted, the model is trained on the other folds, as in confident learning (Northcutt et al., arXiv 1911.00068): each pair is judged
by a model that never saw its label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orpo.data.types import TokenGroup, Where
from orpo.system.intervals import wilson

Score = Callable[[Sequence[TokenGroup]], Sequence[np.ndarray]]
"""Groups -> for each, the mean log-probability of its responses, in nats."""

FitAndScore = Callable[[Sequence[TokenGroup], Sequence[TokenGroup]], Sequence[np.ndarray]]
"""(groups to train on, held-out groups) -> as Score, for the held-out ones, by a model trained on the former alone."""

MIN_PAIRS = 50
SUSPECT_SHARE = 0.2
"""The part of the pairs that is ranked; beyond it the chance of a flip falls to that of any pair."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A pair that the model sees the other way round.

    Attributes:
        margin: mean log-probability of the chosen minus that of the rejected answer; negative.
    """

    where: Where
    pair: tuple[int, int]
    chosen_logp: float
    rejected_logp: float

    @property
    def margin(self) -> float:
        return self.chosen_logp - self.rejected_logp

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        logps = {"chosen_logp": round(self.chosen_logp, 4), "rejected_logp": round(self.rejected_logp, 4)}
        return {"place": str(self.where), "pair": list(self.pair), **logps}


@dataclass(frozen=True, slots=True)
class Surprise:
    """What a model says about the labels.

    Attributes:
        accuracy: share of the pairs whose chosen answer it finds likelier.
        lower, upper: 95 % interval of the accuracy (Wilson).
        num_pairs: pairs that were scored.
        method: "as it stands" or "cross-fitted, K folds".
        suspects: ranked, the most surprising first; empty where the model cannot tell the pairs apart.
        margins: of all pairs.
    """

    accuracy: float
    lower: float
    upper: float
    num_pairs: int
    method: str
    suspects: list[Suspect]
    margins: np.ndarray

    @property
    def can_tell(self) -> bool:
        """Whether the accuracy is above one half beyond doubt."""
        return self.num_pairs >= MIN_PAIRS and self.lower > 0.5

    def sentence(self) -> str:
        """The result in words."""
        interval = f"{self.accuracy:.3f} (95 % interval {self.lower:.3f} to {self.upper:.3f}, {self.num_pairs} pairs, {self.method})"
        if self.num_pairs < MIN_PAIRS:
            return f"{self.num_pairs} pairs are too few to measure whether the model can tell them apart; no ranking."
        if not self.can_tell:
            mend = (
                "A larger model, or more rows"
                if self.method.startswith("cross-fitted")
                else "Cross-fitting (--cross_fit 5), or a larger model"
            )
            return (
                f"The model cannot tell the pairs of this set apart: accuracy {interval}. A ranking by it would find flipped labels no "
                f"better than chance, so there is none. {mend}, may do better."
            )
        return f"The model prefers the chosen answer with accuracy {interval}; the pairs it sees the other way round are ranked."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "method": self.method,
            "accuracy": round(self.accuracy, 4),
            "interval": [round(self.lower, 4), round(self.upper, 4)],
            "num_pairs": self.num_pairs,
            "can_tell": self.can_tell,
            "sentence": self.sentence(),
            "suspects": [
                {
                    "place": str(s.where),
                    "pair": list(s.pair),
                    "chosen_logp": round(s.chosen_logp, 4),
                    "rejected_logp": round(s.rejected_logp, 4),
                }
                for s in self.suspects
            ],
        }


def measure(groups: Sequence[TokenGroup], scores: Sequence[np.ndarray], method: str) -> Surprise:
    """Accuracy and, where the model can tell pairs apart, the ranking.

    Args:
        groups: with pairs.
        scores: per group, the mean log-probability of each response.
    """
    pairs = [
        Suspect(group.where, (i, j), float(logps[i]), float(logps[j]))
        for group, logps in zip(groups, scores, strict=True)
        for i, j in group.pairs
    ]
    margins = np.asarray([pair.margin for pair in pairs])
    num_right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    lower, upper = wilson(num_right, len(pairs))
    result = Surprise(num_right / len(pairs) if pairs else 0.5, lower, upper, len(pairs), method, [], margins)
    if not result.can_tell:
        return result
    most = math.ceil(SUSPECT_SHARE * len(pairs))
    suspects = sorted((pair for pair in pairs if pair.margin < 0), key=lambda pair: pair.margin)[:most]
    return replace(result, suspects=suspects)


def as_it_stands(groups: Sequence[TokenGroup], score: Score) -> Surprise:
    """The labels as the model without any training on this set sees them."""
    groups = [group for group in groups if group.pairs]
    return measure(groups, score(groups), "as it stands")


def folds_by_prompt(groups: Sequence[TokenGroup], num_folds: int, seed: int = 0) -> np.ndarray:
    """The fold of each group; groups with the same prompt ids are in one fold, so that no held-out prompt was trained on."""
    numbers: dict[bytes, int] = {}
    prompts = [numbers.setdefault(group.prompt_ids.tobytes(), len(numbers)) for group in groups]
    order = np.random.default_rng(seed).permutation(len(numbers))
    return order[np.asarray(prompts, dtype=np.int64)] % num_folds


def cross_fitted(groups: Sequence[TokenGroup], fit_and_score: FitAndScore, num_folds: int = 5, seed: int = 0) -> Surprise:
    """The labels as models trained on the other folds see them.

    Raises:
        ValueError: fewer than two folds.
    """
    if num_folds < 2:
        raise ValueError(f"num_folds is {num_folds}; cross-fitting needs at least two")
    groups = [group for group in groups if group.pairs]
    folds = folds_by_prompt(groups, num_folds, seed)
    scores: list[np.ndarray] = [np.empty(0)] * len(groups)
    for fold in range(num_folds):
        held = np.flatnonzero(folds == fold)
        rest = np.flatnonzero(folds != fold)
        if len(held) == 0:
            continue
        found = fit_and_score([groups[i] for i in rest], [groups[i] for i in held])
        for index, logps in zip(held, found, strict=True):
            scores[index] = np.asarray(logps)
    return measure(groups, scores, f"cross-fitted, {num_folds} folds")
