"""Which answers of a prompt become pairs: a pure function of their texts and scores."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from orpo.errors import UserError

WAYS = ("best_worst", "best_low", "right_wrong", "all")
NUM_DEVIATIONS = 2.0
"""The rejected answer of `best_low` is the one nearest to the mean less so many standard deviations (arXiv 2502.16825, where it beats the
worst answer as samples become many)."""
_COMPARED_CHARS = 4000
_WORDS = re.compile(r"\w+|[^\w \t]")

LEFT_OUT: dict[str, str] = {
    "no_score": "answers that a scorer gave no number",
    "empty_answer": "answers that are blank",
    "cut_answer": "answers cut at max_new_tokens",
    "identical_answer": "answers that repeat another one of their prompt",
    "prompt_unusable": "prompts that cannot be asked (the chat template fails, or no room is left for an answer)",
    "one_answer": "prompts with fewer than two different answers",
    "no_right": "prompts without a right answer",
    "no_wrong": "prompts without a wrong answer",
    "only_cut": "prompts whose answers were all cut at max_new_tokens",
    "tie": "pairs with equal scores",
    "margin": "pairs below min_margin",
    "near_identical": "pairs of nearly the same words",
    "lengths": "pairs whose lengths differ by more than max_length_ratio",
    "over_max_pairs": "pairs beyond max_pairs of a prompt",
}
"""Everything that does not become a pair is counted under one of these."""


@dataclass(frozen=True, slots=True)
class Rated:
    """An answer as the choice sees it.

    Attributes:
        score: None where a scorer gave none.
        is_cut: it was cut at `max_new_tokens`, so that its end is not the model's.
    """

    text: str
    score: float | None
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class PairRule:
    """How pairs are chosen.

    Attributes:
        choose: `best_worst`; `best_low`, the best against the one nearest to mean - 2 standard deviations; `right_wrong`, answers of at
            least `right_at` against those below it, of similar length; `all`, every answer against every worse one, widest margin first.
        min_margin: least difference of scores. Equal scores are never a pair.
        max_pairs: most pairs of a prompt.
        max_length_ratio: most the longer answer may be of the shorter, in characters; None for no bound.
        max_similarity: pairs whose words agree to a larger part (0 to 1) count as the same answer.
        right_at: from this score on an answer is right.
        cut: what becomes of answers cut at max_new_tokens: `rejected` (never chosen), `drop`, or `keep`.
    """

    choose: Literal["best_worst", "best_low", "right_wrong", "all"] = "best_worst"
    min_margin: float = 0.0
    max_pairs: int = 1
    max_length_ratio: float | None = None
    max_similarity: float = 0.95
    right_at: float = 1.0
    cut: Literal["rejected", "drop", "keep"] = "rejected"

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: a value out of range, by its key.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "choose": (self.choose in WAYS, f"one of {', '.join(WAYS)}"),
            "min_margin": (0 <= self.min_margin < math.inf, "0 or more"),
            "max_pairs": (self.max_pairs >= 1, "at least 1"),
            "max_length_ratio": (self.max_length_ratio is None or self.max_length_ratio >= 1, "at least 1, 2 for instance"),
            "max_similarity": (0 < self.max_similarity <= 1, "above 0, at most 1"),
            "right_at": (math.isfinite(self.right_at), "a number"),
            "cut": (self.cut in ("rejected", "drop", "keep"), "rejected, drop or keep"),
        }
        for key, (is_right, expected) in ranges.items():
            if not is_right:
                raise UserError(f"found {getattr(self, key)!r}", where=key, expected=expected)


def choose_pairs_of(answers: Sequence[Rated], rule: PairRule) -> tuple[list[tuple[int, int]], Counter[str]]:
    """The pairs of one prompt's answers.

    Returns:
        (chosen, rejected) as places in `answers`, and what was left out, by reasons of `LEFT_OUT`.
    """
    left_out: Counter[str] = Counter()
    usable = _usable(answers, rule, left_out)
    if len(usable) < 2:
        left_out["one_answer"] += 1
        return [], left_out
    winners = [place for place in usable if rule.cut == "keep" or not answers[place].is_cut]
    if not winners:
        left_out["only_cut"] += 1
        return [], left_out
    scores = {place: float(answers[place].score or 0.0) for place in usable}
    if rule.choose == "right_wrong":
        sides = {
            "no_right": [place for place in winners if scores[place] >= rule.right_at],
            "no_wrong": [place for place in usable if scores[place] < rule.right_at],
        }
        if missing := [side for side, places in sides.items() if not places]:
            left_out[missing[0]] += 1
            return [], left_out
    pairs: list[tuple[int, int]] = []
    is_ranked = rule.choose in ("best_worst", "best_low")  # what comes after max_pairs was never meant
    for chosen, rejected in _WAYS[rule.choose](answers, winners, scores, rule):
        if is_ranked and len(pairs) >= rule.max_pairs:
            break
        reason = _refused(answers[chosen], answers[rejected], scores[chosen] - scores[rejected], rule)
        if reason is None and len(pairs) >= rule.max_pairs:
            reason = "over_max_pairs"
        if reason is None:
            pairs.append((chosen, rejected))
        else:
            left_out[reason] += 1
    return pairs, left_out


def _usable(answers: Sequence[Rated], rule: PairRule, left_out: Counter[str]) -> list[int]:
    seen: set[str] = set()
    usable = []
    for place, answer in enumerate(answers):
        words = answer.text.strip()
        reason = None
        if not words:
            reason = "empty_answer"
        elif answer.score is None:
            reason = "no_score"
        elif answer.is_cut and rule.cut == "drop":
            reason = "cut_answer"
        elif words in seen:
            reason = "identical_answer"
        if reason is None:
            seen.add(words)
            usable.append(place)
        else:
            left_out[reason] += 1
    return usable


Way = Callable[[Sequence[Rated], Sequence[int], dict[int, float], PairRule], Iterator[tuple[int, int]]]


def _best_worst(answers: Sequence[Rated], winners: Sequence[int], scores: dict[int, float], rule: PairRule) -> Iterator[tuple[int, int]]:
    """The best against the worst, then the second best against the second worst, and so on while they are two."""
    best = sorted(winners, key=lambda place: (-scores[place], place))
    worst = sorted(scores, key=lambda place: (scores[place], -place))
    used: set[int] = set()
    for chosen, rejected in zip(best, worst, strict=False):
        if chosen == rejected or chosen in used or rejected in used:
            break
        used |= {chosen, rejected}
        yield chosen, rejected


def _best_low(answers: Sequence[Rated], winners: Sequence[int], scores: dict[int, float], rule: PairRule) -> Iterator[tuple[int, int]]:
    best = min(winners, key=lambda place: (-scores[place], place))
    mean = sum(scores.values()) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores.values()) / len(scores))
    low = mean - NUM_DEVIATIONS * deviation
    for place in sorted(scores, key=lambda place: (abs(scores[place] - low), place)):
        if place != best:
            yield best, place


def _right_wrong(answers: Sequence[Rated], winners: Sequence[int], scores: dict[int, float], rule: PairRule) -> Iterator[tuple[int, int]]:
    """Right against wrong, those of similar length first, so that length is not what is learnt; no answer twice while others are left."""
    right = [place for place in winners if scores[place] >= rule.right_at]
    wrong = [place for place in scores if scores[place] < rule.right_at]
    ways = sorted(itertools.product(right, wrong), key=lambda way: (_length_ratio(answers[way[0]], answers[way[1]]), way))
    used: set[int] = set()
    later = []
    for way in ways:
        if used & set(way):
            later.append(way)
        else:
            used |= set(way)
            yield way
    yield from later


def _all(answers: Sequence[Rated], winners: Sequence[int], scores: dict[int, float], rule: PairRule) -> Iterator[tuple[int, int]]:
    ways = [way for way in itertools.product(winners, scores) if scores[way[0]] > scores[way[1]]]
    ties = len({scores[place] for place in scores}) == 1
    yield from sorted(ways, key=lambda way: (scores[way[1]] - scores[way[0]], way))
    if ties:  # one pair, so that the tie is counted
        yield winners[0], next(place for place in scores if place != winners[0])


_WAYS: dict[str, Way] = {"best_worst": _best_worst, "best_low": _best_low, "right_wrong": _right_wrong, "all": _all}


def _refused(chosen: Rated, rejected: Rated, margin: float, rule: PairRule) -> str | None:
    if margin <= 0:
        return "tie"
    if margin < rule.min_margin:
        return "margin"
    if rule.max_length_ratio is not None and _length_ratio(chosen, rejected) > rule.max_length_ratio:
        return "lengths"
    return "near_identical" if similarity(chosen.text, rejected.text, rule.max_similarity) > rule.max_similarity else None


def _length_ratio(first: Rated, second: Rated) -> float:
    lengths = sorted((len(first.text.strip()), len(second.text.strip())))
    return lengths[1] / max(1, lengths[0])


def similarity(first: str, second: str, least: float = 0.0) -> float:
    """The share of words, signs and line ends that two texts have in common, in order; 1 for the same ones.

    Args:
        least: where the share cannot reach it, a bound of the share is enough.
    """
    one, other = (_WORDS.findall(text[:_COMPARED_CHARS]) for text in (first, second))
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    bound = matcher.quick_ratio()
    return bound if bound <= least else matcher.ratio()
