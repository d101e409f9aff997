"""What each row shape looks like and how a row of it becomes a draft: prompt, responses, pairs.

A reader is made once per source, from the names of its columns; it then judges rows one by one and raises `BadRow` for those at fault.
Which reader a source needs is decided in `orpo.data.rows.recognise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orpo.data.rows.judged import Candidates
from orpo.data.rows.messages import (
    BadRow,
    as_messages,
    check_text,
    is_blank,
    is_transcript,
    is_whole,
    plain_text,
    read_text_or_messages,
    read_tools,
    read_transcript,
    split_conversations,
)
from orpo.data.rows.pairs import PairPolicy, choose_pairs
from orpo.data.types import Message, Pairs, Text

GOOD_LABELS = (True, "true", "True", "1", "good", "desirable", "thumbs_up")


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as read, before it is judged whole (blank, identical, …)."""

    prompt: Text
    responses: tuple[Text, ...]
    pairs: Pairs
    tools: tuple[dict[str, Any], ...] | None = None


class Reader(Protocol):
    """Reads one row; raises `BadRow`."""

    def __call__(self, row: Mapping[str, Any]) -> Draft: ...


@dataclass(frozen=True, slots=True)
class PromptReader:
    """The prompt of a row, from one column or several.

    Args:
        columns: the prompt's column, or those whose texts are joined by a blank line (instruction and input); empty: implicit.
        system: column of a system prompt.
        tools: column of tool definitions.
        history: column of earlier (question, answer) turns.
    """

    columns: tuple[str, ...]
    system: str | None = None
    tools: str | None = None
    history: str | None = None

    def read(self, row: Mapping[str, Any]) -> Text:
        """The prompt, as text or messages.

        Raises:
            BadRow: absent, or neither text nor messages.
        """
        if not self.columns:
            raise BadRow("missing_field", "no prompt: the answers stand alone")
        if len(self.columns) > 1:
            first = check_text(row.get(self.columns[0]), self.columns[0])
            others = [check_text(row[column], column) for column in self.columns[1:] if row.get(column) is not None]
            prompt: Text = "\n\n".join(text for text in (first, *others) if not is_blank(text))
        else:
            value = row.get(self.columns[0])
            prompt = _prompt_transcript(value) if is_transcript(value) else read_text_or_messages(value, "prompt")
        earlier = self._earlier(row)
        return (*earlier, *as_messages(prompt, "user")) if earlier else prompt

    def _earlier(self, row: Mapping[str, Any]) -> list[Message]:
        """The system message and earlier turns that stand in columns of their own."""
        messages: list[Message] = []
        system = row.get(self.system) if self.system else None
        if system is not None and not is_blank(check_text(system, "system")):
            messages.append({"role": "system", "content": system})
        for turn in (row.get(self.history) if self.history else None) or ():
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise BadRow("bad_messages", f"{self.history} is not a list of [question, answer]")
            question, answer = (check_text(text, str(self.history)) for text in turn)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def read_tools(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
        """The row's tools, from their own column or beside the prompt's messages (the OpenAI shape)."""
        nested = row.get(self.columns[0]) if self.columns else None
        beside = nested.get("tools") if isinstance(nested, Mapping) else None
        return read_tools(row.get(self.tools) if self.tools else beside)


def _prompt_transcript(value: Any) -> tuple[Message, ...]:
    """An HH transcript that stops where the answer begins."""
    messages = read_transcript(value, "prompt")
    return messages[:-1] if messages[-1]["role"] == "assistant" and is_blank(messages[-1]["content"]) else messages


def _without_repeated_system(prompt: Text) -> Text:
    """A system column and a system turn in the messages: the messages' own counts."""
    if isinstance(prompt, tuple) and len(prompt) > 1 and prompt[0]["role"] == prompt[1]["role"] == "system":
        return prompt[1:]
    return prompt


def draft_of(prompt: Text, responses: Sequence[Text], pairs: Pairs, tools: tuple[dict[str, Any], ...] | None = None) -> Draft:
    """A draft in one form: all text, or all messages where any part is, since only a chat template can join those."""
    prompt = _without_repeated_system(prompt)
    if tools or not isinstance(prompt, str) or not all(isinstance(response, str) for response in responses):
        turns = as_messages(prompt, "user")
        answers = tuple(as_messages(response, "assistant") for response in responses)
        # A prompt that ends with the assistant's own words is the beginning of the answer; one that ends with a call waits for its result.
        if turns and turns[-1]["role"] == "assistant" and turns[-1].get("tool_calls"):
            raise BadRow("bad_messages", "the prompt ends with a tool call, so its result comes next, not an answer")
        if any(message["role"] not in {"assistant", "tool"} for answer in answers for message in answer):
            raise BadRow("bad_messages", "an answer holds a turn that is not the assistant's")
        return Draft(turns, answers, pairs, tools)
    return Draft(prompt, tuple(responses), pairs, tools)


def are_whole(responses: Sequence[Text]) -> bool:
    """Whether any response is a whole conversation, with the prompt inside."""
    return any(map(is_whole, responses))


@dataclass(frozen=True, slots=True)
class PairReader:
    """Rows with a chosen and a rejected answer; the prompt in columns of its own, or inside both.

    `transcripts` says that the implicit prompt is an HH transcript. A row without a rejected answer is an SFT-only row where one of
    `sft_columns` holds its answer.
    """

    prompt: PromptReader
    chosen: str
    rejected: str
    transcripts: bool = False
    sft_columns: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any]) -> Draft:
        values = [row.get(self.chosen), row.get(self.rejected)]
        if values[1] is None:
            answer = next((row[column] for column in self.sft_columns if row.get(column) is not None), None)
            if answer is not None:
                return self._sft(row, answer)
        if self.transcripts:
            prompt, answers = split_conversations([read_transcript(v, n) for v, n in zip(values, ("chosen", "rejected"), strict=True)])
            return draft_of(prompt, answers, ((0, 1),))
        responses = [read_text_or_messages(value, name) for value, name in zip(values, ("chosen", "rejected"), strict=True)]
        tools = self.prompt.read_tools(row)
        if not are_whole(responses):
            return draft_of(self.prompt.read(row), responses, ((0, 1),), tools)
        conversations = [as_messages(response, "assistant") for response in responses]
        shared, rests = self._split(row, conversations)
        return draft_of(shared, rests, ((0, 1),), tools)

    def _split(self, row: Mapping[str, Any], conversations: list[tuple[Message, ...]]) -> tuple[tuple[Message, ...], Sequence[Text]]:
        """Whole conversations; a prompt column beside them has to agree with what they hold."""
        if not self.prompt.columns:
            system = PromptReader((), self.prompt.system)._earlier(row)
            prompt, answers = split_conversations(conversations)
            return (*system, *prompt), answers
        stated = self.prompt.read(row)
        if not isinstance(stated, str):
            size = len(stated)
            if all(messages[:size] == stated and len(messages) > size for messages in conversations):
                return stated, [messages[size:] for messages in conversations]
        prompt, answers = split_conversations(conversations)
        turns = {message["content"].strip() for message in prompt}
        words = {message["content"].strip() for message in as_messages(stated, "user")}
        if not words <= turns:
            raise BadRow("prompts_differ", "the prompt column is not among the turns of chosen and rejected")
        return prompt, answers

    def _sft(self, row: Mapping[str, Any], answer: Any) -> Draft:
        return read_sft(self.prompt, row, answer)


