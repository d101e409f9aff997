"""A Modelfile beside a GGUF file: how Ollama puts messages together, in Go's template language, and where an answer stops.

The chat template's own parts are read off what it prints for a few talks; the Go template made from them is written only where it prints
the same for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

_SYSTEM, _FIRST, _ANSWER, _SECOND = "SYSTEMWORDS", "FIRSTWORDS", "ANSWERWORDS", "SECONDWORDS"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template puts around contents.

    Attributes:
        start: the beginning-of-text token, where it is not the tokenizer that puts it there.
        default: what stands before the first turn of a talk without a system message.
        system: before and after its content; None where the template has no turn of its own for it.
        user, assistant: before and after.
        opening: of the answer that is asked for.
    """

    start: str
    default: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str

    def render(self, messages: Messages) -> str:
        """What the Go template prints."""
        parts = [self.start, "" if any(message["role"] == "system" for message in messages) else self.default]
        for message in messages:
            before, after = {"system": self.system, "user": self.user, "assistant": self.assistant}[message["role"]] or ("", "")
            parts.append(before + message["content"] + after)
        return "".join([*parts, self.opening])

    def to_go(self) -> str:
        """The template in Ollama's terms."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        branches = [
            f'if eq $m.Role "{role}" }}}}{_literal(around[0])}{{{{ $m.Content }}}}{_literal(around[1])}'
            for role, around in roles.items()
            if around is not None
        ]
        default = f"{{{{ if not .System }}}}{_literal(self.default)}{{{{ end }}}}" if self.default else ""
        loop = "{{ range $i, $m := .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}"
        return f"{_literal(self.start)}{default}{loop}{_literal(self.opening)}"


def write_modelfile(
    gguf: Path, tokenizer: PreTrainedTokenizerBase, *, stop_token_ids: Sequence[int] = (), system: str | None = None
) -> Path:
    """Write `<name>.Modelfile` beside a GGUF file: `ollama create NAME -f <name>.Modelfile`.

    Args:
        stop_token_ids: ids at which an answer ends, beside the tokenizer's own.
        system: the system message that Ollama puts before every talk that has none.

    Raises:
        UserError: a system message that cannot be quoted.
    """
    lines = [f"FROM ./{gguf.name}"]
    turns = turns_of(tokenizer)
    if turns is None:
        logger.warning(
            "the chat template cannot be said in Ollama's terms; the Modelfile has none, and Ollama guesses one from the GGUF file"
        )
        lines.append("# The chat template in the GGUF file cannot be said in Ollama's terms; check what Ollama makes of it.")
    else:
        if turns.system is None:
            lines.append("# The chat template has no turn for a system message: Ollama would leave one out.")
        if "strftime_now" in str(tokenizer.chat_template):
            lines.append("# A date in the template is that of the export.")
        lines.append(f"TEMPLATE {_quoted(turns.to_go())}")
    ids = dict.fromkeys([*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *stop_token_ids])
    lines += [f'PARAMETER stop "{_escaped(tokenizer.convert_ids_to_tokens(token_id))}"' for token_id in ids]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    path = gguf.with_suffix(".Modelfile")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The parts of a tokenizer's chat template; None where it does more than put parts around contents."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        turns = _read_off(tokenizer)
    except Exception:  # a template may raise anything for a talk that it does not like
        return None
    if turns is None:
        return None
    bos = str(tokenizer.bos_token) if tokenizer.bos_token and not turns.start and _adds_bos(tokenizer) else ""
    for messages in _cases(has_system=turns.system is not None):
        printed = _print(tokenizer, messages, True)
        if printed.removeprefix(bos) != turns.render(messages):
            return None
    return turns


def _read_off(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    first, answer = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
    talk = _print(tokenizer, [first, answer, {"role": "user", "content": _SECOND}], True)
    head, rest = talk.split(_FIRST)
    to_answer, rest = rest.split(_ANSWER)
    to_second, end = rest.split(_SECOND)
    after_user = _print(tokenizer, [first], False).split(_FIRST)[1]
    after_answer = _print(tokenizer, [first, answer], False).split(_ANSWER)[1]
    if not (to_answer.startswith(after_user) and end.startswith(after_user) and to_second.startswith(after_answer)):
        return None
    before_user = to_second.removeprefix(after_answer)
    if not head.endswith(before_user):
        return None
    bos = str(tokenizer.bos_token or "")
    default = head.removesuffix(before_user)
    has_bos = bool(bos) and default.startswith(bos)  # not where every turn opens with it
    system = _system_around(tokenizer, before_user)
    if system is not None and has_bos:
        system = (system[0].removeprefix(bos), system[1])
    return Turns(
        start=bos if has_bos and not _adds_bos(tokenizer) else "",  # or it would be there twice
        default=default.removeprefix(bos) if has_bos else default,
        system=system,
        user=(before_user, after_user),
        assistant=(to_answer.removeprefix(after_user), after_answer),
        opening=end.removeprefix(after_user),
    )


def _system_around(tokenizer: PreTrainedTokenizerBase, before_user: str) -> tuple[str, str] | None:
    try:
        talk = _print(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _FIRST}], True)
        before, rest = talk.split(_SYSTEM)
        after = rest.split(_FIRST)[0]
    except Exception:  # as above
        return None
    return (before, after.removesuffix(before_user)) if after.endswith(before_user) else None


def _print(tokenizer: PreTrainedTokenizerBase, messages: Messages, is_asking: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_asking))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer, and with it the GGUF file, puts the beginning of a text there by itself."""
    ids: Any = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _cases(*, has_system: bool) -> list[Messages]:
    system = [{"role": "system", "content": "Be brief.\nSay why."}]
    ask = {"role": "user", "content": 'What is {{ x }} in "Go"?\n\nÅ 日本 🙂'}
    answer = {"role": "assistant", "content": "```go\nx := 1\n```\nDone."}
    talks = [[ask], [ask, answer, ask], [ask, answer, ask, answer, ask]]
    return talks + ([system + talk for talk in talks] if has_system else [])


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    if '"""' in text:
        raise UserError('a Modelfile cannot hold three quotes (""") in a text', where="SYSTEM or TEMPLATE")
    return f'"""{text}"""'


def _escaped(text: Any) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"')
