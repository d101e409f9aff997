"""Preferences as texts without a chat template: prompt, answer, end-of-text token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orpo.data.chat.ends import End
from orpo.data.chat.special import ControlText, free_marks, without_bos, without_end
from orpo.data.chat.turns import Marks, Tools, TurnDraft
from orpo.data.types import Dropped, Preference, Text
from orpo.errors import DataError


def own_beginning(tokenizer: Any, encode: Callable[[list[str]], list[list[int]]]) -> list[int]:
    """The ids that the tokenizer itself begins every text with; its ending, if any, belongs to no prompt.

    Raises:
        DataError: it has no `eos_token`.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no eos_token: nothing could tell the model where an answer ends",
            where="chat_template",
            mend="set the tokenizer's eos_token, or use chat_template: chatml",
        )
    alone, whole = encode(["a"])[0], list(tokenizer.encode("a"))
    start = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    return whole[:start]


class PlainText:
    """Preferences of strings as they stand: prompt, answer, `eos_token`.

    Args:
        tokenizer: a transformers tokenizer.
        control: texts that may not come out of a text.
        bos: text of the token that the tokenizer puts first by itself, or None.
        is_split: special-token text is made plain text.
        most_chars: longest text that is looked at whole under a trim policy.
    """

    def __init__(self, tokenizer: Any, control: ControlText, *, bos: str | None, is_split: bool, most_chars: int | None) -> None:
        self.control, self.bos, self.is_split, self.most_chars = control, bos, is_split, most_chars
        self._endings = [tokenizer.eos_token]
        self._end = End("", "", int(tokenizer.eos_token_id), is_appended=True)

    def draft(self, preference: Preference) -> TurnDraft | Dropped:
        """The preference as texts, or why it cannot be.

        Raises:
            DataError: it holds messages, which need a template.
        """
        prompt, *responses = [self._text(text, preference) for text in (preference.prompt, *preference.responses)]
        answers = [without_bos(without_end(text, self._endings), self.bos) for text in responses]
        prompt_text, marks = self.prompt(prompt)
        if not prompt_text.strip():
            return Dropped("empty_prompt", preference.where, "the prompt is blank")
        if not all(answer.strip() for answer in answers):
            return Dropped("empty_answer", preference.where, "an answer is blank")
        notes = ["special_tokens_in_text"] if self.control.is_in([prompt, *responses]) else []
        cut = frozenset(i for i, answer in enumerate(answers) if self.most_chars and len(answer) > self.most_chars)
        answers = [answer[: self.most_chars] if i in cut else answer for i, answer in enumerate(answers)]
        if self.is_split and self.control.is_in([prompt, *answers]):
            marks = free_marks([prompt, *answers])
            prompt_text = self.control.mark(without_bos(prompt, self.bos), marks)
            answers = self.control.mark(answers, marks)
        full = [prompt_text + answer for answer in answers]
        return TurnDraft(preference, prompt_text, full, [self._end] * len(full), marks, notes, cut)

    def prompt(self, prompt: Text, tools: Tools = None) -> tuple[str, Marks]:
        """The text to generate from.

        Raises:
            DataError: it is messages, which need a template.
        """
        text = without_bos(self._text(prompt, None), self.bos)
        if self.is_split and self.control.is_in([text]):
            marks = free_marks([text])
            return self.control.mark(text, marks), marks
        return text, None

    def is_rendered(self, prompt: Text) -> bool:
        """Never: there is no template."""
        return False

    def before_content(self, draft: TurnDraft) -> str | None:
        """Nothing stands between prompt and answer."""
        return None

    def _text(self, text: Text, preference: Preference | None) -> str:
        if isinstance(text, str):
            return text
        raise DataError(
            "the data holds messages, but there is no chat template to render them with",
            where=str(preference.where) if preference else None,
            expected="a tokenizer with a chat template, or one given",
            mend="set chat_template: chatml (or the path of a Jinja file); it works for base models as well",
        )
