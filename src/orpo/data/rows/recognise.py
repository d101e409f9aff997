"""Which row shape a source has, from its column names and a sample of its rows, or why it cannot be used.

What is wrong with the whole source (a missing column, no second answer, no verdict) is told here, before any model is loaded, with what
was found, what would be needed and the nearest thing to it.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orpo.data.rows import judged
from orpo.data.rows.columns import (
    ANSWERS,
    CHOSEN,
    PAIR_EXAMPLE,
    RATINGS,
    REJECTED,
    RESPONSE_STEMS,
    Sample,
    columns_of,
    is_number,
    normal_name,
    prompt_line,
    prompt_reader,
    unused_line,
    verdict_on_one_answer,
)
from orpo.data.rows.jsontext import decode, json_columns
from orpo.data.rows.messages import BadRow, is_transcript, looks_like_messages, read_messages, type_name
from orpo.data.rows.pairs import PairPolicy, parse_policy
from orpo.data.rows.refusals import map_hint, no_prompt, refusal, refuse_objects, refuse_second_answers
from orpo.data.rows.several import Found, several_responses
from orpo.data.rows.shapes import GroupReader, PairReader, PromptReader, Reader, SftReader
from orpo.data.types import Dropped
from orpo.errors import DataError

CANONICAL = (
    *("prompt", "instruction", "question", "input", "system", "tools", "history", "messages", "chosen", "rejected"),
    *("winner", "label", "completions", "responses", "scores", "ranks", "response", "completion", "score"),
)
"""Names that a column map may give to columns."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the rows of one source are read.

    Attributes:
        name: the shape's short name.
        description: one line for people: the shape, and which column is taken for what.
        reader: reads one row.
        used: the columns that the reader looks at; the others travel along with the row.
        column_map: our names to the source's, as given.
        group_column: rows with the same value here are one prompt's responses: those that follow each other (HelpSteer), or all.
        is_scattered: all of them, wherever they stand; the source is then read to its end first.
    """

    name: str
    description: str
    reader: Reader
    used: frozenset[str] = frozenset()
    column_map: tuple[tuple[str, str], ...] = ()
    group_column: str | None = None
    answer_column: str | None = None
    score_column: str | None = None
    is_scattered: bool = False
    json_columns: frozenset[str] = frozenset()
    """Columns whose text is JSON: messages, or lists of texts."""

    def __str__(self) -> str:
        return f"{self.name}: {self.description}"


def lookup(row: Mapping[Any, Any], path: str) -> Any:
    """A column, or a dotted path into nested objects and lists (`input.messages`, `output.0`); None where there is nothing."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, (list, tuple)) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def rename(row: Mapping[Any, Any], column_map: Sequence[tuple[str, str]]) -> Mapping[Any, Any]:
    """The row under our names: mapped columns renamed, the others as they are."""
    if not column_map:
        return row
    taken = {path for _, path in column_map}
    renamed = {key: value for key, value in row.items() if key not in taken}
    renamed.update({ours: lookup(row, theirs) for ours, theirs in column_map})
    return renamed


def detect_shape(
    rows: Sequence[Any],
    column_map: Mapping[str, str] | None = None,
    *,
    pairs: str = "best_worst",
    sft_rows: bool = False,
    where: str = "the data set",
) -> Shape:
    """The shape of a source, from a sample of its rows.

    Args:
        rows: the first rows, as they stand in the source.
        column_map: our names to the source's (dotted paths reach into objects), for what is not recognised or recognised wrongly.
        pairs: which pairs to take from several judged responses: best_worst, all, adjacent, margin:M.
        sft_rows: take rows with one good answer and no rejected one as SFT-only rows.
        where: what to call the source in errors.

    Raises:
        DataError: a needed column is missing, the rows are unpaired (KTO), unlabelled or instruction-only, a label can be read two ways, or
            the column map names a column that is not there.
    """
    policy = parse_policy(pairs)
    mapping = _checked_map(rows, column_map, where)
    named = [rename(row, mapping) for row in rows if isinstance(row, Mapping)]
    in_json = json_columns(named, where)
    sample = Sample([decoded for row in named if (decoded := _decoded(row, in_json)) is not None], where)
    if not sample.rows:
        kinds = sorted({"unreadable row" if isinstance(row, Dropped) else type_name(row) for row in rows})
        raise DataError(
            f"no row is an object (found: {', '.join(kinds) or 'no rows'})",
            where=where,
            expected=f"rows such as {PAIR_EXAMPLE}",
            mend="write one object per row",
        )
    shape = _pair_shape(sample, sft_rows) or several_responses(sample, policy) or _rated_rows(sample, policy, mapping)
    if shape is None:
        refuse_second_answers(sample)
        shape = _sft_shape(sample) if sft_rows else None
    if shape is None:
        raise refusal(sample)
    name, description, reader, used, *grouping = shape
    refuse_objects(sample, reader)
    if told := sorted(in_json & set(used)):
        description += f"; JSON text in {', '.join(map(repr, told))}"
    return replace(Shape(name, description, reader, frozenset(used), mapping, *grouping), json_columns=in_json)


