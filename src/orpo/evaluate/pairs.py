"""Held-out preference pairs: does the model prefer the chosen answer, by how much, and which of the two did training move?

`score_groups` gives mean log-probabilities per answer token; `summarise`, `slice_pairs` and `paired_difference` say what they mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.errors import UserError
from orpo.evaluate.bootstrap import NUM_BOOTSTRAP, Estimate, estimate_means, estimate_share, estimate_share_change
from orpo.inference.scores import TokenScores, score_groups, score_tokens

if TYPE_CHECKING:
    from orpo.data.types import TokenGroup

__all__ = [
    "PairDifference",
    "PairSummary",
    "TokenScores",
    "log_odds",
    "paired_difference",
    "score_groups",
    "score_tokens",
    "slice_pairs",
    "summarise",
]

LENGTH_SLICE = "length_difference"
MAX_SLICES = 12
"""A column with more values than this is cut into quarters if numeric; otherwise its rarer values are taken together."""
_NEAR = 1.25
"""Answers are about equally long up to this ratio of their tokens."""


@dataclass(frozen=True, slots=True)
class PairSummary:
    """What a model thinks of pairs. Means over pairs; intervals over prompts (of accuracies Wilson's, where each prompt has one pair).

    Attributes:
        accuracy: share of pairs whose chosen answer has the higher mean log-probability; a tie is a miss.
        log_odds_accuracy: the same by log-odds. Log-odds rise with the log-probability, so the two part only where a probability is 1.
        margin: chosen minus rejected mean log-probability, nats per token.
        log_odds_ratio: log odds of the chosen answer minus those of the rejected one: what ORPO trains.
        chosen_logp, rejected_logp: mean log-probabilities, nats per token.
    """

    num_pairs: int
    num_prompts: int
    accuracy: Estimate
    log_odds_accuracy: Estimate
    margin: Estimate
    log_odds_ratio: Estimate
    chosen_logp: Estimate
    rejected_logp: Estimate

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return _facts(self)


@dataclass(frozen=True, slots=True)
class PairDifference:
    """How the same pairs moved from one model to another (after minus before), with paired intervals."""

    num_pairs: int
    num_prompts: int
    accuracy: Estimate
    margin: Estimate
    log_odds_ratio: Estimate
    chosen_logp: Estimate
    rejected_logp: Estimate

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return _facts(self)


def _facts(summary: PairSummary | PairDifference) -> dict[str, Any]:
    values = {field.name: getattr(summary, field.name) for field in fields(summary)}
    return {name: value.to_dict() if isinstance(value, Estimate) else value for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of all groups in a row."""

    chosen_B: np.ndarray
    rejected_B: np.ndarray
    prompts: list[bytes]


def summarise(
    groups: Sequence[TokenGroup], scores: Sequence[np.ndarray], *, seed: int = 0, num_bootstrap: int = NUM_BOOTSTRAP
) -> PairSummary:
    """Accuracy, margin and log-probabilities, each with an interval.

    Args:
        groups: the scored groups; those without a pair count for nothing.
        scores: from `score_groups`, in the same order.
        seed, num_bootstrap: of the intervals.

    Raises:
        UserError: no group has a pair.

    Example: `groups` and `scores` are those of `score_groups`.

        >>> from orpo.evaluate.pairs import summarise
        >>> summary = summarise(groups, scores)
        >>> summary.num_pairs, 0 <= summary.accuracy.value <= 1
        (12, True)
    """
    pairs = _pairs(groups, scores)
    columns = np.column_stack([_column(pairs, name) for name in _COLUMNS])
    estimates = dict(zip(_COLUMNS, estimate_means(columns, pairs.prompts, seed=seed, num_bootstrap=num_bootstrap), strict=True))
    for name in _SHARES:
        estimates[name] = estimate_share(_column(pairs, name), pairs.prompts, seed=seed, num_bootstrap=num_bootstrap)
    return PairSummary(len(pairs.prompts), len(set(pairs.prompts)), **estimates)


def paired_difference(
    groups: Sequence[TokenGroup],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    *,
    seed: int = 0,
    num_bootstrap: int = NUM_BOOTSTRAP,
) -> PairDifference:
    """What changed between two models on the same groups; the interval is that of the change itself.

    Args:
        groups: the scored groups.
        before, after: from `score_groups`, of two models, in the order of `groups`.
        seed, num_bootstrap: of the intervals.

    Raises:
        UserError: no group has a pair.

    Example: `groups` and `scores` are those of `score_groups`; a model against itself has not moved.

        >>> from orpo.evaluate.pairs import paired_difference
        >>> paired_difference(groups, scores, scores).margin.value
        0.0
    """
    first, second = _pairs(groups, before), _pairs(groups, after)
    names = [field.name for field in fields(PairDifference)][2:]
    columns = np.column_stack([_column(second, name) - _column(first, name) for name in names])
    estimates = dict(zip(names, estimate_means(columns, first.prompts, seed=seed, num_bootstrap=num_bootstrap), strict=True))
    before_right, after_right = (_column(side, "accuracy").tolist() for side in (first, second))
    estimates["accuracy"] = estimate_share_change(before_right, after_right, first.prompts, seed=seed, num_bootstrap=num_bootstrap)
    return PairDifference(len(first.prompts), len(set(first.prompts)), **estimates)


def slice_pairs(
    groups: Sequence[TokenGroup],
    scores: Sequence[np.ndarray],
    by: str,
    *,
    seed: int = 0,
    num_bootstrap: int = NUM_BOOTSTRAP,
) -> dict[str, PairSummary]:
    """The summary for parts of the pairs.

    Args:
        by: "length_difference" (chosen shorter, about equal, chosen longer, in tokens), or the name of a column of the rows.

    Raises:
        UserError: no row has the column.

    Example: `groups` and `scores` are those of `score_groups`.

        >>> from orpo.evaluate.pairs import slice_pairs
        >>> parts = slice_pairs(groups, scores, "length_difference")
        >>> sum(part.num_pairs for part in parts.values())
        12
    """
    labels = _length_labels(groups) if by == LENGTH_SLICE else _column_labels(groups, by)
    parts: dict[str, list[tuple[TokenGroup, np.ndarray]]] = {}
    for group, score, label_per_pair in zip(groups, scores, labels, strict=True):
        for label in dict.fromkeys(label_per_pair):
            kept = tuple(pair for pair, own in zip(group.pairs, label_per_pair, strict=True) if own == label)
            parts.setdefault(label, []).append((_with_pairs(group, kept), score))
    return {
        label: summarise([group for group, _ in rows], [score for _, score in rows], seed=seed, num_bootstrap=num_bootstrap)
        for label, rows in sorted(parts.items())
    }


def log_odds(logp: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) from log p in float64, clamped as in training."""
    from orpo.objective import MAX_LOGP

    clamped = np.minimum(np.asarray(logp, dtype=np.float64), MAX_LOGP)
    return clamped - np.log(-np.expm1(clamped))


_COLUMNS = ("accuracy", "log_odds_accuracy", "margin", "log_odds_ratio", "chosen_logp", "rejected_logp")
_SHARES = ("accuracy", "log_odds_accuracy")


def _column(pairs: _Pairs, name: str) -> np.ndarray:
    """One number per pair; the names are those of `PairSummary`."""
    chosen_B, rejected_B = pairs.chosen_B, pairs.rejected_B
    if name == "accuracy":
        return (chosen_B > rejected_B).astype(np.float64)
    if name == "log_odds_accuracy":
        return (log_odds(chosen_B) > log_odds(rejected_B)).astype(np.float64)
    if name == "margin":
        return chosen_B - rejected_B
    if name == "log_odds_ratio":
        return log_odds(chosen_B) - log_odds(rejected_B)
    return chosen_B if name == "chosen_logp" else rejected_B


def _pairs(groups: Sequence[TokenGroup], scores: Sequence[np.ndarray]) -> _Pairs:
    chosen: list[float] = []
    rejected: list[float] = []
    prompts: list[bytes] = []
    for group, score_R in zip(groups, scores, strict=True):
        for winner, loser in group.pairs:
            chosen.append(float(score_R[winner]))
            rejected.append(float(score_R[loser]))
            # By content: pairs of one prompt may stand in several rows, and are drawn together all the same.
            prompts.append(group.prompt_ids.tobytes())
    if not prompts:
        raise UserError("there is no pair to evaluate", expected="rows with a chosen and a rejected answer")
    return _Pairs(np.array(chosen), np.array(rejected), prompts)


def _with_pairs(group: TokenGroup, pairs: tuple[tuple[int, int], ...]) -> TokenGroup:
    from dataclasses import replace

    return replace(group, pairs=pairs)


def _length_labels(groups: Sequence[TokenGroup]) -> list[list[str]]:
    def label(chosen: int, rejected: int) -> str:
        if max(chosen, rejected) <= _NEAR * min(chosen, rejected):
            return "about equal"
        return "chosen longer" if chosen > rejected else "chosen shorter"

    return [[label(len(group.response_ids[a]), len(group.response_ids[b])) for a, b in group.pairs] for group in groups]


def _column_labels(groups: Sequence[TokenGroup], column: str) -> list[list[str]]:
    values = [group.columns.get(column) for group in groups]
    known = [value for value in values if value is not None]
    if not known:
        names = sorted({name for group in groups for name in group.columns})
        raise UserError(
            f"no row has a column {column!r} to slice by", where="slice", expected=", ".join([LENGTH_SLICE, *names]) + " (what there is)"
        )
    counts = Counter(str(value) for value in known)
    if len(counts) > MAX_SLICES and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        edges = np.quantile(np.asarray(known, dtype=np.float64), [0.25, 0.5, 0.75])
        bounds = ["", *(f"{edge:g}" for edge in edges), ""]

        def name(value: Any) -> str:
            quarter = int(np.searchsorted(edges, float(value)))
            return f"quarter {quarter + 1} ({bounds[quarter]}..{bounds[quarter + 1]})"
    else:
        common = {value for value, _ in counts.most_common(MAX_SLICES)}

        def name(value: Any) -> str:
            return str(value) if str(value) in common else "other values"

    return [["no value" if value is None else name(value)] * len(group.pairs) for group, value in zip(groups, values, strict=True)]
