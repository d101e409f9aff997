"""The length contract: what a prompt may keep, what is cut, and what never is.

- `drop` (default): a group in which prompt and longest answer exceed `max_length`, or whose prompt exceeds `max_prompt_length`, is
  dropped whole, with a reason.
- `keep_end`, `keep_start`: the prompt is trimmed, once per group; then each answer that still does not fit loses its tail, and its
  terminator with it. How long one answer is never touches another's ids.

How much of the prompt is kept: with `max_prompt_length`, that many tokens. Without it, the prompt makes room for the longest answer, but
gives up no more than what exceeds half of `max_length`, so that a very long answer cannot erase the question (a template whose headers
alone exceed that half keeps more).

A chat prompt is trimmed as a conversation and rendered again, so that headers and turn ends are always whole. Whole exchanges go first:
the earliest ones (`keep_end`) or the latest before the last user turn (`keep_start`). If the last turn alone is too long, its longest
message loses its beginning (`keep_end`) or its end (`keep_start`). The system message goes only if nothing else helps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from orpo.data.chat.special import content_text
from orpo.data.chat.turns import TurnDraft
from orpo.data.types import Dropped, Message, Pairs, Preference, Text, TokenGroup
from orpo.errors import UserError

POLICIES = ("drop", "keep_end", "keep_start")

Measure = Callable[[Sequence[Message]], int]
"""Messages of a prompt to the number of its tokens."""

Spans = Callable[[str], list[tuple[int, int]]]
"""A text to the character spans of its tokens."""

_SYSTEM_ROLES = ("system", "developer")


def check_lengths(max_length: int, max_prompt_length: int | None, truncation: str) -> None:
    """Raise a `UserError` for a length contract that no row could meet."""
    if max_length < 2:
        raise UserError(f"found {max_length}", where="max_length", expected="at least 2: a prompt token and an answer token")
    if max_prompt_length is not None and not 0 < max_prompt_length < max_length:
        expected = f"1 to {max_length - 1} (max_length is {max_length})"
        raise UserError(f"found {max_prompt_length}", where="max_prompt_length", expected=expected)
    if truncation not in POLICIES:
        raise UserError(f"found {truncation!r}", where="truncation", expected=", ".join(POLICIES))


def num_chars(text: Text) -> int:
    """Characters of a text or of a conversation."""
    return len(text) if isinstance(text, str) else sum(len(content_text(message)) for message in text)


def shorten(prompt: Text, most_chars: int, policy: str) -> Text:
    """A prompt of which no text is longer than that: a first, rough cut of what is far beyond any number of tokens."""
    part = slice(-most_chars, None) if policy == "keep_end" else slice(most_chars)
    if isinstance(prompt, str):
        return prompt[part]
    return tuple(
        {**message, "content": content_text(message)[part]} if len(content_text(message)) > most_chars else message for message in prompt
    )


def prompt_budgets(
    prompt_tokens: int, longest_tokens: int, max_length: int, max_prompt_length: int | None, least_answer_tokens: int
) -> list[int]:
    """Tokens that the prompt of a group may keep under a trim policy, to be tried in this order; empty if it may stay as it is.

    The later ones are for prompts whose headers alone need more than their share.

    Args:
        prompt_tokens: length of the prompt.
        longest_tokens: length of the longest response.
        max_length: most tokens of prompt and one response.
        max_prompt_length: most tokens of a prompt, or None.
        least_answer_tokens: what every answer must keep room for.
    """
    most = min(max_length - least_answer_tokens, max_prompt_length or max_length)
    share = most if max_prompt_length is not None else min(most, max(max_length // 2, max_length - longest_tokens))
    if prompt_tokens <= share:
        return []
    # A middle step: from the share to all that there is would give up more of the answers than headers need.
    return sorted({min(budget, prompt_tokens) for budget in (share, (share + most) // 2, most)})


def trim_messages(messages: Sequence[Message], budget: int, policy: str, measure: Measure, spans: Spans) -> list[Message] | None:
    """The longest part of a conversation, by the rules above, whose prompt has at most `budget` tokens; None if there is none.

    Args:
        messages: the prompt; its last message may be an assistant's beginning (prefill), which is kept whole.
        budget: most tokens, the template's own included.
        policy: "keep_end" or "keep_start".
        measure: tokens of a prompt once rendered.
        spans: tokens of a text alone, as character spans.
    """
    num_lead = next((i for i, message in enumerate(messages) if message["role"] not in _SYSTEM_ROLES), len(messages))
    lead, body = list(messages[:num_lead]), list(messages[num_lead:])
    for kept_lead in [lead, []] if lead else [[]]:
        candidates = [kept_lead + part for part in _without_exchanges(body, policy)]
        fitting = _first_fitting(candidates, budget, measure)
        if fitting is not None:
            return fitting
        cut = _cut_longest(candidates[-1], len(kept_lead), budget, policy, measure, spans)
        if cut is not None:
            return cut
    return None


def _without_exchanges(body: list[Message], policy: str) -> Iterator[list[Message]]:
    """The conversation with more and more whole exchanges taken out; the last one is the last user turn and what follows it."""
    turns = [i for i, message in enumerate(body) if message["role"] == "user"] or [0]
    if policy == "keep_end":
        starts = turns if turns[0] == 0 else [0, *turns]
        yield from (body[start:] for start in starts)
    else:
        yield from (body[:end] + body[turns[-1] :] for end in reversed(turns))
        if turns[0] != 0:
            yield body[turns[-1] :]


def _first_fitting(candidates: Sequence[list[Message]], budget: int, measure: Measure) -> list[Message] | None:
    """The first candidate that fits; they get shorter, so it is found by halving."""
    if measure(candidates[-1]) > budget:
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if measure(candidates[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    return candidates[high]


def _cut_longest(messages: list[Message], num_lead: int, budget: int, policy: str, measure: Measure, spans: Spans) -> list[Message] | None:
    """The longest message of the last turn cut from one side until the prompt fits; None if nothing of it would be left."""
    is_prefill = messages[-1]["role"] == "assistant"  # the beginning of the answer itself, of which nothing may go
    choices = range(num_lead, len(messages) - is_prefill)
    if not choices:
        return None
    chosen = max(choices, key=lambda i: len(content_text(messages[i])))
    text = content_text(messages[chosen])
    tokens = spans(text)
    num_kept = len(tokens)
    excess = measure(messages) - budget
    while excess > 0:
        # The tokens of a text alone are not those of the rendered prompt, so a cut is measured, and made again if it was too small.
        num_kept -= excess
        if num_kept < 1:
            return None
        part = text[tokens[-num_kept][0] :] if policy == "keep_end" else text[: tokens[num_kept - 1][1]]
        if not part.strip():
            return None
        messages = [*messages[:chosen], {**messages[chosen], "content": part}, *messages[chosen + 1 :]]
        excess = measure(messages) - budget
    return messages


def drop_identical(pairs: Pairs, is_same: Callable[[int, int], bool]) -> tuple[Pairs, tuple[int, ...]]:
    """The pairs whose two responses differ, over the responses that are still in one; and which responses those are.

    Args:
        pairs: (chosen, rejected) indices.
        is_same: whether two responses have the same ids.

    Returns:
        pairs renumbered for the kept responses, and the kept responses' old indices, ascending.
    """
    distinct = [(chosen, rejected) for chosen, rejected in pairs if not is_same(chosen, rejected)]
    kept = tuple(sorted({index for pair in distinct for index in pair}))
    number = {old: new for new, old in enumerate(kept)}
    return tuple((number[chosen], number[rejected]) for chosen, rejected in distinct), kept


@dataclass(slots=True)
class Joined:
    """A prompt and its responses; for each response whether it carries its terminator."""

    prompt_ids: list[int]
    responses: list[list[int]]
    ended: list[bool]
    notes: list[str]


def join(draft: TurnDraft, ids: Sequence[list[int]], control_ids: Set[int]) -> Joined | Dropped:
    """Find where the prompt ends in every whole sequence, and check that each response ends as it should.

    Args:
        draft: the texts that the ids were made from.
        ids: of the prompt, then of each whole sequence.
        control_ids: ids of control tokens, which no prompt may lose.
    """
    prompt_ids, *full_ids = ids
    where, notes, num_prompt = draft.preference.where, list(draft.notes), len(prompt_ids)
    if not all(whole[:num_prompt] == prompt_ids for whole in full_ids):
        num_prompt = common_prefix(ids)
        if not control_ids.isdisjoint(prompt_ids[num_prompt:]):
            return Dropped("boundary", where, "an answer changes the tokens of the prompt's last header")
        notes.append("boundary_merge")
    if num_prompt == 0:
        return Dropped("boundary", where, "no token of the prompt stays the same with an answer after it")
    # A terminator that the template does not print is no part of the texts' ids.
    tails = [[end.terminator_id] if end.is_appended else [] for end in draft.ends]
    responses = [whole[num_prompt:] + tail for whole, tail in zip(full_ids, tails, strict=True)]
    if not all(response and response[-1] == end.terminator_id for response, end in zip(responses, draft.ends, strict=True)):
        return Dropped("boundary", where, "an answer does not end with the terminator")
    if not all(response[:-1] for response in responses):
        return Dropped("empty_answer", where, "the tokenizer makes no token of an answer")
    ended = [i not in draft.cut for i in range(len(responses))]
    responses = [response if is_ended else response[:-1] for response, is_ended in zip(responses, ended, strict=True)]
    return Joined(prompt_ids[:num_prompt], responses, ended, notes)


def cut_answers(joined: Joined, room: int, terminator_ids: Collection[int]) -> Joined:
    """Take the tails of responses of more than `room` tokens, and with a tail every terminator before it."""
    responses, ended = [], []
    for ids, was_ended in zip(joined.responses, joined.ended, strict=True):
        is_ended = was_ended and len(ids) <= room
        kept = ids[:room]
        while not is_ended and kept and kept[-1] in terminator_ids:  # the text itself held one just there
            kept = kept[:-1]
        responses.append(kept)
        ended.append(is_ended)
    return Joined(joined.prompt_ids, responses, ended, joined.notes)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first ids all sequences share."""
    shared = 0
    for column in zip(*sequences, strict=False):
        if any(index != column[0] for index in column):
            break
        shared += 1
    return shared


