"""The two shapes that the data takes on its way to the engine.

A row of any kind becomes a `Preference` (text or messages), a `Preference` becomes a `TokenGroup` (ids), or either becomes a `Dropped`
with a reason code. Nothing else travels between the modules of this package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

REASONS: dict[str, str] = {
    "missing_field": "a needed field is absent or null",
    "wrong_type": "a field has the wrong type (number, boolean, list)",
    "not_text": "the row holds images, sound or film; only text can be trained",
    "invalid_text": "a text is not valid Unicode (lone surrogates)",
    "empty_prompt": "the prompt is empty or blank",
    "empty_answer": "an answer is empty or blank",
    "identical_answers": "chosen and rejected are the same",
    "identical_after_truncation": "chosen and rejected are the same once truncated",
    "prompts_differ": "chosen and rejected do not share one prompt",
    "no_preference": "no answer is preferred over another (tie, no label, no votes)",
    "bad_messages": "the messages are not a conversation that ends with the assistant",
    "too_long": "longer than max_length",
    "prompt_too_long": "the prompt alone leaves no room for an answer",
    "row_too_large": "the row exceeds the size limit",
    "unpaired": "one answer with a label, but no counterpart",
    "template_failed": "the chat template raised on this row",
    "special_tokens": "special-token text that the tokenizer cannot read as plain text",
    "not_printed": "the chat template does not print what an answer says (a tool call, its text)",
    "held_out": "its prompt is evaluated on (streams leave such rows out)",
    "boundary": "the end of the prompt could not be proved on the tokens",
}

NOTES: dict[str, str] = {
    "prompt_trimmed": "tokens were taken from the prompt to fit max_length",
    "answer_cut": "an answer's tail was cut to fit max_length; it carries no end-of-turn token",
    "special_tokens_in_text": "the text of the row contains special-token text",
    "boundary_merge": "the tokenizer merges the last prompt character with the answer; the merged token counts as answer",
    "already_rendered": "the prompt was already rendered with the chat template; it was taken as it is",
    "text_not_printed": "the chat template leaves out some of the prompt's text (a system message); the model does not see it",
    "reasoning_not_printed": "the chat template leaves out the reasoning before an answer; it is not trained",
    "tools_not_printed": "the chat template leaves out the row's tools, or a part of them; the model does not see them",
    "calls_not_printed": "the chat template leaves out a tool call of an earlier turn; the model does not see it",
    "name_not_printed": "the chat template leaves out the name in a message",
    "variables_not_read": "the chat template does not read one of the row's chat_template_kwargs",
    "other_generation_prompt": "the prompt that is trained is not the one that the template gives for generation",
    "rendered_otherwise": "the prompt was rendered already, and ends otherwise than the template's generation prompt",
    "identical_pair_removed": "of several pairs, one or more had two identical answers and were left out",
}

Message = dict[str, Any]
"""One chat message: at least `role` and `content`."""

Text = str | tuple[Message, ...]
"""Plain text, or the messages of a conversation."""

Pairs = tuple[tuple[int, int], ...]
"""(chosen, rejected) indices into a group's responses."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row came from, for messages to the user."""

    file: str
    row: int
    """0-based index in the file or data set."""
    line: int | None = None
    """1-based line, for files that have lines."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file} row {self.row}"


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt, its responses, and which of them wins over which.

    A plain row has two responses and the pair (0, 1). A row without pairs is an SFT-only row: its one response counts in the
    next-token loss alone.

    Example:
        >>> from orpo.data.types import Preference, Where
        >>> preference = Preference("What is 2 + 2?", ("4.", "22."), pairs=((0, 1),), where=Where("sums.jsonl", row=0, line=1))
        >>> print(preference.where)
        sums.jsonl:1
    """

    prompt: Text
    responses: tuple[Text, ...]
    pairs: Pairs
    where: Where
    tools: tuple[dict[str, Any], ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns (scenario, id, ...), for slices and reports."""
    chat_template_kwargs: dict[str, Any] | None = None
    """The row's own variables for the chat template (`enable_thinking`, ...), over those of the run."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be trained on, and why.

    Example:
        >>> from orpo.data.formats import stream_preferences
        >>> (dropped,) = stream_preferences([{"prompt": "Yes?", "chosen": "Yes.", "rejected": "Yes."}])
        >>> dropped.reason
        'identical_answers'
    """

    reason: str
    """One of `orpo.data.types.REASONS`."""
    where: Where
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """A prompt segment and the response segments that follow it, as ids.

    Attributes:
        prompt_ids: int32, shape (P,), P >= 1. The same ids for every response.
        response_ids: int32 arrays, each at least one token. A response that came to its natural end has the turn terminator as its
            last id, exactly once; one that was cut has none.
        pairs: (chosen, rejected) indices; empty for an SFT-only row.
        is_ended: per response, whether it carries its terminator.
        notes: codes of what was done to the row ("prompt_trimmed", "answer_cut", "special_tokens_in_text", "boundary_merge").
        reference_logp_sums: summed log-probability of each response under a frozen reference (DPO needs it), else None.

    Example: a prompt of three tokens and two answers.

        >>> import numpy as np
        >>> from orpo.data.types import TokenGroup, Where
        >>> group = TokenGroup(
        ...     prompt_ids=np.array([5, 6, 7], dtype=np.int32),
        ...     response_ids=(np.array([8, 2], dtype=np.int32), np.array([9, 10, 2], dtype=np.int32)),
        ...     pairs=((0, 1),),
        ...     is_ended=(True, True),
        ...     where=Where("rows", 0),
        ... )
        >>> group.num_tokens, group.longest_tokens
        (8, 6)
    """

    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    pairs: Pairs
    is_ended: tuple[bool, ...]
    where: Where
    notes: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    reference_logp_sums: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed form: the prompt once, each response once."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest single sequence (prompt and one response)."""
        return len(self.prompt_ids) + max(len(ids) for ids in self.response_ids)

    @property
    def num_wins(self) -> tuple[int, ...]:
        """How often each response is the chosen one; an SFT-only response counts once."""
        if not self.pairs:
            return (1,) * len(self.response_ids)
        wins = [0] * len(self.response_ids)
        for chosen, _ in self.pairs:
            wins[chosen] += 1
        return tuple(wins)
