"""Scores of a sequence classifier for many texts at once: packed, where the training engine's attention fits the model; else padded.

Texts that begin alike (a prompt's answers) are computed once up to where they part. Each way is held against the model's own forward,
text by text, on a few of the texts before it is used: padding shifts the position that some reward heads read, and attention that goes both
ways cannot be packed. Where neither agrees, texts are scored one at a time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo.data.types import TokenGroup, Where

logger = logging.getLogger(__name__)

Inputs = dict[str, Tensor]
"""What the tokenizer made of one text, each of shape (1, L)."""

MAX_TOKENS = 4096
"""Of a batch, padding included. Changes no score beyond rounding."""
_NUM_PROVEN = 4
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Largest difference from the model's own forward, relative where scores are above 1; `_ROUGH` in other precisions."""
_ROUGH = 0.03

Way = Callable[[Any, Sequence[Inputs]], list[float]]


class NoWayError(Exception):
    """The model is of another build."""


def one_by_one(model: Any, texts: Sequence[Inputs]) -> list[float]:
    """As the model's own forward scores each: the oracle."""
    return [float(model(**text).logits[0, 0]) for text in texts]


def padded(model: Any, texts: Sequence[Inputs]) -> list[float]:
    """In one batch, padded at the right."""
    width = max(text["input_ids"].shape[1] for text in texts)
    fill = {"input_ids": model.config.pad_token_id}
    if fill["input_ids"] is None:
        raise NoWayError("it has no padding token")
    batch = {
        name: torch.cat([torch.nn.functional.pad(text[name], (0, width - text[name].shape[1]), value=fill.get(name, 0)) for text in texts])
        for name in texts[0]
    }
    return [float(score) for score in model(**batch).logits[:, 0]]


def packed(model: Any, texts: Sequence[Inputs]) -> list[float]:
    """In one row without padding, common beginnings once, by the training engine's attention.

    Raises:
        NoWayError: no decoder with one linear layer over the last token.
    """
    from orpo.engine import attention
    from orpo.engine.layout import collate

    backbone = getattr(model, model.base_model_prefix, None)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or backbone is None or not hasattr(model, "set_attn_implementation"):
        raise NoWayError("it is no decoder with a linear head")
    before = model.config._attn_implementation
    if before not in ("sdpa", "eager", attention.NAME):
        raise NoWayError("its attention is of another kind")
    groups = _groups([_read_part(text["input_ids"][0], model.config.pad_token_id) for text in texts])
    batch = collate(groups, "response").to(texts[0]["input_ids"].device)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    try:
        hidden = backbone(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids_T.device),  # the layout says what is seen
            use_cache=False,
            **{attention.LAYOUT_KEYWORD: batch.layout},
        )[0][0]
    finally:
        model.set_attn_implementation(before)
    ends = list(itertools.accumulate(len(part) for group in groups for part in (group.prompt_ids, *group.response_ids)))
    is_answer = [number > 0 for group in groups for number in range(1 + len(group.response_ids))]
    rows = [end - 1 for end, counts in zip(ends, is_answer, strict=True) if counts]
    return [float(score) for score in model.score(hidden[rows])[:, 0]]


def _read_part(ids: Tensor, pad: int | None) -> np.ndarray:
    """A text up to the token that the head reads, which is the last one that is no padding token; nothing behind it matters."""
    found = ids.cpu().numpy().astype(np.int32)
    if pad is None:
        return found
    others = np.flatnonzero(found != pad)
    return found[: int(others[-1]) + 1 if len(others) else 1]


def _groups(texts: Sequence[np.ndarray]) -> list[TokenGroup]:
    """Neighbours that begin alike together, in order; what they share is the prompt, and each keeps at least one token of its own."""
    found: list[TokenGroup] = []
    for members in _runs(texts):
        common = min([_num_common(members[0], one) for one in members[1:]] + [len(one) - 1 for one in members])
        if common < 1:
            raise NoWayError("a text of one token")
        answers = tuple(one[common:] for one in members)
        found.append(TokenGroup(members[0][:common], answers, (), (True,) * len(answers), Where("reward", len(found))))
    return found


def _runs(texts: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    run: list[np.ndarray] = []
    for text in texts:
        if run and 2 * _num_common(run[0], text) < min(len(run[0]), len(text)):
            yield run
            run = []
        run.append(text)
    if run:
        yield run


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    size = min(len(first), len(second))
    differing = np.flatnonzero(first[:size] != second[:size])
    return int(differing[0]) if len(differing) else size


def choose_way(model: Any, texts: Sequence[Inputs]) -> Way:
    """The fastest way that gives the scores of the model's own forward on some of the texts, the shortest and the longest among them."""
    if len(texts) < 2:
        return one_by_one
    by_length = sorted(range(len(texts)), key=lambda place: texts[place]["input_ids"].shape[1])
    places = sorted({by_length[round(step * (len(texts) - 1) / (_NUM_PROVEN - 1))] for step in range(_NUM_PROVEN)})
    some = [texts[place] for place in places]
    expected = one_by_one(model, some)
    tolerance = _TOLERANCES.get(model.dtype, _ROUGH)
    for way in (packed, padded):
        try:
            scores = way(model, some)
        except (NoWayError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            logger.debug("%s is not possible: %s", way.__name__, error)
            continue
        if all(abs(score - own) <= tolerance * max(1.0, abs(own)) for score, own in zip(scores, expected, strict=True)):
            return way
        logger.debug("%s gives other scores: %s, %s", way.__name__, scores, expected)
    return one_by_one


def batches(texts: Sequence[Inputs], max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Places of texts, in order, cut where a batch would hold more padded tokens than that."""
    batch: list[int] = []
    width = 0
    for place, text in enumerate(texts):
        wider = max(width, text["input_ids"].shape[1])
        if batch and wider * (len(batch) + 1) > max_tokens:
            yield batch
            batch, wider = [], text["input_ids"].shape[1]
        batch.append(place)
        width = wider
    if batch:
        yield batch