def _decoded(row: Mapping[Any, Any], columns: frozenset[str]) -> Mapping[Any, Any] | None:
    try:
        return decode(row, columns)
    except BadRow:
        return None


def _checked_map(rows: Sequence[Any], column_map: Mapping[str, str] | None, where: str) -> tuple[tuple[str, str], ...]:
    mapping = tuple((ours, theirs) for ours, theirs in (column_map or {}).items())
    columns = sorted({key for row in rows if isinstance(row, Mapping) for key in row if isinstance(key, str)})
    for ours, theirs in mapping:
        if ours not in CANONICAL:
            raise DataError(
                f"column_map: {ours!r} is none of our names",
                where=where,
                expected=", ".join(CANONICAL),
                mend=f"write {{ours: theirs}}{_near(ours, CANONICAL)}",
            )
        if not any(isinstance(row, Mapping) and lookup(row, theirs) is not None for row in rows):
            raise DataError(
                f"column_map: no row has {theirs!r} (found: {', '.join(map(repr, columns))})",
                where=where,
                expected="a column of the data, or a dotted path into one",
                mend=f"correct the name{_near(theirs, columns)}",
            )
    return mapping


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _pair_shape(sample: Sample, sft_rows: bool) -> Found:
    chosen, rejected = sample.find(CHOSEN), sample.find(REJECTED)
    if chosen is None and rejected is None:
        return None
    if chosen is None and sample.share(rejected, _is_text_or_messages) > 0.5:  # ms-swift: the chosen answer ends the conversation
        talks = (sample.find((name,)) for name in ("messages", "conversations", "conversation"))
        chosen = next((column for column in talks if sample.share(column, _is_answered) > 0.8), None)
    if chosen is None or rejected is None or not sample.filled[chosen] or not sample.filled[rejected]:
        return None if _is_verdict(sample, chosen) else _half_a_pair(sample, chosen, rejected, sft_rows)
    prompt = prompt_reader(sample, taken=(chosen, rejected))
    # Transcripts hold the whole conversation, so a prompt column beside them repeats it.
    transcripts = min(sample.share(chosen, is_transcript), sample.share(rejected, is_transcript)) >= 0.8
    if transcripts or not any(sample.filled[column] for column in prompt.columns):
        prompt = PromptReader((), prompt.system, prompt.tools)
        if not transcripts and sample.share(chosen, lambda value: isinstance(value, str)) > 0.5:
            raise no_prompt(sample, (chosen, rejected))
    name = _pair_name(sample, prompt, chosen, transcripts)
    sft_columns = tuple(c for n in ("completion", "response", "output", "answer") if (c := sample.find((n,)))) if sft_rows else ()
    reader = PairReader(prompt, chosen, rejected, transcripts, (*sft_columns, chosen) if sft_rows else ())
    used = [*columns_of(prompt), chosen, rejected]
    line = f"{prompt_line(prompt)}, chosen = {chosen!r}, rejected = {rejected!r}{unused_line(sample, used)}"
    return name, line, reader, used


def _is_text_or_messages(value: Any) -> bool:
    return isinstance(value, str) or looks_like_messages(value)


def _is_answered(value: Any) -> bool:
    """Whether a conversation has a question, and the assistant's answer as its last turn."""
    if not isinstance(value, (list, tuple)) or not looks_like_messages(value):
        return False
    try:
        messages = read_messages(value, "messages")
    except BadRow:
        return False
    return len(messages) > 1 and messages[-1]["role"] == "assistant"


def _is_verdict(sample: Sample, column: str | None) -> bool:
    """`preferred` may hold the name of a response instead of the response."""
    return bool(sample.numbered(RESPONSE_STEMS)) and column is not None


