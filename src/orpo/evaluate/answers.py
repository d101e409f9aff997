"""Answers of a model to prompts, through the cache: what a broken run has generated is not generated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.evaluate.cache import Cache
from orpo.evaluate.crew import Alone, pieces_of
from orpo.inference.generate import BATCH_SIZE, Answer, count_occurrences, generate, generation_order
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
    crew: Alone | None = None,
    which: str = "model",
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
        crew: the processes that share the work; None for this one alone.
        which: what the model is called among them.
    """
    ids = [prompt if isinstance(prompt, np.ndarray) else subject.encoder.prompt_ids(prompt) for prompt in prompts]
    occurrences = count_occurrences(ids) if sampling.temperature else [0] * len(ids)
    settings = sampling.to_dict() | {"dtype": _name(subject.compute_dtype)}
    keys = [
        content_key(model=subject.identity, prompt_ids=one.tolist(), occurrence=occurrence, **settings)
        for one, occurrence in zip(ids, occurrences, strict=True)
    ]
    todo = list({key: row for row, key in enumerate(keys) if key not in cache}.values())

    num_known = len(prompts) - len(todo)

    def each(row: int, answer: Answer) -> None:
        cache.put(keys[row], answer.to_dict())
        if told is not None:
            told(answer)

    if todo and crew is not None and crew.size > 1:
        _share(
            crew,
            which,
            subject,
            sampling,
            batch_size,
            todo,
            ids,
            occurrences,
            each,
            lambda done: _tell(progress, num_known + done, len(ids)),
        )
    elif todo:
        _generate(
            subject,
            sampling,
            batch_size,
            [ids[row] for row in todo],
            [occurrences[row] for row in todo],
            progress=lambda done, _: _tell(progress, num_known + done, len(ids)),
            each=lambda number, answer: each(todo[number], answer),
        )
    return [Answer(**cache.get(key)) for key in keys]


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _generate(
    subject: Subject, sampling: Sampling, batch_size: int, ids: Sequence[np.ndarray], occurrences: Sequence[int], **called: Any
) -> list[Answer]:
    return generate(
        subject.model,
        subject.tokenizer,
        subject.encoder,
        ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        batch_size=batch_size,
        compute_dtype=subject.compute_dtype,
        occurrences=occurrences,
        **called,
    )


def _share(
    crew: Alone,
    which: str,
    subject: Subject,
    sampling: Sampling,
    batch_size: int,
    todo: Sequence[int],
    ids: Sequence[np.ndarray],
    occurrences: Sequence[int],
    each: Callable[[int, Answer], None],
    progress: Callable[[int], None],
) -> None:
    """Have the prompts answered by several processes, in the batches in which one would answer them where there are enough of them."""
    num_done = 0

    def payload(rows: list[int]) -> dict[str, Any]:
        return {"ids": [ids[row].tolist() for row in rows], "occurrences": [occurrences[row] for row in rows]}

    def work(rows: list[int]) -> list[Any]:
        found = _generate(subject, sampling, batch_size, [ids[row] for row in rows], [occurrences[row] for row in rows])
        return [answer.to_dict() for answer in found]

    def keep(rows: list[int], found: list[Any]) -> None:
        nonlocal num_done
        for row, answer in zip(rows, found, strict=True):
            each(row, Answer(**answer))
        num_done += len(rows)
        progress(num_done)

    ordered = [todo[number] for number in generation_order([ids[row] for row in todo])]
    task = {"do": "answers", "which": which, "sampling": asdict(sampling), "batch_size": batch_size}
    crew.share(task, pieces_of(ordered, batch_size, crew.size), payload, work, keep)


def answer_task(subject: Subject, task: dict[str, Any]) -> list[Any]:
    """What another process was handed by `answer_prompts`."""
    given = task["payload"]
    ids = [np.asarray(one, dtype=np.int32) for one in given["ids"]]
    found = _generate(subject, Sampling(**task["sampling"]), task["batch_size"], ids, given["occurrences"])
    return [answer.to_dict() for answer in found]


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
