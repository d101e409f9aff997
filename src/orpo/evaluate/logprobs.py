"""Log-probabilities of given answers and texts through the cache: what a broken run has scored is not scored again.

Token by token, since what is shown of a few pairs is decided when both models have been seen, and the first is gone by then.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from orpo.evaluate.cache import Cache
from orpo.inference.scores import TokenScores, choose_scoring_engine, score_tokens
from orpo.models.fingerprint import content_key

if TYPE_CHECKING:
    from orpo.data.types import TokenGroup
    from orpo.inference.ready import Subject

_PIECE_GROUPS = 64
"""Groups scored between two writes to the cache."""


def token_logps(
    subject: Subject, groups: Sequence[TokenGroup], cache: Cache, *, progress: Callable[[int, int], None] | None = None
) -> TokenScores:
    """Log-probabilities of every response's tokens; new ones are kept piece by piece.

    Args:
        subject: the model.
        groups: what to score.
        cache: of scores.
        progress: called with (groups done, groups).

    Returns:
        As `orpo.inference.scores.score_tokens`: per group, per response, float32, nats.
    """
    dtype = None if subject.compute_dtype is None else str(subject.compute_dtype)
    keys = [
        content_key(
            kind="logps",
            model=subject.identity,
            dtype=dtype,
            ids=[group.prompt_ids.tolist(), *(ids.tolist() for ids in group.response_ids)],
        )
        for group in groups
    ]
    todo = list({key: row for row, key in enumerate(keys) if key not in cache}.values())
    engine = choose_scoring_engine(subject.model, [groups[row] for row in todo]) if todo else None
    for start in range(0, len(todo), _PIECE_GROUPS):
        rows = todo[start : start + _PIECE_GROUPS]
        found = score_tokens(subject.model, [groups[row] for row in rows], engine=engine, compute_dtype=subject.compute_dtype)
        for row, responses in zip(rows, found, strict=True):
            cache.put(keys[row], [_packed(logps) for logps in responses])
        if progress is not None:
            progress(len(groups) - len(todo) + start + len(rows), len(groups))
    return [tuple(_unpacked(text) for text in cache.get(key)) for key in keys]


def means_of(logps: TokenScores) -> list[np.ndarray]:
    """Mean log-probability of every response, as `score_groups` gives it: per group float64, shape (R,)."""
    return [np.array([one.mean(dtype=np.float64) for one in responses]) for responses in logps]


def _packed(logps: np.ndarray) -> str:
    """Exact, and half as long as digits: a cache of some thousand pairs is read whole."""
    return base64.b64encode(np.asarray(logps, dtype="<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")
