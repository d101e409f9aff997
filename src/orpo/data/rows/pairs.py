"""Which pairs to train on, for prompts with several judged responses.

Responses carry scores (higher is better; None where one was not judged), and possibly direct votes between two of them. Ties make no
pair. The ORPO engine computes each response once, however many pairs it is in.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orpo.data.types import Pairs
from orpo.errors import DataError

POLICIES = ("best_worst", "all", "adjacent", "margin:M")

Votes = Mapping[tuple[int, int], int | None]
"""For responses (i, j), i < j: the index of the one preferred, or None for a tie."""


@dataclass(frozen=True, slots=True)
class PairPolicy:
    """`best_worst`: one pair. `all`: every decided pair. `adjacent`: each level of score with the next one below it.
    `margin`: every pair whose scores differ by at least `margin`.
    """

    kind: str
    margin: float = 0.0


def parse_policy(text: str) -> PairPolicy:
    """The policy that a configuration names.

    Raises:
        DataError: no such policy.
    """
    if text in {"best_worst", "all", "adjacent"}:
        return PairPolicy(text)
    kind, _, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        margin = float(number)
    except ValueError:
        margin = -1.0
    if kind == "margin" and 0 < margin < float("inf"):
        return PairPolicy("margin", margin)
    raise DataError(f"no pair policy {text!r}", where="pairs", expected=", ".join(POLICIES), mend="for example margin:1")


def choose_pairs(scores: Sequence[float | None], policy: PairPolicy, votes: Votes | None = None) -> Pairs:
    """(chosen, rejected) index pairs, the widest margin first, ties and unjudged responses left out.

    With votes, two responses that were compared directly pair only if the vote agrees with their scores; the policy `all` takes the
    votes as they are.
    """
    votes = votes or {}
    if policy.kind == "all" and votes:
        return tuple((winner, j if winner == i else i) for (i, j), winner in sorted(votes.items()) if winner is not None)
    candidates: list[tuple[float, int, int]] = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        high, low = scores[i], scores[j]
        if high is None or low is None or not high > low:
            continue
        if votes.get((min(i, j), max(i, j)), i) != i:
            continue
        candidates.append((high - low, i, j))
    candidates.sort(key=lambda item: (-item[0], item[1], item[2]))
    if policy.kind == "best_worst":
        candidates = candidates[:1]
    elif policy.kind == "margin":
        candidates = [item for item in candidates if item[0] >= policy.margin]
    elif policy.kind == "adjacent":
        levels = sorted({score for score in scores if score is not None}, reverse=True)
        step = {score: number for number, score in enumerate(levels)}
        candidates = [item for item in candidates if step[_known(scores[item[2]])] - step[_known(scores[item[1]])] == 1]
    return tuple((i, j) for _, i, j in candidates)


def _known(score: float | None) -> float:
    if score is None:
        raise AssertionError("a pair of unjudged responses")
    return score


def scores_of_votes(num_responses: int, votes: Votes) -> list[float]:
    """Wins minus losses of each response."""
    scores = [0.0] * num_responses
    for (i, j), winner in votes.items():
        if winner is not None:
            scores[winner] += 1
            scores[j if winner == i else i] -= 1
    return scores
