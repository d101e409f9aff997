"""What has to be known about a chat template, found by rendering sentinels with it and looking at what comes out.

Templates differ in every way that a grammar of them could miss, so none of it is read from their Jinja text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orpo.data.chat.ends import CallStyle, End, find_calls, last_shared
from orpo.data.chat.render import ChatRenderer, TemplateFailed
from orpo.data.chat.special import common_start, pattern_of
from orpo.data.types import Message
from orpo.errors import DataError

_SENTINEL_SYSTEM = "Systemsentinelqs"
_SENTINEL_REASON = "Reasonsentinelqr"
_SENTINEL_USER = "Usersentinelqv"
_SENTINEL_ANSWERS = ("Answersentinelqw", "Replysentinelqzz, of another length")

PROBE_ANSWERS = ("Hello", "hello there", "I am", "The answer", "a", "is", "Yes", "no", "7", "- x", '"Yes"')
"""Beginnings that answers commonly have: a prompt's tokens must stay the same before all of them."""

_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "toolsentinelqx", "description": "Sentinel", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What probing showed about a template.

    Attributes:
        boundary: which text ends a prompt: "generation_prompt", "generation_prompt_stripped" (without trailing blanks),
            "before_answer" (what precedes the answer in a whole conversation) or "before_answer_stripped".
        end: how an answer ends.
        call_end: how an answer that calls a tool ends, where that is otherwise.
        call_form: how tool calls are wanted (see `orpo.data.chat.ends.CALL_FORMS`); None where the template prints none.
        prints_tools: the tools given are printed.
        wants_parts: contents must be lists of typed parts.
        takes_parts: contents may be lists of typed parts.
        system: "printed", "ignored" or "refused".
        control_tokens: texts of special tokens, and of added tokens that the template itself prints around turns.
        markers: role markers that the template prints as plain text, such as "[/INST]".
        pure_bos: the beginning-of-text token, where the template prints it first and only there; else None.
        openers: special tokens or role markers that a rendered conversation starts with.
        user_end, turn_gap, answer_header: the parts of what stands between a user's text and the answer: "<|im_end|>", a line break,
            "<|im_start|>assistant". Of the header only what answers of every kind have.
        before, generation, trained: what stands between a user's text and an answer; the same in the prompt that the template gives for
            generation (None where it knows none), and in the prompt that is trained.
        dialogue: a conversation of two exchanges, as the template prints it.
        printed_tokens: added tokens that the template prints around plain messages.
    """

    boundary: str
    end: End
    call_end: End
    call_form: tuple[bool, bool] | None
    prints_tools: bool
    wants_parts: bool
    takes_parts: bool
    system: str
    control_tokens: tuple[str, ...]
    markers: tuple[str, ...]
    pure_bos: str | None
    openers: tuple[str, ...]
    user_end: str
    turn_gap: str
    answer_header: str
    before: str
    generation: str | None
    trained: str
    dialogue: str
    printed_tokens: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        return {
            "boundary": self.boundary,
            "after_answer": self.end.after,
            "system": self.system,
            "control_tokens": list(self.control_tokens),
        }

    @property
    def is_generation_trained(self) -> bool:
        """Whether the prompt that is trained is the one that the template gives for generation (or it gives none)."""
        return self.generation is None or self.generation == self.trained

    @property
    def is_generation_inside(self) -> bool:
        """Whether more of the template follows the generation prompt before a plain answer begins (an empty think block, a channel)."""
        return self.generation is not None and bool(self.before.removeprefix(self.generation).strip())


def as_content(text: str, *, is_parts: bool) -> str | list[dict[str, str]]:
    """A message's content in the form that the template takes."""
    return [{"type": "text", "text": text}] if is_parts else text


def sentinel_for(texts: str) -> str:
    """A word that stands for an answer and does not occur in `texts`."""
    word = _SENTINEL_ANSWERS[0]
    while word in texts:
        word += "q"
    return word


