"""From a preference to texts: where its prompt ends, and what each whole sequence reads like up to its terminator.

Two ways: through a chat template (`ChatText`), or as plain text (`PlainText`). Nothing here counts tokens; that is the encoder's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo.data.chat.render import PROBE_ANSWERS, ChatRenderer, TemplateFacts, TemplateFailed, as_content, sentinel_for
from orpo.data.chat.special import ControlText, NotPlainError, content_text, free_marks, strings_of, without_bos, without_end
from orpo.data.types import Dropped, Message, Preference, Text
from orpo.errors import DataError

Marks = tuple[str, str] | None
Encode = Callable[[Sequence[str], Marks], list[list[int]]]
Tools = Sequence[dict[str, Any]] | None


@dataclass(slots=True)
class TurnDraft:
    """A preference as texts.

    Attributes:
        preference: where it came from.
        prompt_text: what the prompt's ids are made from.
        full_texts: prompt and response, one per response, up to and including the terminator's text.
        marks: the characters around control tokens that must be read as plain text, or None.
        notes: codes of what was done.
        cut: responses that were shortened before tokenising, far above any length limit.
        conversations, tools: what `full_texts` were rendered from, where they were: what the ids are verified with.
        is_trimmable: whether the prompt can be trimmed (text that came already rendered cannot).
    """

    preference: Preference
    prompt_text: str
    full_texts: list[str]
    marks: Marks = None
    notes: list[str] = field(default_factory=list)
    cut: frozenset[int] = frozenset()
    conversations: list[list[Message]] = field(default_factory=list)
    tools: Tools = None
    is_trimmable: bool = True

    @property
    def texts(self) -> list[str]:
        """The prompt and the full texts."""
        return [self.prompt_text, *self.full_texts]


class _BadTurns(Exception):
    """The row cannot be used; the arguments are reason code and detail."""


class ChatText:
    """Preferences as texts through a chat template.

    Args:
        render: the template.
        facts: what probing it showed.
        control: texts that may not come out of a message.
        encode: texts to ids (with marks read as plain text).
        is_split: control text in messages is made plain text.
        most_chars: longest text that is looked at whole under a trim policy.
    """

    def __init__(
        self, render: ChatRenderer, facts: TemplateFacts, control: ControlText, encode: Encode, *, is_split: bool, most_chars: int | None
    ) -> None:
        self.render, self.facts, self.control, self.encode = render, facts, control, encode
        self.is_split, self.most_chars = is_split, most_chars
        terminator = next((text for text, index in control.ids.items() if index == facts.terminator_id), "")
        self._endings = [text for text in dict.fromkeys((terminator, render.tokenizer.eos_token or "", facts.ending.strip())) if text]

    def draft(self, preference: Preference) -> TurnDraft | Dropped:
        """The preference as texts, or why it cannot be.

        Raises:
            DataError: the template does not come to an end.
        """
        try:
            if self.is_rendered(preference.prompt):
                return self._draft_rendered(preference)
            return self._draft_messages(preference)
        except _BadTurns as bad:
            return Dropped(bad.args[0], preference.where, bad.args[1])
        except TemplateFailed as error:
            return Dropped("template_failed", preference.where, f"the {self.render.name} says: {error}")
        except NotPlainError as error:
            return Dropped("special_tokens", preference.where, str(error))
        except DataError as error:
            error.where = str(preference.where)
            raise

    def prompt(self, prompt: Text, tools: Tools = None) -> tuple[str, Marks]:
        """The text to generate from: the same that training takes as the prompt.

        Raises:
            TemplateFailed: the template raised.
            DataError: the prompt is not text or messages.
        """
        if isinstance(prompt, str) and self.is_rendered(prompt):
            return self._rendered_prompt(prompt)[0] + self.facts.prompt_gap, None
        try:
            messages, prefill = self._prompt_messages(prompt)
        except _BadTurns as bad:
            raise DataError(f"not a prompt: {bad.args[1]}") from None
        messages, _, tools, prefill, marks = self._mark(messages, [], tools, prefill)
        before, proved = self._before_answer(messages, tools, prefill, marks)
        if prefill or self.facts.boundary.startswith("before"):
            return proved, marks
        text = self._generation_prompt(messages, tools)
        return (text if before.startswith(text) else proved), marks

    def as_messages(self, prompt: Text) -> list[Message]:
        """A prompt that was not rendered before, as messages."""
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

    def _draft_messages(self, preference: Preference) -> TurnDraft:
        messages, prefill = self._prompt_messages(preference.prompt)
        answers = [self._answer(response, prefill) for response in preference.responses]
        raw = strings_of([preference.prompt, preference.responses, preference.tools])
        notes = ["special_tokens_in_text"] if self.control.is_in(raw) else []
        cut = frozenset(i for i, answer in enumerate(answers) if self.most_chars and len(content_text(answer)) > self.most_chars)
        for i in cut:
            answers[i] = self._with_text(answers[i], content_text(answers[i])[: self.most_chars])
        messages, answers, tools, prefill, marks = self._mark(messages, answers, preference.tools, prefill)
        conversations = [[*messages, answer] for answer in answers]
        full = [self._up_to_end(conversation, tools, marks) for conversation in conversations]
        prompt_text = ""
        if not prefill and self.facts.boundary.startswith("generation"):
            prompt_text = self._generation_prompt(messages, tools)
        if not prompt_text or not all(text.startswith(prompt_text) for text in full):
            prompt_text = self._before_answer(messages, tools, prefill, marks)[1]
        if not all(text.startswith(prompt_text) for text in full):
            raise _BadTurns("boundary", f"the {self.render.name} rewrites the prompt depending on the answer")
        if not all(_is_printed(messages, prompt_text) and _is_printed(c[-1:], text) for c, text in zip(conversations, full, strict=True)):
            notes.append("text_not_printed")
        return TurnDraft(preference, prompt_text, full, marks, notes, cut, conversations, tools)

    def _mark(
        self, messages: list[Message], answers: list[Message], tools: Tools, prefill: str
    ) -> tuple[list[Message], list[Message], Tools, str, Marks]:
        """The same, with control text marked if it is to be read as plain text."""
        texts = strings_of([messages, answers, tools, prefill])
        if not self.is_split or not self.control.is_in(texts):
            return messages, answers, tools, prefill, None
        marks = free_marks(texts)
        return (*(self.control.mark(value, marks) for value in (messages, answers, tools, prefill)), marks)

    def _prompt_messages(self, prompt: Text) -> tuple[list[Message], str]:
        """The prompt's messages in the template's form, and the beginning of the answer if the last of them is one."""
        messages = [self._checked(message) for message in self.as_messages(prompt)]
        if not any(content_text(message).strip() for message in messages if message["role"] not in ("system", "developer")):
            raise _BadTurns("empty_prompt", "no message of the prompt has text")
        if self.facts.pure_bos:
            text = content_text(messages[0])
            if text.startswith(self.facts.pure_bos):
                messages[0] = self._with_text(messages[0], without_bos(text, self.facts.pure_bos))
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            return messages[:-1], content_text(messages[-1])
        return messages, ""

    def _checked(self, message: Message) -> Message:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or self.control.is_in([role]):
            raise _BadTurns("bad_messages", f"the role is {role!r}")
        if isinstance(content, (list, tuple)):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise _BadTurns("wrong_type", "a part of the content is not text; only text can be trained")
            return message if self.facts.takes_parts else {**message, "content": content_text(message)}
        if content is None and message.get("tool_calls"):
            return message
        if not isinstance(content, str):
            raise _BadTurns("wrong_type", f"the content of a message is {type(content).__name__}, not text")
        return self._with_text(message, content) if self.facts.wants_parts else message

    def _with_text(self, message: Message, text: str) -> Message:
        is_parts = self.facts.wants_parts or (self.facts.takes_parts and isinstance(message.get("content"), (list, tuple)))
        return {**message, "content": as_content(text, is_parts=is_parts)}

    def _answer(self, response: Text, prefill: str) -> Message:
        """One assistant message that does not yet end with a terminator."""
        messages = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
        if len(messages) != 1 or messages[0].get("role") != "assistant":
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise _BadTurns("bad_messages", f"an answer must be one assistant message; found: {roles}")
        message = self._checked(messages[0])
        text = without_bos(without_end(content_text(message), self._endings), self.facts.pure_bos)
        if not text.strip() and not message.get("tool_calls"):
            raise _BadTurns("empty_answer", "an answer is blank")
        if message.get("content") is None:
            return message
        return self._with_text(message, prefill + text)

    def _up_to_end(self, conversation: list[Message], tools: Tools, marks: Marks) -> str:
        """The rendered conversation up to and including what ends its answer."""
        text = self.render(conversation, tools=tools)
        after = self.facts.after
        if not text.endswith(after):
            word = sentinel_for(text)
            stand_in = {**conversation[-1], "content": as_content(word, is_parts=self.facts.wants_parts)}
            after = self.render([*conversation[:-1], stand_in], tools=tools).rpartition(word)[2]
            if not (text.endswith(after) and after.startswith(self.facts.ending)):
                raise _BadTurns("boundary", f"the {self.render.name} ends this answer in another way than others")
        return text[: len(text) - len(after)] + self.facts.ending

    def _generation_prompt(self, messages: list[Message], tools: Tools) -> str:
        text = self.render(messages, tools=tools, generation_prompt=True)
        return text.rstrip() if self.facts.boundary == "generation_prompt_stripped" else text

    def _before_answer(self, messages: list[Message], tools: Tools, prefill: str, marks: Marks) -> tuple[str, str]:
        """What the template prints before an answer; and as much of it as stays the same tokens when an answer follows."""
        word = sentinel_for("\n".join(strings_of([messages, tools, prefill])))
        answer = {"role": "assistant", "content": as_content(prefill + word, is_parts=self.facts.wants_parts)}
        text = self.render([*messages, answer], tools=tools)
        before, found, _ = text.partition(word)
        if not found:
            raise _BadTurns("boundary", f"the {self.render.name} does not print the answer to this prompt")
        if self.facts.boundary == "before_answer" and not prefill:
            return before, before
        if self.facts.boundary == "before_answer_stripped":
            return before, before.rstrip()
        alone, *full = self.encode([before, *(before + answer for answer in PROBE_ANSWERS)], marks)
        return before, before if all(ids[: len(alone)] == alone for ids in full) else before.rstrip()

    def is_rendered(self, prompt: Text) -> bool:
        """Whether a prompt is text that somebody rendered with this template before.

        It must begin as a rendered conversation does and end where the user's turn or the answer's header ends. Under "split" all
        special-token text is plain text, so nothing counts as rendered.
        """
        if self.is_split or not isinstance(prompt, str):
            return False
        bare, user_end, header = prompt.strip(), self.facts.user_end, self.facts.answer_header
        if not bare.startswith(self.facts.openers):
            return False
        is_turn_over = bool(user_end) and bare.endswith(user_end)
        has_header = bool(header) and bare.endswith(header) and bare.removesuffix(header).rstrip().endswith(user_end)
        return is_turn_over or has_header

    def before_content(self, draft: TurnDraft) -> str | None:
        """What stands before the first answer's own text; None where that is not known (text that was rendered before)."""
        if not draft.conversations:
            return None
        *messages, answer = draft.conversations[0]
        word = sentinel_for(draft.full_texts[0])
        stand_in = {**answer, "content": as_content(word, is_parts=self.facts.wants_parts)}
        return self.render([*messages, stand_in], tools=draft.tools).partition(word)[0]

    def _rendered_prompt(self, prompt: str) -> tuple[str, bool]:
        """A rendered prompt up to and including the header of the answer, and whether the header stood there."""
        facts = self.facts
        text = (facts.pure_bos or "") + without_bos(prompt.strip(), facts.pure_bos)
        has_header = text.endswith(facts.answer_header)
        return (text if has_header else text + facts.turn_gap + facts.answer_header), has_header

    def _draft_rendered(self, preference: Preference) -> TurnDraft:
        facts, given = self.facts, str(preference.prompt)
        prompt_text, has_header = self._rendered_prompt(given)
        answers = [text for text in preference.responses if isinstance(text, str)]
        if len(answers) < len(preference.responses):
            raise _BadTurns("bad_messages", "the prompt is text that was rendered before, but an answer is messages")
        if not has_header:
            if not all(text.lstrip().startswith(facts.answer_header) for text in answers):
                raise _BadTurns(
                    "boundary", "the prompt was rendered without the answer's header; render it with add_generation_prompt=True"
                )
            answers = [text.lstrip().removeprefix(facts.answer_header) for text in answers]
        if not has_header or not given.endswith(facts.answer_gap):
            answers = [text.removeprefix(facts.answer_gap) for text in answers]
        answers = [without_bos(without_end(text, self._endings), facts.pure_bos) for text in answers]
        if not all(answer.strip() for answer in answers):
            raise _BadTurns("empty_answer", "an answer is blank")
        notes = ["already_rendered"] + (["special_tokens_in_text"] if self.control.is_in(answers) else [])
        full = [prompt_text + facts.answer_gap + answer + facts.ending for answer in answers]
        return TurnDraft(preference, prompt_text + facts.prompt_gap, full, None, notes, is_trimmable=False)


def _is_printed(messages: Sequence[Message], text: str) -> bool:
    """Whether a rendered text holds all of the messages' texts, white space aside."""
    missing = [content for message in messages if (content := content_text(message).strip()) not in text]
    if not missing:
        return True
    bare = "".join(text.split())
    return all("".join(content.split()) in bare for content in missing)


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
        return TurnDraft(preference, prompt_text, [prompt_text + answer for answer in answers], marks, notes, cut)

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
