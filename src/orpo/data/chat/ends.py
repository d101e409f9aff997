"""What ends an answer: found by comparing a conversation that stops there with one that goes on.

A template prints something behind an answer: closing wrappers, the turn's end, and sometimes more that only stands at the very end of a
text. The turn's end is the last token of it that is also printed when another turn follows. Where the two share none (a final answer ends
with one token, an earlier one with another), it is the final rendering's, since that is where a model has to stop. Answers that call tools
may have an end of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orpo.data.chat.special import common_start
from orpo.data.types import Message


@dataclass(frozen=True, slots=True)
class End:
    """How one kind of answer ends.

    Attributes:
        after: what the template prints behind the answer's own text.
        text: the part of it that is trained: up to and including the terminator, or without trailing blanks if there is none.
        terminator_id: the id that ends an answer.
        is_appended: the template prints no token behind an answer, so `eos_token` is appended.
    """

    after: str
    text: str
    terminator_id: int
    is_appended: bool = False

    @property
    def rest(self) -> str:
        """What the template prints behind the terminator."""
        return self.after[len(self.text) :]

    def cut(self, rendered: str) -> str | None:
        """A rendered conversation up to its terminator; None where it ends in another way."""
        if not rendered.endswith(self.after):
            return None
        return rendered[: len(rendered) - len(self.rest)]


def last_shared(after: str, inner: str, tokens: re.Pattern[str]) -> re.Match[str] | None:
    """The last token of `after` up to which `inner` reads the same; the last of all where they share none.

    Args:
        after: what stands behind an answer that ends a conversation.
        inner: what stands behind one that another turn follows.
        tokens: the tokenizer's added tokens.
    """
    found = list(tokens.finditer(after))
    shared = [match for match in found if inner.startswith(after[: match.end()])]
    return next(reversed(shared or found), None)


CALL_FORMS: tuple[tuple[bool, bool], ...] = ((False, False), (True, False), (False, True), (True, True))
"""(no content beside a call without text, arguments as JSON text): the ways that templates want tool calls, plainest first."""


def in_call_form(message: Message, form: tuple[bool, bool]) -> Message:
    """A message with its tool calls as a template wants them.

    Args:
        message: any message; one without tool calls stays as it is.
        form: one of `CALL_FORMS`.
    """
    import json

    calls = message.get("tool_calls")
    if not calls or form == CALL_FORMS[0]:
        return message
    has_no_content, is_text = form
    shown = dict(message)
    if has_no_content and not message.get("content"):
        shown["content"] = None
    if is_text:
        shown["tool_calls"] = [_with_text_arguments(call, json.dumps) for call in calls]
    return shown


def _with_text_arguments(call: Any, dumps: Callable[[Any], str]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": dumps(function.get("arguments", {}))}}


_NAMES = ("callsentinelqx", "callsentinelqy")
_PROBES: tuple[dict[str, Any], ...] = ({"place": "Argumentqx"}, {"number": 7071})


def probe_call(name: str, arguments: dict[str, Any]) -> Message:
    """An answer that calls a tool."""
    call = {"id": "callqx001", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template prints tool calls.

    Attributes:
        form: how it wants them, one of `CALL_FORMS`.
        end: the token that ends an answer with a call, with what follows it; empty where it prints none.
        terminator: that token.
    """

    form: tuple[bool, bool]
    end: str
    terminator: str


def find_calls(
    render: Callable[[Sequence[Message]], str | None], lead: Sequence[Message], tokens: re.Pattern[str], can_end: Callable[[str], bool]
) -> CallStyle | None:
    """How the template prints tool calls, and what ends an answer with one; None where it prints none in any form.

    Args:
        render: messages to text, None where the template raises.
        lead: a prompt.
        tokens: the tokenizer's added tokens.
        can_end: whether a token may end a turn (the closing tag of a call does not).
    """
    for form in CALL_FORMS:
        calls = [in_call_form(probe_call(name, arguments), form) for name, arguments in zip(_NAMES, _PROBES, strict=True)]
        texts = [render([*lead, call]) or "" for call in calls]
        if not all(name in text for text, name in zip(texts, _NAMES, strict=True)):
            continue
        # Two calls with nothing in common: what both renderings end with is the template's.
        size = len(common_start([text[::-1] for text in texts]))
        before, after = texts[0][: len(texts[0]) - size], texts[0][len(texts[0]) - size :]
        result = {"role": "tool", "content": "Resultqx", "name": _NAMES[0], "tool_call_id": "callqx001"}
        followed = render([*lead, calls[0], result]) or render([*lead, calls[0], {"role": "user", "content": "Resultqx"}]) or ""
        inner = followed[len(before) :] if followed.startswith(before) else ""
        ends = [match for match in tokens.finditer(after) if can_end(match.group())]
        shared = [match for match in ends if inner.startswith(after[: match.end()])]
        last = next(reversed(shared or ends), None)
        return CallStyle(form, after[last.start() :], last.group()) if last else CallStyle(form, "", "")
    return None
