"""Text and messages of any dialect in one form: `str`, or messages with `role` and `content`.

Every function here judges one row and raises `BadRow` with a reason code where the row is at fault; nothing is ever turned into text
with `str()`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.types import Message, Text

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_KEPT_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_TYPE_NAMES = {bool: "boolean", int: "number", float: "number", list: "list", dict: "object", str: "text"}


class BadRow(Exception):
    """A row that cannot be used: a reason code and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def type_name(value: Any) -> str:
    """The JSON name of a value's type, for messages to the user."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def is_blank(text: str) -> bool:
    """No character that shows: white space and zero-width characters only."""
    shown = text.strip()
    return not shown or (ord(shown[0]) in _ZERO_WIDTH and not shown.translate(_ZERO_WIDTH).strip())


def check_text(value: Any, name: str) -> str:
    """The value, if it is text that can be encoded.

    Raises:
        BadRow: absent or null, another type, lone surrogates.
    """
    if value is None:
        raise BadRow("missing_field", f"{name} is absent or null")
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} is a {type_name(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("invalid_text", f"{name} holds a lone surrogate") from None
    return value


def _content(value: Any, name: str) -> str:
    """A message's content: text, or typed parts that are all text, joined as they stand."""
    if not isinstance(value, (list, tuple)):
        return check_text(value, f"{name} content")
    pieces = []
    for part in value:
        if isinstance(part, str):
            pieces.append(check_text(part, f"{name} part"))
            continue
        if not isinstance(part, Mapping):
            raise BadRow("wrong_type", f"{name} part is a {type_name(part)}")
        kind = part.get("type", "text")
        if kind != "text":
            raise BadRow("not_text", f"{name} part of type {str(kind)[:40]!r}")
        pieces.append(check_text(part.get("text", part.get("value")), f"{name} part"))
    return "".join(pieces)