def read_sft(prompt_reader: PromptReader, row: Mapping[str, Any], answer: Any) -> Draft:
    """An SFT-only draft: one response and no pair."""
    response = read_text_or_messages(answer, "the answer")
    if are_whole([response]):
        prompt, (response,) = split_conversations([as_messages(response, "assistant")])
        return draft_of(prompt, [response], ())
    return draft_of(prompt_reader.read(row), [response], (), prompt_reader.read_tools(row))


@dataclass(frozen=True, slots=True)
class SftReader:
    """Instruction-only rows, taken in as SFT-only rows on request; of labelled ones (KTO) only those marked good."""

    prompt: PromptReader
    answer: str
    label: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> Draft:
        if self.label is not None and row.get(self.label) not in GOOD_LABELS:
            raise BadRow("unpaired", f"{self.label} does not mark the answer as good")
        return read_sft(self.prompt, row, row.get(self.answer))


@dataclass(frozen=True, slots=True)
class VotedReader:
    """Two responses and a verdict: `winner(row)` gives 0, 1, or None for a tie."""

    prompt: PromptReader
    responses: tuple[str, str]
    winner: Callable[[Mapping[str, Any]], int | None]

    def __call__(self, row: Mapping[str, Any]) -> Draft:
        winner = self.winner(row)
        answers = [read_text_or_messages(row.get(column), column) for column in self.responses]
        if winner is None:
            raise BadRow("no_preference", "a tie, or no majority")
        if winner == 1:
            answers.reverse()
        if are_whole(answers):
            prompt, rests = split_conversations([as_messages(answer, "assistant") for answer in answers])
            return draft_of(prompt, rests, ((0, 1),), self.prompt.read_tools(row))
        return draft_of(self.prompt.read(row), answers, ((0, 1),), self.prompt.read_tools(row))


@dataclass(frozen=True, slots=True)
class GroupReader:
    """One prompt with several judged responses; `candidates(row)` finds them, the policy chooses the pairs.

    Responses that are in no pair are left out: they would cost computing and teach nothing.
    """

    prompt: PromptReader
    candidates: Callable[[Mapping[str, Any]], Candidates]
    policy: PairPolicy = field(default_factory=lambda: PairPolicy("best_worst"))

    def __call__(self, row: Mapping[str, Any]) -> Draft:
        values, scores, votes = self.candidates(row)
        pairs = choose_pairs(scores, self.policy, votes)
        if not pairs:
            judged = sum(score is not None for score in scores)
            raise BadRow("no_preference", f"{judged} judged responses, none preferred over another by this policy")
        used = sorted({index for pair in pairs for index in pair})
        responses = {index: read_text_or_messages(values[index], f"response {index + 1}") for index in used}
        kept = [(i, j) for i, j in pairs if plain_text(responses[i]).strip() != plain_text(responses[j]).strip()]
        if not kept:
            raise BadRow("identical_answers", "the responses of every pair are the same")
        used = sorted({index for pair in kept for index in pair})
        place = {index: number for number, index in enumerate(used)}
        chosen_pairs = tuple((place[i], place[j]) for i, j in kept)
        answers = [responses[index] for index in used]
        if are_whole(answers):
            prompt, rests = split_conversations([as_messages(answer, "assistant") for answer in answers])
            return draft_of(prompt, rests, chosen_pairs, self.prompt.read_tools(row))
        return draft_of(self.prompt.read(row), answers, chosen_pairs, self.prompt.read_tools(row))
