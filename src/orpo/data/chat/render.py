"""Rendering of chat templates: bounded in time, and understood by probing them rather than by reading their Jinja text.

A template is somebody else's program. It runs in transformers' sandbox and, here, under a time limit. What the rest of the package has
to know about it (where a prompt ends, what ends an answer, which tokens mark roles) is found by rendering sentinels and looking at what
comes out, since templates differ in every way that a grammar of them could miss.
"""

from __future__ import annotations

import ctypes
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orpo.data.chat.special import pattern_of, strings_of
from orpo.data.types import Message
from orpo.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

RENDER_LIMIT_S = 3.0
"""Seconds that one rendering may take; an honest template needs well under a millisecond."""

_MOST_EXTRA_CHARS = 1 << 20
"""Characters that a template may print over and above ten times what the messages hold."""

_SENTINEL_USER = "Usersentinelqv"
_SENTINEL_ANSWERS = ("Answersentinelqw", "Replysentinelqzz, of another length")

PROBE_ANSWERS = ("Hello", "hello there", "I am", "The answer", "a", "is", "Yes", "no", "7", "- x", '"Yes"')
"""Beginnings that answers commonly have: a prompt's tokens must stay the same before all of them."""


class TemplateFailed(Exception):
    """The template raised on these messages; the text says what it said."""


