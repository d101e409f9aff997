"""What a row holds and the template does not print.

Every word of a row that a person would expect to be trained is looked for in the rendered text. What is missing of an answer itself (its
text, a tool call) makes the row unusable: something else would be trained than was preferred. What is missing elsewhere (reasoning, tools,
earlier turns, names) is noted on the row.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orpo.data.chat.special import content_text
from orpo.data.types import Message

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_REASONING_ENDS = ("</think>", "[/THINK]", "</seed:think>", "◁/think▷", "<channel|>")
_STRUCTURE = frozenset({"type", "id", "role", "strict"})
"""Keys whose values are the schema's words, not the row's: "function", "object", "call_1"."""


class Printed:
    """A rendered text in which words are looked up; white space and the ways of writing a value as text are no difference.

    Args:
        text: the rendered text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._bare = ""

    def has(self, word: str) -> bool:
        """Whether the text shows a word."""
        word = word.strip()
        if not word or word in self.text:
            return True
        self._bare = self._bare or "".join(self.text.split())
        return any("".join(form.split()) in self._bare for form in _forms(word))

    def has_value(self, value: Any) -> bool:
        """Whether the text shows every value inside of this one."""
        return all(any(self.has(form) for form in forms) for forms in _values(value))


def _forms(word: str) -> Iterator[str]:
    """A text as it stands, and as it is written inside JSON."""
    yield word
    yield json.dumps(word)[1:-1]
    yield json.dumps(word, ensure_ascii=False)[1:-1]


def _values(value: Any) -> Iterator[tuple[str, ...]]:
    """The values inside a value, each in the ways it may be written."""
    if isinstance(value, str):
        yield (value,)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _STRUCTURE:
                yield from _values(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _values(item)
    elif value is not None and not isinstance(value, bool):
        yield (json.dumps(value, default=str), str(value))


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning that a text begins with, its marks included, and what follows it."""
    ends = [(text.rfind(mark) + len(mark)) for mark in _REASONING_ENDS if mark in text]
    return (text[: max(ends)], text[max(ends) :]) if ends else ("", text)


def _bare_reasoning(text: str) -> str:
    for mark in _REASONING_ENDS:
        text = text.replace(mark, " ")
    return text.strip().removeprefix("<think>").removeprefix("[THINK]").removeprefix("<seed:think>")


def call_parts(message: Message) -> list[Any]:
    """What tool calls say: their names and arguments (those given as JSON text read, so that their order and spacing are no difference)."""
    parts: list[Any] = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        parts.append([function.get("name") if isinstance(function, dict) else None, arguments])
    return parts


def missing_of_answer(message: Message, region: str, *, prefill: str = "", prints_calls: bool) -> tuple[str | None, list[str]]:
    """What of an answer is not printed: the part that makes it unusable, in words, or None; and note codes for the rest.

    Args:
        message: the answer.
        region: the rendered text behind the prompt.
        prefill: its beginning, which belongs to the prompt.
        prints_calls: the template prints tool calls in some form.
    """
    printed, notes = Printed(region), []
    text = content_text(message).removeprefix(prefill)
    reasoning, said = split_reasoning(text)
    fields = [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key].strip()]
    calls = call_parts(message)
    if calls and not (prints_calls and printed.has_value(calls)):
        return "a tool call", []
    if not printed.has(text):
        # Reasoning may be printed apart from the rest, or left out; the rest may not.
        if not printed.has(said):
            return "the answer's text" if not calls else "the text beside a tool call", []
        if not printed.has(_bare_reasoning(reasoning)):
            if not said.strip() and not calls:
                return "an answer of reasoning alone", []
            notes.append("reasoning_not_printed")
    if not all(printed.has(field) for field in fields):
        notes.append("reasoning_not_printed")
    return None, notes


def missing_of_prompt(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, text: str, *, prints_tools: bool) -> list[str]:
    """Note codes for what of a prompt is not printed.

    Args:
        messages: the prompt.
        tools: the row's tools.
        text: the rendered prompt.
        prints_tools: the template prints tools at all.
    """
    printed = Printed(text)
    return list(dict.fromkeys(_missing(messages, tools, printed, prints_tools)))


def _missing(messages: Iterable[Message], tools: Sequence[dict[str, Any]] | None, printed: Printed, prints_tools: bool) -> Iterator[str]:
    for message in messages:
        text = content_text(message)
        if not printed.has(text):
            reasoning, said = split_reasoning(text) if message["role"] == "assistant" else ("", text)
            yield "text_not_printed" if not printed.has(said) or not reasoning else "reasoning_not_printed"
        if not all(printed.has(message[key]) for key in REASONING_KEYS if isinstance(message.get(key), str)):
            yield "reasoning_not_printed"
        if not printed.has_value(call_parts(message)):
            yield "calls_not_printed"
        if isinstance(message.get("name"), str) and not printed.has(message["name"]):
            yield "name_not_printed"
    if tools and not (prints_tools and printed.has_value(list(tools))):
        yield "tools_not_printed"
