"""From a preference to texts through a chat template: where its prompt ends, and what each whole sequence reads like up to its terminator.

Nothing here counts tokens; that is the encoder's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo.data.chat.cuts import Cuts
from orpo.data.chat.ends import CALL_FORMS, End, in_call_form
from orpo.data.chat.notes import missing_of_answer, missing_of_prompt, split_reasoning
from orpo.data.chat.probe import PROBE_ANSWERS, TemplateFacts, as_content, sentinel_for
from orpo.data.chat.render import ChatRenderer, TemplateFailed
from orpo.data.chat.rendered import RenderedPrompts
from orpo.data.chat.special import ControlText, NotPlainError, common_start, content_text, free_marks, strings_of, without_bos, without_end
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
        ends: how each response ends.
        marks: the characters around control tokens that must be read as plain text, or None.
        notes: codes of what was done.
        cut: responses that were shortened before tokenising, far above any length limit.
        conversations, tools: what `full_texts` were rendered from, where they were: what the ids are verified with.
        is_trimmable: whether the prompt can be trimmed (text that came already rendered cannot).
    """

    preference: Preference
    prompt_text: str
    full_texts: list[str]
    ends: list[End]
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
        cuts: tokens that nothing is tokenised across.
        is_split: control text in messages is made plain text.
        most_chars: longest text that is looked at whole under a trim policy.
    """

    def __init__(
        self,
        render: ChatRenderer,
        facts: TemplateFacts,
        control: ControlText,
        encode: Encode,
        cuts: Cuts,
        *,
        is_split: bool,
        most_chars: int | None,
    ) -> None:
        self.render, self.facts, self.control, self.encode, self.cuts = render, facts, control, encode, cuts
        self.is_split, self.most_chars = is_split, most_chars
        self.rendered = RenderedPrompts(facts)
        ids = (facts.end.terminator_id, facts.call_end.terminator_id)
        terminators = [text for text, index in control.ids.items() if index in ids]
        found = (facts.end.text.strip(), facts.call_end.text.strip(), *terminators, render.tokenizer.eos_token or "")
        self._endings = sorted({text for text in found if text}, key=len, reverse=True)

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
            return self.rendered.prompt_text(prompt), None
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
        sequences = [self._up_to_end(conversation, tools) for conversation in conversations]
        full, ends = [text for text, _ in sequences], [end for _, end in sequences]
        prompt_text, is_generation = self._prompt_text(messages, tools, prefill, marks, full)
        if not is_generation:
            notes.append("other_generation_prompt")
        notes += self._missing(messages, tools, prefill, answers, prompt_text, full)
        return TurnDraft(preference, prompt_text, full, ends, marks, list(dict.fromkeys(notes)), cut, conversations, tools)

    def _prompt_text(self, messages: list[Message], tools: Tools, prefill: str, marks: Marks, full: list[str]) -> tuple[str, bool]:
        """The text that the prompt ends with in all of the sequences, and whether it is the template's own for generation.

        Tried in this order: the prompt for generation; what stands before any answer; as much of either as all sequences share.

        Raises:
            _BadTurns: what stands before the answers differs.
        """
        facts = self.facts
        generation = None if prefill or facts.generation is None else self.render(messages, tools=tools, generation_prompt=True)
        if generation is not None:
            trained = generation.rstrip() if facts.boundary == "generation_prompt_stripped" else generation
            is_usual = facts.boundary.startswith("generation") and not facts.is_generation_inside
            if all(text.startswith(generation) for text in full) and (is_usual or self._holds(generation, full, marks)):
                return (trained, trained == generation) if is_usual else (generation, True)
            if facts.boundary.startswith("generation") and all(text.startswith(trained) for text in full):
                return trained, trained == generation
        before, proved = self._before_answer(messages, tools, prefill, marks)
        if all(text.startswith(proved) for text in full):
            return proved, generation is None
        shared = common_start([*full, before] if generation is None else [*full, generation])
        asked = content_text(messages[-1]).strip() if messages else ""
        # Half a header would do for the tokens, but not for a reader: the answer's role must be settled by the prompt.
        if "".join(asked.split()) not in "".join(shared.split()) or facts.answer_header not in shared.rpartition(asked)[2]:
            raise _BadTurns("boundary", f"the {self.render.name} rewrites the prompt depending on the answer")
        return shared, generation is None

    def _holds(self, prompt: str, full: list[str], marks: Marks) -> bool:
        """Whether a prompt's ids stay the same with every answer behind it."""
        if marks is None and self.cuts.begins_with_one(text[len(prompt) :] for text in full):
            return True
        alone, *ids = self.encode([prompt, *full], marks)
        return all(one[: len(alone)] == alone for one in ids)

    def _missing(
        self, messages: list[Message], tools: Tools, prefill: str, answers: list[Message], prompt_text: str, full: list[str]
    ) -> list[str]:
        """Notes for what the template does not print.

        Raises:
            _BadTurns: it is something of an answer itself.
        """
        lead = [*messages, {"role": "assistant", "content": prefill}] if prefill else messages
        notes = missing_of_prompt(lead, tools, prompt_text, prints_tools=self.facts.prints_tools)
        for answer, text in zip(answers, full, strict=True):
            region, can_call = text[len(prompt_text) :], self.facts.call_form is not None
            what, more = missing_of_answer(answer, region, prefill=prefill, prints_calls=can_call)
            if what:
                raise _BadTurns("not_printed", f"the {self.render.name} does not print {what}")
            notes += more
        return notes

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
        bos = self.facts.pure_bos
        if bos and not self.is_split:
            text = content_text(messages[0])
            if text.startswith(bos) and not self._is_tagged(text):
                messages[0] = self._with_text(messages[0], without_bos(text, bos))
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            return messages[:-1], content_text(messages[-1])
        return messages, ""

    def _is_tagged(self, text: str) -> bool:
        """Whether a beginning-of-text token is a tag that something closes later ("<s>old</s>")."""
        bos = self.facts.pure_bos or ""
        return bos.startswith("<") and "</" + bos[1:] in text

    def _checked(self, message: Message) -> Message:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or self.control.is_in([role]):
            raise _BadTurns("bad_messages", f"the role is {role!r}")
        message = in_call_form(message, self.facts.call_form or CALL_FORMS[0])
        if isinstance(content, (list, tuple)):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise _BadTurns("not_text", "in a part of the content")
            return message if self.facts.takes_parts else {**message, "content": content_text(message)}
        if message.get("content") is None and message.get("tool_calls"):
            return message
        if not isinstance(content, str):
            raise _BadTurns("wrong_type", f"the content of a message is {type(content).__name__}, not text")
        return self._with_text(message, content) if self.facts.wants_parts else message

    def _with_text(self, message: Message, text: str) -> Message:
        is_parts = self.facts.wants_parts or (self.facts.takes_parts and isinstance(message.get("content"), (list, tuple)))
        return {**message, "content": as_content(text, is_parts=is_parts)}

    def _answer(self, response: Text, prefill: str) -> Message:
        """One assistant message that does not yet end with a terminator."""
        message = self._checked(_one_message(response))
        text = self._bare_answer(content_text(message))
        if not text.strip() and not message.get("tool_calls"):
            raise _BadTurns("empty_answer", "an answer is blank")
        if message.get("content") is None:
            return message
        return self._with_text(message, prefill + text)

    def _bare_answer(self, text: str) -> str:
        """An answer's text without the beginning and the ends of a sequence that it may bring along."""
        bare = without_end(text, self._endings)
        # "<s>old</s> is new": tags, not the beginning of a text. "<s>A whole answer</s>" is one, and has lost its end by now.
        return bare if self._is_tagged(bare) else without_bos(bare, self.facts.pure_bos)

    def _up_to_end(self, conversation: list[Message], tools: Tools) -> tuple[str, End]:
        """The rendered conversation up to and including what ends its answer, and that end."""
        text = self.render(conversation, tools=tools)
        end = self.facts.call_end if conversation[-1].get("tool_calls") else self.facts.end
        for known in (end, self.facts.end):
            found = known.cut(text)
            if found is not None:
                return found, known
        word = sentinel_for(text)
        stand_in = {**conversation[-1], "content": as_content(word, is_parts=self.facts.wants_parts)}
        after = self.render([*conversation[:-1], stand_in], tools=tools).rpartition(word)[2]
        if not (text.endswith(after) and after.startswith(self.facts.end.text)):
            raise _BadTurns("boundary", f"the {self.render.name} ends this answer in another way than others")
        return text[: len(text) - len(after)] + self.facts.end.text, self.facts.end

    def _generation_prompt(self, messages: list[Message], tools: Tools) -> str:
        text = self.render(messages, tools=tools, generation_prompt=True)
        return text.rstrip() if self.facts.boundary == "generation_prompt_stripped" else text

    def _before_answer(self, messages: list[Message], tools: Tools, prefill: str, marks: Marks) -> tuple[str, str]:
        """What the template prints before an answer; and as much of it as stays the same tokens when an answer follows."""
        word = sentinel_for("\n".join(strings_of([messages, tools, prefill])))
        # Reasoning that the prompt has opened is closed: a template that takes it apart must see it whole.
        is_open = "<think>" in prefill and not split_reasoning(prefill)[0]
        said = prefill + word + ("\n</think>\n\nDone." if is_open else "")
        text = self.render([*messages, {"role": "assistant", "content": as_content(said, is_parts=self.facts.wants_parts)}], tools=tools)
        before, found, _ = text.partition(word)
        if not found and is_open:
            return self._before_answer(messages, tools, "", marks)  # the template takes reasoning out of answers
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

        Under "split" all special-token text is plain text, so nothing counts as rendered.
        """
        return not self.is_split and isinstance(prompt, str) and self.rendered.is_rendered(prompt)

    def before_content(self, draft: TurnDraft) -> str | None:
        """What stands before the first answer's own text; None where that is not known (text that was rendered before)."""
        if not draft.conversations:
            return None
        *messages, answer = draft.conversations[0]
        word = sentinel_for(draft.full_texts[0])
        stand_in = {**answer, "content": as_content(word, is_parts=self.facts.wants_parts)}
        return self.render([*messages, stand_in], tools=draft.tools).partition(word)[0]

    def _draft_rendered(self, preference: Preference) -> TurnDraft:
        facts, given = self.facts, str(preference.prompt)
        answers = [content_text(_one_message(response)) for response in preference.responses]
        if self.rendered.begun(given) is None and facts.generation is not None:
            if not all(text.lstrip().startswith(facts.answer_header) for text in answers):
                raise _BadTurns(
                    "boundary", "the prompt was rendered without the answer's header; render it with add_generation_prompt=True"
                )
            answers = [text.lstrip().removeprefix(facts.answer_header).removeprefix(self.rendered.header_gap) for text in answers]
        answers = [self._bare_answer(text) for text in answers]
        if not all(answer.strip() for answer in answers):
            raise _BadTurns("empty_answer", "an answer is blank")
        notes = ["already_rendered"] + (["special_tokens_in_text"] if self.control.is_in(answers) else [])
        notes += ["rendered_otherwise"] if self.rendered.is_otherwise(given) else []
        full = [self.rendered.whole(given, answer, facts.end) for answer in answers]
        return TurnDraft(preference, self.rendered.prompt_text(given), full, [facts.end] * len(full), None, notes, is_trimmable=False)


def _one_message(response: Text) -> Message:
    """A response as the one assistant message that it must be."""
    messages = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        roles = ", ".join(str(message.get("role")) for message in messages) or "none"
        raise _BadTurns("bad_messages", f"an answer must be one assistant message; found: {roles}")
    return messages[0]