def _half_a_pair(sample: Sample, chosen: str | None, rejected: str | None, sft_rows: bool) -> Found:
    has_chosen = chosen is not None and bool(sample.filled[chosen])
    if has_chosen and sft_rows and chosen is not None:
        prompt = prompt_reader(sample, taken=(chosen,))
        return "instruction-only", f"{prompt_line(prompt)}, answer = {chosen!r}", SftReader(prompt, chosen), [*columns_of(prompt), chosen]
    missing, names = ("rejected", REJECTED) if has_chosen else ("chosen", CHOSEN)
    there = chosen if has_chosen else rejected
    empty = rejected if has_chosen else chosen
    what = f"the column {empty!r} is null in every row" if empty else f"no column for the {missing} answer"
    raise sample.error(
        what, expected=f"a column {missing!r} beside {there!r}: {PAIR_EXAMPLE}", mend=map_hint(sample, missing, names, (there,))
    )


def _pair_name(sample: Sample, prompt: PromptReader, chosen: str, transcripts: bool) -> str:
    if transcripts:
        return "HH transcripts"
    if not prompt.columns:
        return "implicit prompts"
    value = next(iter(sample.values(prompt.columns[0])), None)
    if isinstance(value, Mapping) and "messages" in value:
        return "OpenAI preference"
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(first, Mapping) and "from" in first:
        return "ShareGPT preference"
    kind = "messages" if any(looks_like_messages(v) for v in sample.values(chosen)[:20]) or isinstance(value, list) else "strings"
    names = "instruction" if normal_name(prompt.columns[0]) in {"instruction", "question"} else "prompt"
    return f"{names}/chosen/rejected ({kind})"


def _rated_rows(sample: Sample, policy: PairPolicy, mapping: Sequence[tuple[str, str]]) -> Found:
    """One rated response per row: the rows of a prompt one after the other (HelpSteer), or wherever they stand.

    Args:
        mapping: the column map; a score that it names is one, even where no prompt of the sample comes twice.
    """
    score, answer = sample.find(RATINGS), sample.find(ANSWERS[:5])
    if score is None or answer is None or sample.share(score, lambda value: isinstance(value, bool) or is_number(value)) < 0.5:
        return None
    prompt = prompt_reader(sample, taken=(answer,))
    if len(prompt.columns) != 1:
        return None
    column = prompt.columns[0]
    prompts = [repr(row.get(column)) for row in sample.rows if row.get(column) is not None]
    if len(set(prompts)) == len(prompts) and "score" not in dict(mapping):
        return None
    runs = [prompt for prompt, _ in itertools.groupby(prompts)]
    is_scattered = len(runs) == len(prompts) or len(set(runs)) < len(runs)
    grouped = PromptReader((column,), prompt.system, prompt.tools)
    reader = GroupReader(grouped, judged.of_list("completions", None, lower_is_better=False), policy)
    used = [*columns_of(grouped), answer, score]
    which = "all" if is_scattered else "neighbouring"
    line = f"{prompt_line(grouped)}, response = {answer!r}, score = {score!r}, {which} rows of one prompt together"
    return "one rated response per row", line + unused_line(sample, used), reader, used, column, answer, score, is_scattered


def merge_rated_rows(rows: Sequence[Mapping[Any, Any]], shape: Shape) -> Mapping[Any, Any]:
    """The rated rows of one prompt as one row with completions."""
    scores = [float(mark) if isinstance(mark := row.get(shape.score_column), bool) else mark for row in rows]
    completions = [{"text": row.get(shape.answer_column), "score": score} for row, score in zip(rows, scores, strict=True)]
    return {**rows[0], "completions": completions}


def _sft_shape(sample: Sample) -> Found:
    answer = next((c for n in ANSWERS if (c := sample.find((n,))) and sample.filled[c]), None)
    if answer is None:
        return None
    prompt = prompt_reader(sample, taken=(answer,))
    if not prompt.columns and not any(looks_like_messages(value) for value in sample.values(answer)):
        return None
    label = verdict_on_one_answer(sample)
    used = [*columns_of(prompt), answer, *([label] if label else [])]
    good = f" where {label!r} says good" if label else ""
    line = f"{prompt_line(prompt)}, answer = {answer!r}{good}, next-token loss only{unused_line(sample, used)}"
    return "instruction-only", line, SftReader(prompt, answer, label), used