def added_token_texts(tokenizer: Any, *, special_only: bool) -> dict[str, int]:
    """Texts of the tokenizer's added tokens with their ids; blank ones (runs of spaces) are left out."""
    found = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special or not special_only}
    found.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: index for text, index in found.items() if text.strip()}


class _Probe:
    """One template under test; each method finds one fact."""

    def __init__(self, render: ChatRenderer, encode: Callable[[list[str]], list[list[int]]]) -> None:
        self.render, self.encode, self.tokenizer = render, encode, render.tokenizer
        self.added = added_token_texts(self.tokenizer, special_only=False)
        self.tokens = pattern_of(list(self.added))
        self.wants_parts = False
        self.lead: tuple[str, ...] = ("user",)
        self.tools: list[dict[str, Any]] | None = None

    def messages(self, *roles: str, user: str = _SENTINEL_USER, answer: str = _SENTINEL_ANSWERS[0]) -> list[Message]:
        texts = {"system": _SENTINEL_SYSTEM, "user": user, "assistant": answer}
        return [{"role": role, "content": as_content(texts[role], is_parts=self.wants_parts)} for role in roles]

    def try_render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str | None:
        try:
            return self.render(messages, tools=self.tools, generation_prompt=generation_prompt)
        except TemplateFailed:
            return None

    def find_form(self) -> None:
        """Find the plainest conversation that the template prints: strings or typed parts, a system message, tools."""
        failures = []
        for self.tools in (None, [_TOOL]):
            for self.wants_parts in (False, True):
                for self.lead in (("user",), ("system", "user")):
                    try:
                        text = self.render(self.messages(*self.lead, "assistant"), tools=self.tools)
                    except TemplateFailed as error:
                        failures.append(str(error))
                        continue
                    if text.count(_SENTINEL_ANSWERS[0]) == 1 and text.count(_SENTINEL_USER) == 1:
                        return
                    failures.append("it does not print what the assistant says")
        raise DataError(
            f"the {self.render.name} cannot render one user and one assistant message: {failures[0]}",
            where="chat_template",
            expected="a template that prints each message once",
            mend="give another template: chat_template: chatml, or chat_template: PATH to a Jinja file",
        )

    def around_answer(self) -> tuple[str, str]:
        """The text before and after an answer, the same for two different answers."""
        found = []
        for word in _SENTINEL_ANSWERS:
            found.append(self.render(self.messages(*self.lead, "assistant", answer=word), tools=self.tools).partition(word)[::2])
        if found[0] != found[1]:
            raise _unprovable(self.render.name, "what it prints around an answer depends on the answer")
        return found[0]

    def end(self, after: str, second_turn: str) -> End:
        """What ends an answer."""
        match = last_shared(after, second_turn, self.tokens)
        if match:
            return End(after, after[: match.end()], self.added[match.group()])
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"the {self.render.name} prints no special token after an answer and the tokenizer has no eos_token: "
                "nothing could tell the model where an answer ends",
                where="chat_template",
                mend="set the tokenizer's eos_token, or use chat_template: chatml",
            )
        return End(after, after.rstrip(), int(self.tokenizer.eos_token_id), is_appended=True)

    def calls(self, end: End) -> CallStyle | None:
        """How tool calls are printed."""
        special = added_token_texts(self.tokenizer, special_only=True)
        ends = self.tokens.findall(end.text)[-1:]
        return find_calls(self.try_render, self.messages(*self.lead), self.tokens, lambda text: text in special or text in ends)

    def call_end(self, style: CallStyle | None, end: End) -> End:
        """What ends an answer that calls a tool."""
        if style is None:
            return end
        if not style.terminator:
            return End("", "", end.terminator_id, is_appended=True) if end.is_appended else end
        return End(style.end, style.terminator, self.added[style.terminator])

    def before_reasoning(self) -> list[str]:
        """What stands between a user's text and the reasoning before an answer, given as a field or as a part of the text."""
        *lead, answer = self.messages(*self.lead, "assistant")
        fields = {**answer, "reasoning_content": _SENTINEL_REASON, "thinking": _SENTINEL_REASON}
        tagged = self.messages("assistant", answer=f"{_SENTINEL_REASON}</think>{_SENTINEL_ANSWERS[0]}")
        texts = [(self.try_render([*lead, last]) or "").partition(_SENTINEL_USER)[2] for last in (fields, *tagged)]
        return [text.partition(_SENTINEL_REASON)[0] for text in texts if _SENTINEL_REASON in text]

    def prints_tools(self) -> bool:
        """Whether the tools of a row are printed."""
        try:
            return str(_TOOL["function"]["name"]) in self.render(self.messages(*self.lead), tools=[_TOOL], generation_prompt=True)
        except TemplateFailed:
            return False

    def boundary(self, before: str, ending: str) -> tuple[str, str, str | None]:
        """Which text ends a prompt, and that text; proved on the tokens of several answers. And the generation prompt, if there is one."""
        prompt = self.messages(*self.lead)
        generation, bare = self.try_render(prompt, generation_prompt=True), self.try_render(prompt)
        candidates: list[tuple[str, str]] = []
        if generation is not None and generation == bare and before[len(generation) :].strip():
            generation = None  # add_generation_prompt is not known: a header is still to come
        if generation is not None:
            candidates = [("generation_prompt", generation), ("generation_prompt_stripped", generation.rstrip())]
        candidates += [("before_answer", before), ("before_answer_stripped", before.rstrip())]
        full_ids = self.encode([before + answer + ending for answer in PROBE_ANSWERS])
        for name, text in candidates:
            ids = self.encode([text])[0]
            if before.startswith(text) and ids and all(full[: len(ids)] == ids for full in full_ids):
                return name, text, generation
        raise _unprovable(self.render.name, "no text before the answer is tokenized alike with and without the answer")

    def system(self) -> str:
        text = self.try_render(self.messages("system", "user", "assistant"))
        if text is None:
            return "refused"
        return "printed" if _SENTINEL_SYSTEM in text else "ignored"

    def takes_parts(self) -> bool:
        parts = [{"role": role, "content": as_content(_SENTINEL_USER, is_parts=True)} for role in (*self.lead, "assistant")]
        text = self.try_render(parts)
        return text is not None and text.count(_SENTINEL_USER) == len(parts) and "'type'" not in text and '"type"' not in text