class _TimedOut(BaseException):
    """Not an `Exception`, so that nothing between the limit and its owner can swallow it."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise `_TimedOut` inside the block once `limit_s` seconds have passed.

    In the main thread a timer of the process's own running time does it, by a signal: Python's long C loops (such as `9 ** 9 ** 9`) look
    for signals as well, and a machine that was asleep is no template's fault. Elsewhere, and where there are no such timers, another
    thread raises it at the next bytecode.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        yield from _limit_by_signal(limit_s)
    else:
        yield from _limit_by_thread(limit_s)


def _limit_by_signal(limit_s: float) -> Iterator[None]:
    def expire(signum: int, frame: object) -> None:
        raise _TimedOut

    previous = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous if previous is not None else signal.SIG_DFL)


def _limit_by_thread(limit_s: float) -> Iterator[None]:
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def expire() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(_TimedOut))

    timer = threading.Timer(limit_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        timer.cancel()


class ChatRenderer:
    """Messages to text, by one template, with a time limit.

    Args:
        tokenizer: a transformers tokenizer.
        template: Jinja text; None leaves the choice to the tokenizer (it may hold several by name).
        name: what errors call the template.
        variables: further variables that the template sees (`enable_thinking=False`, ...).
    """

    def __init__(self, tokenizer: Any, template: str | None, *, name: str, variables: dict[str, Any] | None = None) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.variables = variables or {}

    def __call__(
        self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None, generation_prompt: bool = False
    ) -> str:
        """The text of the conversation.

        Raises:
            TemplateFailed: the template raised, or printed far more than it was given.
            DataError: it ran past the time limit.
        """
        text: str = self._run(messages, tools=tools, add_generation_prompt=generation_prompt, tokenize=False)
        if len(text) > _MOST_EXTRA_CHARS and len(text) > _MOST_EXTRA_CHARS + 10 * sum(map(len, strings_of([messages, tools]))):
            raise TemplateFailed(f"it printed {len(text)} characters for a conversation far shorter")
        return text

    def reference_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """What transformers itself makes of the conversation: the oracle that the fast path is held to."""
        return list(self._run(messages, tools=tools, add_generation_prompt=False, tokenize=True, return_dict=False))

    def _run(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None, **options: Any) -> Any:
        try:
            with time_limit(RENDER_LIMIT_S):
                return self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    chat_template=self.template,
                    **options,
                    **self.variables,
                )
        except _TimedOut:
            raise DataError(
                f"the {self.name} ran longer than {RENDER_LIMIT_S:g} s on one conversation and was stopped",
                expected="a template that renders a conversation in milliseconds",
                mend="look at the template before trusting its source, or give another one: chat_template: PATH",
            ) from None
        except Exception as error:  # whatever a foreign program raises is one thing here: this conversation cannot be rendered
            line = getattr(error, "lineno", None)
            text = str(error) or type(error).__name__
            raise TemplateFailed(f"line {line}: {text}" if line else text) from error


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What probing showed about a template.

    Attributes:
        boundary: which text ends a prompt: "generation_prompt", "generation_prompt_stripped" (without trailing blanks),
            "before_answer" (what precedes the answer in a whole conversation) or "before_answer_stripped".
        after: what the template prints after an answer.
        ending: the part of it that is trained: up to and including the terminator, or without trailing blanks if there is none.
        terminator_id: the id that ends an answer.
        is_eos_appended: the template prints no special token after an answer, so `eos_token` is appended.
        wants_parts: contents must be lists of typed parts.
        takes_parts: contents may be lists of typed parts.
        system: "printed", "ignored" or "refused".
        control_tokens: texts of special tokens, and of added tokens that the template itself prints around turns.
        markers: role markers that the template prints as plain text, such as "[/INST]".
        pure_bos: the beginning-of-text token, where the template prints it first and only there; else None.
        openers: special tokens or role markers that a rendered conversation starts with.
        user_end, turn_gap, answer_header: the parts of what stands between a user's text and the answer: "<|im_end|>", a line break,
            "<|im_start|>assistant".
        prompt_gap, answer_gap: blanks after that header, as far as they belong to the prompt; and all of them.
    """

    boundary: str
    after: str
    ending: str
    terminator_id: int
    is_eos_appended: bool
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
    prompt_gap: str
    answer_gap: str


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
        self.wants_parts = False
        self.lead: tuple[str, ...] = ("user",)

    def messages(self, *roles: str, user: str = _SENTINEL_USER, answer: str = _SENTINEL_ANSWERS[0]) -> list[Message]:
        texts = {"system": "Systemsentinelqs", "user": user, "assistant": answer}
        return [{"role": role, "content": as_content(texts[role], is_parts=self.wants_parts)} for role in roles]

    def try_render(self, messages: list[Message], *, generation_prompt: bool = False) -> str | None:
        try:
            return self.render(messages, generation_prompt=generation_prompt)
        except TemplateFailed:
            return None

    def find_form(self) -> None:
        """Find the plainest conversation that the template prints: with or without a system message, strings or typed parts."""
        failure = "it does not print what the assistant says"
        for self.wants_parts in (False, True):
            for self.lead in (("user",), ("system", "user")):
                try:
                    text = self.render(self.messages(*self.lead, "assistant"))
                except TemplateFailed as error:
                    failure = str(error)
                    continue
                if text.count(_SENTINEL_ANSWERS[0]) == 1 and text.count(_SENTINEL_USER) == 1:
                    return
        raise DataError(
            f"the {self.render.name} cannot render one user and one assistant message: {failure}",
            where="chat_template",
            expected="a template that prints each message once",
            mend="give another template: chat_template: chatml, or chat_template: PATH to a Jinja file",
        )

    def around_answer(self) -> tuple[str, str]:
        """The text before and after an answer, the same for two different answers."""
        found = [self.render(self.messages(*self.lead, "assistant", answer=word)).partition(word)[::2] for word in _SENTINEL_ANSWERS]
        if found[0] != found[1]:
            raise _unprovable(self.render.name, "what it prints around an answer depends on the answer")
        return found[0]

    def ending(self, after: str) -> tuple[str, int, bool]:
        """What ends an answer: its text, the terminator's id, whether eos is appended."""
        match = pattern_of(list(self.added)).search(after)
        if match:
            return after[: match.end()], self.added[match.group()], False
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"the {self.render.name} prints no special token after an answer and the tokenizer has no eos_token: "
                "nothing could tell the model where an answer ends",
                where="chat_template",
                mend="set the tokenizer's eos_token, or use chat_template: chatml",
            )
        return after.rstrip(), int(self.tokenizer.eos_token_id), True

    def boundary(self, before: str, ending: str) -> tuple[str, str]:
        """Which text ends a prompt, and that text; proved on the tokens of several answers."""
        prompt = self.messages(*self.lead)
        generation, bare = self.try_render(prompt, generation_prompt=True), self.try_render(prompt)
        candidates: list[tuple[str, str]] = []
        is_supported = generation is not None and (generation != bare or not before[len(generation) :].strip())
        if generation is not None and is_supported:
            candidates = [("generation_prompt", generation), ("generation_prompt_stripped", generation.rstrip())]
        candidates += [("before_answer", before), ("before_answer_stripped", before.rstrip())]
        full_ids = self.encode([before + answer + ending for answer in PROBE_ANSWERS])
        for name, text in candidates:
            ids = self.encode([text])[0]
            if before.startswith(text) and ids and all(full[: len(ids)] == ids for full in full_ids):
                return name, text
        raise _unprovable(self.render.name, "no text before the answer is tokenized alike with and without the answer")

    def system(self) -> str:
        text = self.try_render(self.messages("system", "user", "assistant"))
        if text is None:
            return "refused"
        return "printed" if "Systemsentinelqs" in text else "ignored"

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


