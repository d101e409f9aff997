"""Answers of a model to prompts, through the cache: what a broken run has generated is not generated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.evaluate.cache import Cache
from orpo.inference.generate import BATCH_SIZE, Answer, count_occurrences, generate
from orpo.models.fingerprint import content_key

if TYPE_CHECKING:
    import torch

    from orpo.data.types import Text
    from orpo.inference.ready import Subject


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are generated; arguments of `orpo.inference.generate.generate`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what has no effect on greedy answers is left out, so that it makes no other key."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}
        return asdict(self)


def answer_prompts(
    subject: Subject,
    prompts: Sequence[Text | np.ndarray],
    sampling: Sampling,
    cache: Cache,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
    told: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """An answer to every prompt; new ones are kept as soon as their batch is done.

    Args:
        subject: the model.
        prompts: texts, messages, or ids that the subject's encoder has made.
        sampling: how to generate.
        cache: of answers.
        batch_size: prompts at a time; no part of the key, since it changes no answer beyond rounding.
        progress: called with (answers, prompts).
        told: called with every answer that was not known, as soon as it is kept.
    """
    ids = [prompt if isinstance(prompt, np.ndarray) else subject.encoder.prompt_ids(prompt) for prompt in prompts]
    occurrences = count_occurrences(ids) if sampling.temperature else [0] * len(ids)
    settings = sampling.to_dict() | {"dtype": _name(subject.compute_dtype)}
    keys = [
        content_key(model=subject.identity, prompt_ids=one.tolist(), occurrence=occurrence, **settings)
        for one, occurrence in zip(ids, occurrences, strict=True)
    ]
    todo = list({key: row for row, key in enumerate(keys) if key not in cache}.values())

    def each(number: int, answer: Answer) -> None:
        cache.put(keys[todo[number]], answer.to_dict())
        if told is not None:
            told(answer)

    num_known = len(prompts) - len(todo)
    if todo:
        generate(
            subject.model,
            subject.tokenizer,
            subject.encoder,
            [ids[row] for row in todo],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            batch_size=batch_size,
            compute_dtype=subject.compute_dtype,
            progress=None if progress is None else lambda done, _: progress(num_known + done, len(prompts)),
            each=each,
            occurrences=[occurrences[row] for row in todo],
        )
    return [Answer(**cache.get(key)) for key in keys]


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
