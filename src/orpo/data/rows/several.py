"""Several responses to one prompt: which notation they come in (numbered columns or lists, verdicts, votes, scores), from a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from orpo.data.rows import judged
from orpo.data.rows.columns import (
    LABELS,
    LISTS,
    RANKED,
    RANKS,
    RESPONSE_STEMS,
    SCORE_STEMS,
    SCORES,
    STRENGTHS,
    VOTER_STEMS,
    Sample,
    columns_of,
    is_number,
    prompt_line,
    prompt_reader,
    unused_line,
)
from orpo.data.rows.messages import looks_like_messages
from orpo.data.rows.pairs import PairPolicy
from orpo.data.rows.refusals import no_prompt, unlabelled
from orpo.data.rows.shapes import GroupReader, PromptReader, Reader, VotedReader
from orpo.errors import DataError

Found = tuple[Any, ...] | None
"""What a shape is made of: name, description, reader, used columns, and for grouped rows their columns; or None."""


def several_responses(sample: Sample, policy: PairPolicy) -> Found:
    """The shape of rows with several judged responses; None where there are none.

    Raises:
        DataError: responses without a verdict, or with one that can be read two ways.
    """
    groups = {stem: items for stem, items in sample.numbered(RESPONSE_STEMS).items() if len(items) > 1}
    if groups:
        return _numbered_responses(sample, max(groups.values(), key=len), policy)
    for names in (RANKED, LISTS):
        column = sample.find(names)
        if column is not None and sample.share(column, lambda value: isinstance(value, (list, tuple, Mapping))) > 0.5:
            return _listed_responses(sample, column, policy, is_in_order=names is RANKED)
    return None


def _numbered_responses(sample: Sample, items: list[tuple[str, str]], policy: PairPolicy) -> Found:
    suffixes, columns = tuple(suffix for suffix, _ in items), tuple(column for _, column in items)
    prompt = prompt_reader(sample, taken=columns)
    if not prompt.columns and sample.share(columns[0], looks_like_messages) < 0.5:
        raise no_prompt(sample, columns)
    used = [*columns_of(prompt), *columns]
    line = f"{prompt_line(prompt)}, responses = {', '.join(map(repr, columns))}"
    scored = next(((stem, marks) for stem, marks in sample.numbered(SCORE_STEMS).items() if tuple(s for s, _ in marks) == suffixes), None)
    try:
        verdict = _verdict(sample, (suffixes[0], suffixes[1])) if len(columns) == 2 else None
    except DataError:  # a label with two readings; scores beside it have one
        if scored is None:
            raise
        verdict = None
    if verdict is not None:
        how, labels, winner = verdict
        reader: Reader = VotedReader(prompt, (columns[0], columns[1]), winner)
        used += labels
        return "two responses and a verdict", f"{line}, {how}{unused_line(sample, used)}", reader, used
    if scored is not None:
        stem, marks = scored
        scores = tuple(column for _, column in marks)
        reader = GroupReader(prompt, judged.of_columns(columns, scores, lower_is_better=stem == "rank"), policy)
        used += scores
        return "scored responses", f"{line}, scores = {', '.join(map(repr, scores))}{unused_line(sample, used)}", reader, used
    votes = _vote_list(sample)
    if votes is not None and len(columns) > 2:
        reader = GroupReader(prompt, judged.of_votes(columns, votes), policy)
        used.append(votes)
        return "responses with pairwise votes", f"{line}, votes = {votes!r}{unused_line(sample, used)}", reader, used
    raise unlabelled(sample, columns)


def _vote_list(sample: Sample) -> str | None:
    """The column whose values are lists of votes."""
    return next((c for n in LABELS if (c := sample.find((n,))) and sample.share(c, lambda v: isinstance(v, (list, tuple))) > 0.5), None)


def _verdict(sample: Sample, suffixes: tuple[str, str]) -> tuple[str, list[str], judged.Verdict] | None:
    """(description, columns, verdict) for two responses, from whichever notation the columns hold."""
    strength = sample.find(STRENGTHS)
    if strength is not None:
        return f"strength = {strength!r}", [strength], judged.verdict_of_strength(strength)
    flags = [c for s in suffixes if (c := sample.find((f"winner_model_{s}", f"winner_{s}")))]
    if len(flags) == 2:
        return f"winner flags = {flags[0]!r}, {flags[1]!r}", flags, judged.verdict_of_flags((flags[0], flags[1]))
    label = next(
        (c for n in LABELS if (c := sample.find((n,))) and sample.share(c, lambda v: isinstance(v, (str, int, float))) > 0.5), None
    )
    if label is not None:
        values = [value for value in sample.values(label) if isinstance(value, (str, int, float))]
        return f"winner = {label!r}", [label], judged.verdict_of_label(label, suffixes, values, sample.where)
    votes = _vote_list(sample)
    if votes is not None:
        return f"majority of {votes!r}", [votes], judged.verdict_of_vote_list(votes, suffixes, sample.values(votes), sample.where)
    voters = [column for items in sample.numbered(VOTER_STEMS).values() for _, column in items]
    if voters:
        values = [value for column in voters for value in sample.values(column) if isinstance(value, (str, int, float))]
        each = [judged.verdict_of_label(column, suffixes, values, sample.where) for column in voters]
        return f"majority of {', '.join(map(repr, voters))}", voters, judged.verdict_of_votes(each)
    return None


def _listed_responses(sample: Sample, column: str, policy: PairPolicy, *, is_in_order: bool) -> Found:
    prompt = prompt_reader(sample, taken=(column,))
    if not prompt.columns:
        raise no_prompt(sample, (column,))
    line = f"{prompt_line(prompt)}, responses = {column!r}"
    used = [*columns_of(prompt), column]
    if is_in_order:
        reader = GroupReader(prompt, judged.of_order(column), policy)
        return "ranked responses", f"{line}, the best first{unused_line(sample, used)}", reader, used
    for names, is_rank in ((SCORES, False), (RANKS, True)):
        marks = sample.find(names)
        if marks is not None and sample.share(marks, lambda value: isinstance(value, (list, tuple))) > 0.5:
            reader = GroupReader(prompt, judged.of_list(column, marks, lower_is_better=is_rank), policy)
            used.append(marks)
            return (
                "ranked responses" if is_rank else "scored responses",
                f"{line}, {'ranks' if is_rank else 'scores'} = {marks!r}",
                reader,
                used,
            )
    items = [item for value in sample.values(column) if isinstance(value, (list, tuple)) for item in value]
    keys = Counter(key for item in items if (key := judged.own_score_key(item)))
    if not keys:
        return _with_a_winner(sample, prompt, column, policy)
    reader = GroupReader(prompt, judged.of_list(column, None, lower_is_better=False), policy)
    key = keys.most_common(1)[0][0]
    return "ranked responses" if key in judged.RANK_KEYS else "scored responses", f"{line}, each with its {key!r}", reader, used


def _names_one(value: Any) -> bool:
    return isinstance(value, str) or (is_number(value) and not isinstance(value, float))


def _with_a_winner(sample: Sample, prompt: PromptReader, column: str, policy: PairPolicy) -> Found:
    """A list of responses and a column that names the best of them."""
    label = next((c for n in LABELS if (c := sample.find((n,))) and sample.share(c, _names_one) > 0.5), None)
    if label is None:
        raise unlabelled(sample, [column], is_list=True)
    both = [(row[label], len(row[column])) for row in sample.rows if row.get(label) is not None and isinstance(row.get(column), list)]
    first = judged.first_index(label, [value for value, _ in both], [size for _, size in both], sample.where)
    used = [*columns_of(prompt), column, label]
    line = f"{prompt_line(prompt)}, responses = {column!r}, the best = {label!r}{unused_line(sample, used)}"
    return "responses and the best of them", line, GroupReader(prompt, judged.of_winner(column, label, first), policy), used
