"""Log-probabilities of given answers and texts through the cache: what a broken run has scored is not scored again.

Token by token, since what is shown of a few pairs is decided when both models have been seen, and the first is gone by then.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.data.types import TokenGroup, Where
from orpo.evaluate.cache import Cache
from orpo.evaluate.crew import Alone, pieces_of
from orpo.inference.scores import TokenScores, choose_scoring_engine, score_tokens
from orpo.models.fingerprint import content_key

if TYPE_CHECKING:
    from orpo.engine.choose import Engine
    from orpo.inference.ready import Subject

_PIECE_GROUPS = 64
"""Groups scored between two writes to the cache."""
_CHOSEN_BY = 16


def token_logps(
    subject: Subject,
    groups: Sequence[TokenGroup],
    cache: Cache,
    *,
    progress: Callable[[int, int], None] | None = None,
    crew: Alone | None = None,
    which: str = "model",
) -> TokenScores:
    """Log-probabilities of every response's tokens; new ones are kept piece by piece.

    Args:
        subject: the model.
        groups: what to score.
        cache: of scores.
        progress: called with (groups done, groups).
        crew: the processes that share the work; None for this one alone.
        which: what the model is called among them.

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
    crew = crew or Alone()
    num_left = len(todo)

    def work(rows: list[int]) -> list[Any]:
        return packed_logps(subject, [groups[row] for row in rows], engine)

    def keep(rows: list[int], found: list[Any]) -> None:
        nonlocal num_left
        for row, responses in zip(rows, found, strict=True):
            cache.put(keys[row], responses)
        num_left -= len(rows)
        if progress is not None:
            progress(len(groups) - num_left, len(groups))

    task = {"do": "logps", "which": which, "first": [to_plain(groups[row]) for row in _first(todo, groups)] if crew.size > 1 else []}
    crew.share(task, pieces_of(todo, _PIECE_GROUPS, crew.size), lambda rows: [to_plain(groups[row]) for row in rows], work, keep)
    return [tuple(_unpacked(text) for text in cache.get(key)) for key in keys]


def packed_logps(subject: Subject, groups: Sequence[TokenGroup], engine: Engine | None) -> list[list[str]]:
    """Per group, per response, the log-probabilities as the cache keeps them."""
    found = score_tokens(subject.model, groups, engine=engine, compute_dtype=subject.compute_dtype)
    return [[_packed(logps) for logps in responses] for responses in found]


def _first(todo: Sequence[int], groups: Sequence[TokenGroup]) -> list[int]:
    """Rows by which another process chooses the engine that this one chooses: the first ones, and the longest."""
    return [*todo[:_CHOSEN_BY], max(todo, key=lambda row: groups[row].longest_tokens)] if todo else []


def to_plain(group: TokenGroup) -> dict[str, Any]:
    """What is scored of a group, as plain JSON types."""
    responses = [ids.tolist() for ids in group.response_ids]
    return {"prompt": group.prompt_ids.tolist(), "responses": responses, "pairs": group.pairs, "is_ended": group.is_ended}


def from_plain(value: dict[str, Any]) -> TokenGroup:
    """The group that `to_plain` made this of."""
    return TokenGroup(
        prompt_ids=np.asarray(value["prompt"], dtype=np.int32),
        response_ids=tuple(np.asarray(ids, dtype=np.int32) for ids in value["responses"]),
        pairs=tuple((chosen, rejected) for chosen, rejected in value["pairs"]),
        is_ended=tuple(value["is_ended"]),
        where=Where("another process", 0),
    )


def means_of(logps: TokenScores) -> list[np.ndarray]:
    """Mean log-probability of every response, as `score_groups` gives it: per group float64, shape (R,)."""
    return [np.array([one.mean(dtype=np.float64) for one in responses]) for responses in logps]


def _packed(logps: np.ndarray) -> str:
    """Exact, and half as long as digits: a cache of some thousand pairs is read whole."""
    return base64.b64encode(np.asarray(logps, dtype="<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")
