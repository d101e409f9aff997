"""Prompt and responses proved to fit together on the tokens, and made a token group.

Texts that are prefixes of each other need not be so as tokens: a tokenizer may merge the prompt's last characters with the answer's first.
Here that is looked at id by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orpo.data.truncate import drop_identical
from orpo.data.turns import Draft
from orpo.data.types import Dropped, Pairs, Preference, TokenGroup


@dataclass(frozen=True, slots=True)
class Ends:
    """How sequences end, and which ids no prompt may lose.

    Attributes:
        terminator_id: the id that ends an answer.
        is_appended: it is not part of the texts' ids, so it is put after them.
        control_ids: ids of control tokens.
    """

    terminator_id: int
    is_appended: bool
    control_ids: frozenset[int]


@dataclass(slots=True)
class Joined:
    """A prompt and its responses; for each response whether it carries its terminator."""

    prompt_ids: list[int]
    responses: list[list[int]]
    ended: list[bool]
    notes: list[str]


def join(draft: Draft, ids: Sequence[list[int]], ends: Ends) -> Joined | Dropped:
    """Find where the prompt ends in every whole sequence, and check that each response ends as it should.

    Args:
        draft: the texts that the ids were made from.
        ids: of the prompt, then of each whole sequence.
        ends: how sequences end.
    """
    prompt_ids, *full_ids = ids
    where, notes, num_prompt = draft.preference.where, list(draft.notes), len(prompt_ids)
    if not all(whole[:num_prompt] == prompt_ids for whole in full_ids):
        num_prompt = common_prefix(ids)
        if not ends.control_ids.isdisjoint(prompt_ids[num_prompt:]):
            return Dropped("boundary", where, "an answer changes the tokens of the prompt's last header")
        notes.append("boundary_merge")
    if num_prompt == 0:
        return Dropped("boundary", where, "no token of the prompt stays the same with an answer after it")
    end = [ends.terminator_id] if ends.is_appended else []
    responses = [whole[num_prompt:] + end for whole in full_ids]
    if not all(response and response[-1] == ends.terminator_id for response in responses):
        return Dropped("boundary", where, "an answer does not end with the terminator")
    if not all(response[:-1] for response in responses):
        return Dropped("empty_answer", where, "the tokenizer makes no token of an answer")
    ended = [i not in draft.cut for i in range(len(responses))]
    responses = [response if is_ended else response[:-1] for response, is_ended in zip(responses, ended, strict=True)]
    return Joined(prompt_ids[:num_prompt], responses, ended, notes)


def cut_answers(joined: Joined, room: int, terminator_id: int) -> Joined:
    """Take the tails of responses of more than `room` tokens, and with a tail every terminator before it."""
    responses, ended = [], []
    for ids, was_ended in zip(joined.responses, joined.ended, strict=True):
        is_ended = was_ended and len(ids) <= room
        kept = ids[:room]
        while not is_ended and kept and kept[-1] == terminator_id:  # the text itself held one just there
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