def _tool_call(text: str) -> Message:
    """A ShareGPT `function_call` turn, whose text is the call as JSON; plain text where it is not."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return {"role": "assistant", "content": text}
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{name} holds a {type_name(value)} where a message should be")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or role.strip().lower() not in _ROLES:
        told = f"the role {role[:60]!r}" if isinstance(role, str) else "no role" if role is None else f"a {type_name(role)} as its role"
        raise BadRow("bad_messages", f"{name} holds a message with {told}")
    raw_role = role.strip().lower()
    content = value["content"] if "content" in value else value.get("value", value.get("text"))
    calls = value.get("tool_calls")
    if content is None and calls:
        content = ""
    text = _content(content, name)
    if raw_role == "function_call":
        return _tool_call(text)
    message: Message = {"role": _ROLES[raw_role], "content": text}
    message.update({key: value[key] for key in _KEPT_KEYS if value.get(key)})
    return message


def read_messages(value: Any, name: str) -> tuple[Message, ...]:
    """A conversation in any dialect (OpenAI, ShareGPT, typed parts, one single message, `datasets`' dict of lists) as messages.

    Raises:
        BadRow: it is not one.
    """
    if isinstance(value, Mapping):
        nested = value.get("messages", value.get("conversations"))
        if isinstance(nested, (list, tuple)):
            value = nested
        else:
            lists = {
                key: item for key, item in value.items() if isinstance(item, (list, tuple)) and key in {"role", "from", "content", "value"}
            }
            if {"role", "from"} & lists.keys() and len(lists) == 2 and len({len(item) for item in lists.values()}) == 1:
                value = [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
            else:
                value = [value]
    if not isinstance(value, (list, tuple)):
        raise BadRow(
            "missing_field" if value is None else "wrong_type", f"{name} is {'null' if value is None else 'a ' + type_name(value)}"
        )
    if not value:
        raise BadRow("empty_prompt" if name == "prompt" else "empty_answer", f"{name} has no messages")
    return tuple(_message(item, name) for item in value)


def read_text_or_messages(value: Any, name: str) -> Text:
    """Text as it stands, or messages.

    Raises:
        BadRow: neither.
    """
    if isinstance(value, (list, tuple, Mapping)):
        return read_messages(value, name)
    return check_text(value, name)


def looks_like_messages(value: Any) -> bool:
    """Whether the value is a message or a list that begins with one."""
    if isinstance(value, (list, tuple)):
        return bool(value) and looks_like_messages(value[0])
    return isinstance(value, Mapping) and bool({"role", "from"} & value.keys())


def is_transcript(value: Any) -> bool:
    """Whether a text is an HH transcript: `Human:` at its start and `Assistant:` after a blank line."""
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None and "\n\nAssistant:" in value


def read_transcript(value: Any, name: str) -> tuple[Message, ...]:
    """The turns of an HH transcript (`\\n\\nHuman: … \\n\\nAssistant: …`); white space around a turn belongs to the transcript.

    Raises:
        BadRow: not text, or not a transcript.
    """
    text = check_text(value, name)
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise BadRow("bad_messages", f"{name} does not begin with 'Human:' or 'Assistant:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(
        {"role": "user" if mark[1] == "Human" else "assistant", "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    )


def split_conversations(conversations: Sequence[tuple[Message, ...]]) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """(prompt, responses) of whole conversations that differ in their answer.

    The answer is the last assistant turn. Where the turns before it differ, the answers may still be runs of tool calls after a common
    beginning; anything else is two different prompts.

    Raises:
        BadRow: a conversation does not end with the assistant, or the prompts differ.
    """
    for messages in conversations:
        if messages[-1]["role"] != "assistant":
            raise BadRow("bad_messages", f"the conversation ends with {messages[-1]['role']}")
    whole = next((messages for messages in conversations if is_whole(messages)), None)
    if whole is not None:  # an answer that stands alone is one to the same prompt
        conversations = [messages if is_whole(messages) else (*whole[:-1], *messages) for messages in conversations]
    first = conversations[0]
    if all(messages[:-1] == first[:-1] for messages in conversations):
        return first[:-1], tuple(messages[-1:] for messages in conversations)
    shared = 0
    while all(len(messages) > shared and messages[shared] == first[shared] for messages in conversations):
        shared += 1
    rests = tuple(messages[shared:] for messages in conversations)
    if not all(_is_run_of_one_answer(rest) for rest in rests):
        raise BadRow("prompts_differ", f"the conversations part at turn {shared + 1}, before their last answers")
    return first[:shared], rests


def is_whole(messages: Text) -> bool:
    """Whether messages are a whole conversation, with the prompt inside."""
    return not isinstance(messages, str) and any(message["role"] in {"user", "system"} for message in messages)


def _is_run_of_one_answer(messages: tuple[Message, ...]) -> bool:
    """Whether the turns are one answer: a single assistant turn, or a run of assistant and tool turns that calls tools."""
    roles = [message["role"] for message in messages]
    if not roles or roles[0] != "assistant" or not set(roles) <= {"assistant", "tool"}:
        return False
    return len(roles) == 1 or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def as_messages(text: Text, role: str) -> tuple[Message, ...]:
    """Messages as they are; text as one message of that role."""
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def plain_text(text: Text) -> str:
    """The words of a text or conversation, for comparing and measuring; turns are parted by blank lines."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


def is_empty_answer(answer: Text) -> bool:
    """Whether nothing would be trained: blank text, or messages of which none has words or a tool call."""
    if isinstance(answer, str):
        return is_blank(answer)
    return not any(m.get("tool_calls") or not is_blank(m["content"]) for m in answer if m["role"] == "assistant")


def is_empty_prompt(prompt: Text) -> bool:
    """Whether nothing is asked: blank text, or a last turn without words."""
    if isinstance(prompt, str):
        return is_blank(prompt)
    return not prompt or is_blank(prompt[-1]["content"]) or all(message["role"] == "system" for message in prompt)


def read_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """The tools of a row: a list of objects, or the same as JSON text; None where there are none.

    Raises:
        BadRow: something else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("wrong_type", "tools is text that is not JSON") from None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("wrong_type", f"tools is a {type_name(value)}, not a list of objects")
    return tuple(dict(tool) for tool in value) or None