def _unprovable(name: str, why: str) -> DataError:
    return DataError(
        f"the end of the prompt cannot be proved on the tokens for the {name}: {why}",
        where="chat_template",
        expected="a template under which prompt and answer are a prefix and its continuation",
        mend="use chat_template: chatml, or a template that prints earlier turns the same whatever follows",
    )


def _is_marker(text: str) -> bool:
    """Whether a piece that a template prints can hardly be a word of a sentence: "[INST]" and "### User:", but not "assistant"."""
    return len(text) > 2 and re.search(r"^\W|\W$", text) is not None


def leading_blanks(text: str) -> str:
    """The white space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]


def _first_marker(opening: str, tokens: re.Pattern[str]) -> str:
    """The special token or role marker that a conversation starts with, or nothing."""
    opening = opening.lstrip()
    found = tokens.match(opening)
    line = opening.split("\n")[0].strip()
    return found.group() if found else line if _is_marker(line) else ""


def _common_header(texts: Sequence[str], tokens: re.Pattern[str]) -> str:
    """What all of the texts begin with, no token of them cut in two."""
    shared = common_start(list(texts))
    for match in tokens.finditer(texts[0]):
        if match.start() < len(shared) < match.end():
            return shared[: match.start()]
    return shared


def _user_end(bare: str, header: str, tokens: re.Pattern[str]) -> str:
    """What ends a user's turn, of what stands behind it without a generation prompt; up to its first token where that is not the beginning
    of the header."""
    if header.startswith(bare):
        return bare
    found = tokens.search(header)
    return header[: found.end()] if found else ""


_INSIDE_ANSWERS = re.compile(r"</?(think|thinking|reasoning|seed:think|tool_calls?)>|\[/?THINK\]|◁/?think▷")
"""Marks that an answer may well contain, and that open no role; some tokenizers have them among their special tokens."""


def _control_tokens(probe: _Probe, opening: str, others: str, header: str) -> set[str]:
    """Tokens that may open or close a role: special ones, but for the marks of reasoning and calls, and those that the template prints
    around turns.

    Of the opening only its first and last token: between them a default system prompt may speak of any token ("between <think> and
    </think>"). Of the header only its first: behind it stand think blocks and the like, which answers may well contain.
    """
    tokens = probe.tokens
    first = tokens.findall(opening)
    special = {text for text in added_token_texts(probe.tokenizer, special_only=True) if not _INSIDE_ANSWERS.fullmatch(text)}
    return {
        *special,
        *first[:1],
        *first[-1:],
        *tokens.findall(others),
        *tokens.findall(header)[:1],
    }


def probe_template(render: ChatRenderer, encode: Callable[[list[str]], list[list[int]]]) -> TemplateFacts:
    """Find out how a template ends prompts and answers.

    Args:
        render: the template.
        encode: texts to ids, without adding special tokens.

    Raises:
        DataError: it raises on the plainest conversation, runs too long, does not print the answer, or its boundary cannot be proved.
    """
    probe = _Probe(render, encode)
    probe.find_form()
    before, after = probe.around_answer()
    dialogue = probe.try_render(probe.messages(*probe.lead, "assistant", "user", "assistant")) or before
    second_turn = dialogue.partition(_SENTINEL_ANSWERS[0])[2].partition(_SENTINEL_USER)[0]
    end = probe.end(after, second_turn)
    calls = probe.calls(end)
    boundary, prompt, generation = probe.boundary(before, end.text)

    opening, _, trained = prompt.partition(_SENTINEL_USER)
    behind = before.partition(_SENTINEL_USER)[2]
    ahead = generation.partition(_SENTINEL_USER)[2] if generation is not None else None
    inner = dialogue.partition(_SENTINEL_USER)[2].partition(_SENTINEL_ANSWERS[0])[0]
    tokens = probe.tokens
    shared = _common_header([text for text in (trained, behind, ahead, inner, *probe.before_reasoning()) if text], tokens)
    bare = (probe.try_render(probe.messages(*probe.lead)) or "").partition(_SENTINEL_USER)[2]
    user_end = _user_end(bare, shared, tokens)
    header = shared[len(user_end) :]
    bos = render.tokenizer.bos_token
    pure_bos = bos if bos and dialogue.startswith(bos) and dialogue.count(bos) == 1 else None
    with_system = probe.try_render(probe.messages("system", "user")) or ""
    openings = [opening, with_system.partition(_SENTINEL_SYSTEM)[0]]
    openers = {_first_marker(text.lstrip().removeprefix(pure_bos or ""), tokens) for text in openings} | {pure_bos or ""}
    markers = {line.strip() for piece in (trained, second_turn, end.text) for line in tokens.sub("\n", piece).split("\n")}
    return TemplateFacts(
        boundary=boundary,
        end=end,
        call_end=probe.call_end(calls, end),
        call_form=calls.form if calls else None,
        prints_tools=probe.prints_tools(),
        wants_parts=probe.wants_parts,
        takes_parts=probe.wants_parts or probe.takes_parts(),
        system=probe.system(),
        control_tokens=tuple(sorted(_control_tokens(probe, opening, user_end + second_turn + end.text, header))),
        markers=tuple(sorted(filter(_is_marker, markers))),
        pure_bos=pure_bos,
        openers=tuple(sorted(openers - {""})),
        user_end=user_end.strip(),
        turn_gap=user_end[len(user_end.rstrip()) :] + leading_blanks(header),
        answer_header=header.strip(),
        before=behind,
        generation=ahead,
        trained=trained,
        dialogue=dialogue,
        printed_tokens=tuple(sorted(set(tokens.findall("\0".join((dialogue, before, generation or "")))))),
    )