def distinct(pairs: Pairs, responses: Sequence[list[int]]) -> tuple[Pairs, tuple[int, ...]]:
    """Pairs of responses that differ, and the responses in them; all responses of a row without pairs."""
    if not pairs:
        return (), tuple(range(len(responses)))
    return drop_identical(pairs, lambda i, j: responses[i] == responses[j])


def to_group(preference: Preference, joined: Joined) -> TokenGroup | Dropped:
    """The group, without pairs of identical responses and without responses that are in no pair any more."""
    pairs, kept = distinct(preference.pairs, joined.responses)
    if preference.pairs and not pairs:
        return Dropped("identical_after_truncation", preference.where, "what is left of the answers has the same tokens")
    if not all(joined.responses[i] for i in kept):
        return Dropped("empty_answer", preference.where, "nothing but a terminator is left of an answer")
    notes = list(joined.notes)
    if len(pairs) < len(preference.pairs):
        notes.append("identical_pair_removed")
    if not all(joined.ended[i] for i in kept):
        notes.append("answer_cut")
    return TokenGroup(
        prompt_ids=np.asarray(joined.prompt_ids, dtype=np.int32),
        response_ids=tuple(np.asarray(joined.responses[i], dtype=np.int32) for i in kept),
        pairs=pairs,
        is_ended=tuple(joined.ended[i] for i in kept),
        where=preference.where,
        notes=tuple(dict.fromkeys(notes)),
        columns=preference.columns,
    )
