"""The task `pairs`: held-out pairs before and after, in slices, and a few pairs token by token for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.errors import UserError
from orpo.evaluate.cache import Cache
from orpo.evaluate.pairs import paired_difference, slice_pairs, summarise
from orpo.inference.scores import choose_scoring_engine, score_tokens
from orpo.models.fingerprint import content_key
from orpo.run.data import held_out_groups, held_out_rows, read_rows

if TYPE_CHECKING:
    from orpo.data.types import TokenGroup
    from orpo.evaluate.suite import Evaluation
    from orpo.inference.ready import Subject

NUM_SHOWN = 8
"""Pairs that are kept token by token."""
_PIECE_GROUPS = 64
"""Groups scored between two writes to the cache."""


def evaluate_pairs(evaluation: Evaluation) -> dict[str, Any]:
    """Accuracy, margin and log-probabilities of the model, of the one to compare with, and the change.

    Raises:
        UserError: there are no rows, or none has a pair.
    """
    options = evaluation.options
    config = evaluation.target.config if evaluation.target is not None else None
    if options.data is not None:
        rows, fraction = read_rows(options.data, options.split, config), None
    elif config is not None:
        rows, fraction = held_out_rows(config)
    else:
        raise UserError(
            "there are no pairs to evaluate", where="pairs", mend="--data FILE, folder or hub id with chosen and rejected answers"
        )
    scored: dict[str, tuple[list[TokenGroup], list[np.ndarray]]] = {}
    reports = {}
    for which in ("against", "model") if evaluation.against is not None else ("model",):
        subject = evaluation.subject(which)
        groups, report = held_out_groups(rows, fraction, subject.encoder)
        groups = groups[: options.limit]
        scored[which] = groups, cached_scores(subject, groups, evaluation.score_cache, progress=evaluation.step(f"pairs, {subject.name}"))
        reports[which] = report
    groups, scores = scored["model"]
    found: dict[str, Any] = {
        "data": options.data or "rows that the run held out",
        "rows": {name: value for name, value in reports["model"].to_dict().items() if name in ("num_rows", "dropped", "notes")},
        "model": summarise(groups, scores, seed=options.seed).to_dict(),
        "slices": {
            by: {label: part.to_dict() for label, part in slice_pairs(groups, scores, by, seed=options.seed).items()}
            for by in options.slices
        },
    }
    if "against" in scored:
        found["against"] = summarise(*scored["against"], seed=options.seed).to_dict()
        found |= _change(evaluation, scored)
    return found


def _change(evaluation: Evaluation, scored: dict[str, tuple[list[TokenGroup], list[np.ndarray]]]) -> dict[str, Any]:
    """The paired difference over the rows that both models have, and some of them token by token."""
    options = evaluation.options
    rows = {which: {group.where: (group, score) for group, score in zip(*both, strict=True)} for which, both in scored.items()}
    common = [
        where for where in rows["model"] if where in rows["against"] and _same_pairs(rows["model"][where][0], rows["against"][where][0])
    ]
    if not common:
        return {"note": "no row has the same pairs for both models"}
    groups = [rows["model"][where][0] for where in common]
    before, after = [rows["against"][where][1] for where in common], [rows["model"][where][1] for where in common]
    change = paired_difference(groups, before, after, seed=options.seed)
    picked = [common[index] for index in pick_shown(groups, before, after)]
    shown = {
        which: _token_view(evaluation, evaluation.subject(which), [rows[which][where][0] for where in picked])
        for which in ("against", "model")
    }
    return {
        "change": change.to_dict(),
        "shown": [
            {"where": str(where), "model": new, "against": old}
            for where, new, old in zip(picked, shown["model"], shown["against"], strict=True)
        ],
    }


def _same_pairs(one: TokenGroup, other: TokenGroup) -> bool:
    return one.pairs == other.pairs and len(one.response_ids) == len(other.response_ids)


def pick_shown(groups: Sequence[TokenGroup], before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> list[int]:
    """Rows to show: those whose margin changed most, in both directions, and the most ordinary ones."""

    def margin(scores: Sequence[np.ndarray], row: int) -> float:
        chosen, rejected = groups[row].pairs[0]
        return float(scores[row][chosen] - scores[row][rejected])

    order = sorted(range(len(groups)), key=lambda row: margin(after, row) - margin(before, row))
    middle = len(order) // 2
    picks = [*order[::-1][: NUM_SHOWN // 2], *order[: NUM_SHOWN // 4], *order[middle : middle + NUM_SHOWN // 4]]
    return list(dict.fromkeys(picks))[:NUM_SHOWN]


def _token_view(evaluation: Evaluation, subject: Subject, groups: Sequence[TokenGroup]) -> list[dict[str, Any]]:
    """Prompt, and the first pair's answers as tokens with their log-probabilities."""
    views = []
    for group, logps in zip(groups, cached_token_scores(subject, groups, evaluation.score_cache), strict=True):
        view: dict[str, Any] = {"prompt": subject.tokenizer.decode(group.prompt_ids.tolist())}
        for side, response in zip(("chosen", "rejected"), group.pairs[0], strict=True):
            texts = [subject.tokenizer.decode([int(token)]) for token in group.response_ids[response]]
            view[side] = {"tokens": texts, "logps": logps[response]}
        views.append(view)
    return views


def cached_scores(
    subject: Subject, groups: Sequence[TokenGroup], cache: Cache, *, progress: Callable[[int, int], None]
) -> list[np.ndarray]:
    """Mean log-probability of every response, as `score_groups` gives it, through the cache."""

    def mean(logps: np.ndarray) -> float:
        return float(logps.mean(dtype=np.float64))

    return [np.array(values) for values in _cached(subject, groups, cache, "mean", mean, progress)]


def cached_token_scores(subject: Subject, groups: Sequence[TokenGroup], cache: Cache) -> list[list[list[float]]]:
    """Per group, per response: token log-probabilities to four digits, through the cache."""

    def tokens(logps: np.ndarray) -> list[float]:
        return [round(float(value), 4) for value in logps]

    return _cached(subject, groups, cache, "tokens", tokens, lambda done, total: None)


def _cached(
    subject: Subject,
    groups: Sequence[TokenGroup],
    cache: Cache,
    kind: str,
    reduce: Callable[[np.ndarray], Any],
    progress: Callable[[int, int], None],
) -> list[Any]:
    """Something of every response's token log-probabilities; new ones are kept piece by piece."""
    dtype = None if subject.compute_dtype is None else str(subject.compute_dtype)
    keys = [
        content_key(
            kind=kind, model=subject.identity, dtype=dtype, ids=[group.prompt_ids.tolist(), *(ids.tolist() for ids in group.response_ids)]
        )
        for group in groups
    ]
    todo = list({key: row for row, key in enumerate(keys) if key not in cache}.values())
    engine = choose_scoring_engine(subject.model, [groups[row] for row in todo]) if todo else None
    for start in range(0, len(todo), _PIECE_GROUPS):
        rows = todo[start : start + _PIECE_GROUPS]
        found = score_tokens(subject.model, [groups[row] for row in rows], engine=engine, compute_dtype=subject.compute_dtype)
        for row, responses in zip(rows, found, strict=True):
            cache.put(keys[row], [reduce(logps) for logps in responses])
        progress(len(groups) - len(todo) + start + len(rows), len(groups))
    return [cache.get(key) for key in keys]
