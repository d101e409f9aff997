"""Who judges answers: an endpoint that speaks OpenAI's protocol (`orpo.evaluate.judging.endpoint`), or a model of your own (`localjudge`).

Every reply is kept as soon as it is there, under a hash of judge and question. A judge that dies loses nothing but what it was busy with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orpo.evaluate.cache import Cache
from orpo.models.fingerprint import content_key

Conversation = tuple[dict[str, str], ...]
"""Messages that a judge is shown."""

Done = Callable[[int, "Reply | None"], None]
"""Called with a question's number and its reply, or None where there is none: refused, or every attempt failed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge said.

    Attributes:
        text: of the reply.
        first_logprobs: log-probabilities of the likeliest first tokens, where the judge gives them.
        finish: why it ended, as the server says it ("stop", "length"); None where it does not, or the reply was known.
    """

    text: str
    first_logprobs: dict[str, float] | None = None
    finish: str | None = field(default=None, compare=False)


class Judge(Protocol):
    """Answers questions about answers."""

    @property
    def identity(self) -> dict[str, Any]:
        """What its replies depend on besides the question: model and settings. Part of every key."""
        ...

    def ask(self, conversations: Sequence[Conversation], max_tokens: int, done: Done) -> None:
        """Get a reply to every conversation, in any order.

        Raises:
            JudgeUnavailable: the judge stopped answering. Replies so far went to `done`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Judgements:
    """Replies to a list of questions.

    Attributes:
        replies: in order; None where there is none (refused, or every attempt failed). These are asked again in the next run.
        num_cached: how many were known already.
    """

    replies: list[Reply | None]
    num_cached: int


def ask_all(
    judge: Judge,
    conversations: Sequence[Conversation],
    cache: Cache,
    *,
    max_tokens: int = 2048,
    is_stale: Callable[[Reply], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Judgements:
    """Replies to all questions, from the cache where they are there.

    Args:
        judge: who is asked.
        conversations: the questions. One that occurs twice is asked once.
        cache: where replies are kept.
        max_tokens: most tokens of a reply.
        is_stale: a kept reply for which this is true is asked for again.
        progress: called with (replies, questions).

    Raises:
        JudgeUnavailable: the judge stopped answering.
    """
    keys = [content_key(judge=judge.identity, max_tokens=max_tokens, messages=list(conversation)) for conversation in conversations]
    known = {key: _reply(cache.get(key)) for key in dict.fromkeys(keys) if key in cache}
    known = {key: reply for key, reply in known.items() if is_stale is None or not is_stale(reply)}
    num_cached = sum(key in known for key in keys)
    todo = {key: conversation for key, conversation in zip(keys, conversations, strict=True) if key not in known}
    todo_keys = list(todo)
    found: dict[str, Reply | None] = dict(known)

    def done(number: int, reply: Reply | None) -> None:
        found[todo_keys[number]] = reply
        if reply is not None:
            cache.put(todo_keys[number], {"text": reply.text, "first_logprobs": reply.first_logprobs})
        if progress is not None:
            progress(sum(key in found for key in keys), len(keys))

    if todo:
        judge.ask(list(todo.values()), max_tokens, done)
    return Judgements([found[key] for key in keys], num_cached)


def _reply(value: dict[str, Any]) -> Reply:
    return Reply(value["text"], value.get("first_logprobs"))


def fill(template: str, values: dict[str, str]) -> str:
    """Put values in for `{name}`. Braces in values are text; a name without a value stays as it is.

    `str.format` would let a template reach into attributes and fail on any other brace.
    """
    import re

    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)
