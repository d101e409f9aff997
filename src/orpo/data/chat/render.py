"""Rendering of chat templates: bounded in time, and understood by probing them rather than by reading their Jinja text.

A template is somebody else's program. It runs in transformers' sandbox and, here, under a time limit. What the rest of the package has
to know about it (where a prompt ends, what ends an answer, which tokens mark roles) is found by rendering sentinels and looking at what
comes out, since templates differ in every way that a grammar of them could miss.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any

from orpo.data.chat.dates import dated, read_date
from orpo.data.chat.special import strings_of
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

_PLAIN_KEYS = {"role", "content"}
_MOST_EXTRA_CHARS = 1 << 20
"""Characters that a template may print over and above ten times what the messages hold."""


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
        date: what the template's today is; now, if not given.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, *, name: str, variables: dict[str, Any] | None = None, date: datetime | None = None
    ) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.variables, self.date = variables or {}, date or read_date(None)

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

    def _source(self, tools: Sequence[dict[str, Any]] | None) -> str:
        """The text of the template that renders a row: tokenizers with several choose by whether there are tools."""
        if self.template is not None:
            return self.template
        return str(self.tokenizer.get_chat_template(tools=list(tools) if tools else None))

    def _run(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None, **options: Any) -> Any:
        try:
            with time_limit(RENDER_LIMIT_S), dated(self._source(tools), self.date):
                if not (tools or options["tokenize"]) and (compiled := self._compiled_for(messages)) is not None:
                    names = {**self.tokenizer.special_tokens_map, **self.variables}
                    shown = [dict(message) for message in messages]
                    asked = options["add_generation_prompt"]
                    return compiled.render(messages=shown, tools=None, documents=None, add_generation_prompt=asked, **names)
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

    def _compiled_for(self, messages: Sequence[Message]) -> Any:
        """The compiled template, where these messages are roles and texts and transformers would hand them to it as they are; else None.

        What `apply_chat_template` does around it (copies of everything, aliases for reasoning) takes as long as most templates do.
        """
        if not self._is_plain or not messages or not all(map(_is_plain_message, messages)):
            return None
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self._source(None))

    @cached_property
    def _is_plain(self) -> bool:
        """Whether this is transformers' own way of rendering, with variables that it would not change."""
        from transformers import PreTrainedTokenizerBase

        own = getattr(type(self.tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template
        return own and all(value is None or type(value) in (str, int, float, bool) for value in self.variables.values())


def _is_plain_message(message: Message) -> bool:
    return type(message) is dict and message.keys() == _PLAIN_KEYS and type(message["role"]) is str and type(message["content"]) is str
