"""How well the choice can be predicted without reading the answers: length, markdown, refusals, opening phrase, language.

A preference model that finds such a shortcut needs no other. Each feature is judged by the accuracy of "the answer with more (or less) of
it wins", with the direction learned on four fifths of the prompts and measured on the last, five times over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from orpo.audit.surface import FEATURES
from orpo.audit.table import AuditTable

NUM_FOLDS = 5
MIN_PAIRS = 50
"""Pairs below which no accuracy is told: its error would be larger than what it says."""

WARN_ACCURACY = 0.60
WARN_RULE_ACCURACY = 0.85
MIN_RULE_PAIRS = 30
_SURE = 1.7
"""Half widths of the 95 % interval above chance from which an accuracy is no accident among two dozen features (3.3 standard errors)."""

_MOST_FITTED = 20_000


@dataclass(frozen=True, slots=True)
class Shortcut:
    """How well one feature predicts the choice.

    Attributes:
        accuracy: cross-validated, over all pairs; a pair that the feature does not tell apart counts one half.
        error: half the width of its 95 % interval.
        coverage: share of the pairs that the feature tells apart.
        rule_accuracy: accuracy on those alone.
        direction: what the chosen answer has: "more", "less", or the strongest values of a category.
    """

    feature: str
    accuracy: float
    error: float
    coverage: float
    rule_accuracy: float
    direction: str

    @property
    def is_warned_of(self) -> bool:
        """Whether a model could do well, on all pairs or on a part of them, by this feature alone."""
        is_clear = self.accuracy - _SURE * self.error > 0.5
        is_rule = self.rule_accuracy >= WARN_RULE_ACCURACY and self.coverage >= 0.02
        return is_clear and (self.accuracy >= WARN_ACCURACY or is_rule)

    def sentence(self) -> str:
        """The result in words."""
        side = " on the chosen side" if self.direction in {"more", "less"} else ""
        told = f" ({self.direction}{side})" if self.direction else ""
        rule = f" (where it differs, {self.coverage:.0%} of the pairs: {self.rule_accuracy:.2f})" if self.coverage < 0.9 else ""
        return f"{self.feature}{told}: accuracy {self.accuracy:.2f} ± {self.error:.2f}{rule}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "feature": self.feature,
            "accuracy": round(self.accuracy, 4),
            "error": round(self.error, 4),
            "coverage": round(self.coverage, 4),
            "rule_accuracy": round(self.rule_accuracy, 4),
            "direction": self.direction,
        }


def folds_of(prompt_keys: np.ndarray) -> np.ndarray:
    """The fold of each pair, all pairs of a prompt in one."""
    _, number = np.unique(prompt_keys, return_inverse=True)
    order = np.random.default_rng(0).permutation(int(number.max()) + 1 if len(number) else 0)
    return order[number] % NUM_FOLDS if len(number) else number


def _measured(feature: str, votes: np.ndarray, direction: str) -> Shortcut:
    """From one vote per pair: 1 for the chosen answer, -1 for the rejected one, 0 for no difference."""
    right = (1 + votes) / 2
    told = votes != 0
    error = 1.96 * float(np.std(right)) / math.sqrt(len(right))
    rule = float(np.mean(right[told])) if told.any() else 0.5
    if told.sum() < MIN_RULE_PAIRS:
        rule = 0.5
    return Shortcut(feature, float(np.mean(right)), error, float(np.mean(told)), rule, direction)


def _of_number(name: str, difference: np.ndarray, folds: np.ndarray) -> Shortcut:
    signs = np.sign(difference)
    votes = np.zeros(len(signs))
    for fold in range(NUM_FOLDS):
        is_held = folds == fold
        direction = 1.0 if signs[~is_held].sum() >= 0 else -1.0
        votes[is_held] = direction * signs[is_held]
    return _measured(name, votes, "more" if signs.sum() >= 0 else "less")


def _of_category(name: str, numbers: np.ndarray, folds: np.ndarray, name_of: Callable[[int], str]) -> Shortcut:
    """A category (opening phrase, language): each value's score is the log of its wins over its losses in the other folds."""
    values, codes = np.unique(numbers, return_inverse=True)
    codes = codes.reshape(numbers.shape)
    is_different = codes[:, 0] != codes[:, 1]
    votes = np.zeros(len(codes))
    for fold in range(NUM_FOLDS):
        is_held = folds == fold
        scores = _category_scores(codes[~is_held & is_different], len(values))
        votes[is_held] = np.sign(scores[codes[is_held, 0]] - scores[codes[is_held, 1]])
    scores = _category_scores(codes[is_different], len(values))
    counts = np.bincount(codes[is_different].ravel(), minlength=len(values))
    strong = np.argsort(-np.abs(scores) * (counts >= MIN_RULE_PAIRS // 3))[:3]
    told = [f"{'chosen' if scores[i] > 0 else 'rejected'}: {name_of(int(values[i]))!r}" for i in strong if abs(scores[i]) > 0.5]
    return _measured(name, votes, "; ".join(told))


def _category_scores(codes: np.ndarray, num_values: int) -> np.ndarray:
    wins = np.bincount(codes[:, 0], minlength=num_values)
    losses = np.bincount(codes[:, 1], minlength=num_values)
    return np.log((wins + 1.0) / (losses + 1.0))


def _together(difference: np.ndarray, folds: np.ndarray) -> Shortcut:
    """All numeric features in one logistic regression."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(difference))[:_MOST_FITTED]
    scale = np.std(difference[chosen], axis=0)
    x, fold = difference[chosen] / np.where(scale > 0, scale, 1), folds[chosen]
    flip = rng.choice([-1.0, 1.0], size=len(x))
    votes = np.zeros(len(x))
    for held in range(NUM_FOLDS):
        is_held = fold == held
        if not is_held.any() or len(set(flip[~is_held])) < 2:
            continue
        model = LogisticRegression(fit_intercept=False, C=0.5, max_iter=500).fit(x[~is_held] * flip[~is_held, None], flip[~is_held])
        votes[is_held] = np.sign(x[is_held] @ model.coef_[0])
    return _measured("all of the above together", votes, "")


def find_shortcuts(table: AuditTable) -> list[Shortcut]:
    """Every surface feature's accuracy, the strongest first; nothing where there are too few pairs."""
    if len(table.pair_rows) < MIN_PAIRS:
        return []
    folds = folds_of(table.prompt_keys[table.pair_rows])
    difference = table.chosen_features - table.rejected_features
    found = [_of_number(name, difference[:, i], folds) for i, name in enumerate(FEATURES)]
    for name, numbers, names in (
        ("opening phrase", table.openings, table.opening_names),
        ("closing phrase", table.closings, table.closing_names),
        ("language", table.languages, table.language_names),
    ):
        found.append(_of_category(name, numbers, folds, names.names.__getitem__))
    found.sort(key=lambda shortcut: -shortcut.accuracy)
    return [*found, _together(difference, folds)]
