"""Answers to prompts: several of each, from models of this machine and from an endpoint, through a cache."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orpo.errors import DataError
from orpo.evaluate.answers import Sampling, answer_prompts
from orpo.evaluate.judging.endpoint import EndpointJudge
from orpo.evaluate.judging.local import as_messages
from orpo.inference.generate import LENGTH, TOO_LONG, Answer
from orpo.inference.ready import Loading, load_subject
from orpo.models.fingerprint import content_key

if TYPE_CHECKING:
    import numpy as np

    from orpo.evaluate.cache import Cache
    from orpo.evaluate.judging.judges import Reply
    from orpo.inference.ready import Subject
    from orpo.onpolicy.asked import Asked

Progress = Callable[..., None]
"""Called with (what, done, total), and a `note` where there is one."""

Tell = Callable[[str], None]
OWN = "the data"
"""Who gave an answer that stands in the rows."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """An answer to a prompt.

    Attributes:
        by: the model's name, or `OWN`.
        finish: "stop", "length" where it was cut, None where that is not known.
        num_tokens: generated tokens; None where that is not known.
    """

    text: str
    by: str
    finish: str | None = None
    num_tokens: int | None = None

    @property
    def is_cut(self) -> bool:
        return self.finish == LENGTH


@dataclass
class AskedGroup:
    """A prompt and its answers.

    Attributes:
        problem: why a model could not be asked, where it could not.
    """

    asked: Asked
    attempts: list[Attempt] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Draws:
    """How answers are drawn.

    Attributes:
        num_samples: of each prompt and model.
        sampling: temperature and so on. The seed gives each answer a stream of its own, from the prompt's ids and the answer's number.
        batch_size: answers at a time; changes none beyond rounding.
    """

    num_samples: int
    sampling: Sampling
    batch_size: int = 64


def draw_locally(
    name: str, groups: Sequence[AskedGroup], draws: Draws, cache: Cache, loading: Loading, tell: Tell, progress: Progress
) -> None:
    """Add the answers of a run or model to its groups. The model is let go at the end.

    Raises:
        UserError: it cannot be loaded.
    """
    tell(f"loading      {name}")
    subject = load_subject(name, loading)
    try:
        _draw(subject, groups, draws, cache, tell, progress)
    finally:
        del subject
        release_memory()


def _draw(subject: Subject, groups: Sequence[AskedGroup], draws: Draws, cache: Cache, tell: Tell, progress: Progress) -> None:
    askable = [(group, ids) for group in groups if (ids := _prompt_ids(subject, group)) is not None]
    flat = [ids for _, ids in askable for _ in range(draws.num_samples)]
    meter = _Meter(f"answers of {subject.name}", progress)
    answers = answer_prompts(subject, flat, draws.sampling, cache, batch_size=draws.batch_size, progress=meter.progress, told=meter.told)
    for number, (group, _) in enumerate(askable):
        own = answers[number * draws.num_samples : (number + 1) * draws.num_samples]
        if own[0].finish == TOO_LONG:
            group.problem = "no room for an answer"
            continue
        group.attempts += [Attempt(answer.text, subject.name, answer.finish, answer.num_tokens) for answer in own]
    tell(f"sampled      {subject.name}: {meter.sentence(len(flat))}")


def _prompt_ids(subject: Subject, group: AskedGroup) -> np.ndarray | None:
    asked = group.asked
    try:
        return subject.encoder.prompt_ids(asked.prompt, asked.tools, asked.variables)
    except DataError as error:
        group.problem = error.what
        return None


def release_memory() -> None:
    """Free what a model that was let go still holds."""
    gc.collect()  # modules and their hooks refer to each other
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Meter:
    """How fast answers come."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.what, self._progress = what, progress
        self.began_s = time.monotonic()
        self.num_answers = self.num_tokens = 0

    def told(self, answer: Answer) -> None:
        self.num_answers += 1
        self.num_tokens += answer.num_tokens

    def progress(self, done: int, total: int) -> None:
        self._progress(self.what, done, total, note=f"{self.rate:,.0f} tokens/s")

    @property
    def rate(self) -> float:
        return self.num_tokens / max(1e-9, time.monotonic() - self.began_s)

    def sentence(self, total: int) -> str:
        if not self.num_answers:
            return f"all {total} answers were there"
        known = f", {total - self.num_answers} were there" if total > self.num_answers else ""
        return f"{self.num_answers} answers, {self.num_tokens:,} tokens, {self.rate:,.0f} tokens/s{known}"


def draw_from_endpoint(endpoint: EndpointJudge, groups: Sequence[AskedGroup], draws: Draws, cache: Cache, progress: Progress) -> int:
    """Add the answers of an endpoint to its groups; how many it did not give (refused, or every attempt failed).

    The n-th answers of all prompts are asked together with a seed of their own: servers that know `seed` give other answers each time, and
    the same ones to the same command.

    Raises:
        JudgeUnavailable: it stopped answering. What it has answered is kept.
    """
    total, num_missing = len(groups) * draws.num_samples, 0
    for number in range(draws.num_samples):
        for tools, members in _by_tools(groups):
            asker = _asker(endpoint, draws, number, tools)

            def told(done: int, base: int = number * len(groups)) -> None:
                progress("answers of the endpoint", base + done, total)

            attempts = _ask(asker, members, draws, cache, told)
            num_missing += attempts.count(None)
            for group, attempt in zip(members, attempts, strict=True):
                if attempt is not None:
                    group.attempts.append(attempt)
    return num_missing


def _by_tools(groups: Sequence[AskedGroup]) -> list[tuple[Any, list[AskedGroup]]]:
    """Prompts with the same tools, which are a field of the request."""
    found: dict[str, tuple[Any, list[AskedGroup]]] = {}
    for group in groups:
        found.setdefault(content_key(tools=group.asked.tools), (group.asked.tools, []))[1].append(group)
    return list(found.values())


def _asker(endpoint: EndpointJudge, draws: Draws, number: int, tools: Any) -> EndpointJudge:
    from dataclasses import replace

    sampling = draws.sampling
    options: dict[str, Any] = {"top_p": sampling.top_p, "seed": sampling.seed * 100_003 + number}
    if tools:
        options["tools"] = list(tools)
    return replace(endpoint, temperature=sampling.temperature, options={**options, **endpoint.options})


def _ask(asker: EndpointJudge, members: list[AskedGroup], draws: Draws, cache: Cache, told: Callable[[int], None]) -> list[Attempt | None]:
    conversations = [tuple(as_messages(group.asked.prompt)) for group in members]
    most = draws.sampling.max_new_tokens
    keys = [content_key(endpoint=asker.identity, messages=list(one), max_tokens=most) for one in conversations]
    todo = [place for place, key in enumerate(keys) if key not in cache]
    num_done = len(members) - len(todo)

    def done(place: int, reply: Reply | None) -> None:
        nonlocal num_done
        num_done += 1
        if reply is not None:
            cache.put(keys[todo[place]], {"text": reply.text, "finish": reply.finish})
        told(num_done)

    if todo:
        asker.ask([conversations[place] for place in todo], most, done)
    known = [cache.get(key) for key in keys]
    return [None if value is None else Attempt(str(value["text"]), asker.model, value.get("finish")) for value in known]