def _leading_blanks(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _first_marker(opening: str, tokens: re.Pattern[str]) -> str:
    """The special token or role marker that a conversation starts with, or nothing."""
    found = tokens.match(opening)
    line = opening.split("\n")[0].strip()
    return found.group() if found else line if _is_marker(line) else ""


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
    ending, terminator_id, is_eos_appended = probe.ending(after)
    boundary, prompt = probe.boundary(before, ending)

    opening, _, between = prompt.partition(_SENTINEL_USER)
    dialogue = probe.try_render(probe.messages(*probe.lead, "assistant", "user", "assistant")) or before
    second_turn = dialogue.partition(_SENTINEL_ANSWERS[0])[2].partition(_SENTINEL_USER)[0]
    tokens = pattern_of(list(probe.added))
    bos = render.tokenizer.bos_token
    pure_bos = bos if bos and dialogue.startswith(bos) and dialogue.count(bos) == 1 else None
    with_system = probe.try_render(probe.messages("system", "user")) or ""
    openings = [opening, with_system.partition("Systemsentinelqs")[0]]
    openers = {_first_marker(text.removeprefix(pure_bos or ""), tokens) for text in openings} | {pure_bos or ""}
    found = tokens.search(between)
    user_end, rest = (between[: found.end()].strip(), between[found.end() :]) if found else ("", between)
    header = rest.strip()
    # Of the header only its first token: behind it stand think blocks and the like, which answers may well contain.
    printed = [*tokens.findall(opening + user_end + second_turn + ending), *tokens.findall(header)[:1]]
    control = set(added_token_texts(render.tokenizer, special_only=True)) | set(printed)
    markers = {line.strip() for piece in (between, second_turn, ending) for line in tokens.sub("\n", piece).split("\n")}
    return TemplateFacts(
        boundary=boundary,
        after=after,
        ending=ending,
        terminator_id=terminator_id,
        is_eos_appended=is_eos_appended,
        wants_parts=probe.wants_parts,
        takes_parts=probe.wants_parts or probe.takes_parts(),
        system=probe.system(),
        control_tokens=tuple(sorted(control)),
        markers=tuple(sorted(filter(_is_marker, markers))),
        pure_bos=pure_bos,
        openers=tuple(sorted(openers - {""})),
        user_end=user_end,
        turn_gap=_leading_blanks(rest),
        answer_header=header,
        prompt_gap=prompt[len(prompt.rstrip()) :],
        answer_gap=_leading_blanks(before[len(prompt.rstrip()) :]),
    )
