"""The prompts that answers are sampled to, from whatever `orpo train` reads, and from rows that hold prompts alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from orpo.data.formats import Stream, to_draft
from orpo.data.reading.sources import Source, as_sources, read_source
from orpo.data.rows.columns import PROMPTS, Sample, prompt_line, prompt_reader
from orpo.data.rows.messages import BadRow, is_empty_prompt
from orpo.data.rows.shapes import Draft, PromptReader, draft_of
from orpo.data.rows.variables import TEMPLATE_KWARGS, read_template_kwargs
from orpo.data.types import Dropped, Text, Where
from orpo.errors import DataError
from orpo.evaluate.prompts import read_passages

_HEAD_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and what its row says beside it.

    Attributes:
        prompt: text or messages.
        tools: schemas of the row's tools.
        variables: the row's own variables for the chat template.
        answers: texts of the row's own answers, where they are text or one turn.
        row: as it stands in the source: references and checkers' arguments are looked up there.
    """

    prompt: Text
    where: Where
    row: Mapping[str, Any]
    tools: tuple[dict[str, Any], ...] | None = None
    variables: dict[str, Any] | None = None
    answers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What makes two prompts the same."""
        return json.dumps([self.prompt, self.tools, self.variables], sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class AskedPrompts:
    """All prompts of a source.

    Attributes:
        prompts: each once, in the order of the rows.
        reasons: how many rows gave none, by reason; `repeated_prompt` for those that were there before.
        shapes: how each source was read, in a line.
        num_rows: rows that were read.
    """

    prompts: list[Asked]
    reasons: Counter[str]
    shapes: list[str]
    num_rows: int = 0


def read_asked(
    source: Any, *, split: str | None = None, column_map: Mapping[str, str] | None = None, limit: int | None = None
) -> AskedPrompts:
    """The prompts of a file, folder, hub set, list of them, or of a `.txt` with passages parted by blank lines.

    Args:
        split, column_map: as for `orpo train`.
        limit: most prompts.

    Raises:
        DataError: a source cannot be read, or holds no prompt.
    """
    reasons: Counter[str] = Counter()
    shapes: list[str] = []
    found: dict[str, Asked] = {}
    for item in _rows(source, split, column_map, shapes):
        if isinstance(item, Dropped):
            reasons[item.reason] += 1
        elif item.key in found:
            reasons["repeated_prompt"] += 1
        else:
            found[item.key] = item
            if limit is not None and len(found) >= limit:
                break
    if not found:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "no rows"
        raise DataError(
            f"there is no prompt ({told})", where=str(source), expected="rows with a prompt", mend="`orpo preview` shows how rows are read"
        )
    return AskedPrompts(list(found.values()), reasons, shapes, len(found) + sum(reasons.values()))


def _rows(source: Any, split: str | None, column_map: Mapping[str, str] | None, shapes: list[str]) -> Iterator[Asked | Dropped]:
    if isinstance(source, (str, Path)) and str(source).endswith(".txt"):
        shapes.append("passages, parted by blank lines")
        for number, passage in enumerate(read_passages(source)):
            yield Asked(passage, Where(str(source), number), {"prompt": passage})
        return
    for one in as_sources(source, split=split, column_map=column_map):
        yield from _rows_of(one, shapes)


def _rows_of(source: Source, shapes: list[str]) -> Iterator[Asked | Dropped]:
    try:
        stream = Stream(source, sft_rows=True)
    except DataError as refused:
        yield from _prompts_alone(source, shapes, refused)
        return
    shapes.append(str(stream.shape))
    alone = _only_prompt(stream.head, stream.source.label)
    for where, row, originals in stream.with_originals():
        original = originals[0] if isinstance(originals[0], Mapping) else {}
        yield _asked(row, original, where, lambda row=row: _draft(row, stream, alone))


def _draft(row: Any, stream: Stream, alone: PromptReader | None) -> Draft:
    """As training reads the row; where its answers are at fault (a tie, none at all), the prompt alone."""
    if isinstance(row, Dropped):
        raise BadRow(row.reason, row.detail)
    try:
        return to_draft(row, stream.shape)
    except BadRow:
        if alone is None or not isinstance(row, Mapping):
            raise
        return _prompt_draft(row, alone)


def _only_prompt(rows: Sequence[Any], where: str) -> PromptReader | None:
    reader = prompt_reader(Sample(rows, where))
    return reader if reader.columns else None


def _prompts_alone(source: Source, shapes: list[str], refused: DataError) -> Iterator[Asked | Dropped]:
    """Rows that training would refuse, since they hold no answers."""
    rows = read_source(source)
    head = [item for item, _ in zip(rows, range(_HEAD_ROWS), strict=False)]
    mapping = dict(source.column_map or {})
    renamed = [_renamed(row, mapping) for _, row in head]
    reader = _only_prompt(renamed, source.label)
    if reader is None:
        if not any(isinstance(row, Mapping) for _, row in head):
            raise refused
        columns = sorted({key for _, row in head if isinstance(row, Mapping) for key in row if isinstance(key, str)})
        raise DataError(
            f"no column of a prompt (found: {', '.join(map(repr, columns)) or 'none'})",
            where=source.label,
            expected=f"one of {', '.join(PROMPTS)}",
            mend="name it: --column_map '{prompt: COLUMN}'",
        )
    shapes.append(f"prompts alone: {prompt_line(reader)}")
    for where, row in chain(head, rows):
        named = _renamed(row, mapping)
        yield _asked(named, named if isinstance(named, Mapping) else {}, where, lambda named=named: _prompt_draft(named, reader))


def _renamed(row: Any, mapping: Mapping[str, str]) -> Any:
    from orpo.data.rows.recognise import rename

    return rename(row, tuple(mapping.items())) if isinstance(row, Mapping) else row


def _prompt_draft(row: Any, reader: PromptReader) -> Draft:
    if isinstance(row, Dropped):
        raise BadRow(row.reason, row.detail)
    if not isinstance(row, Mapping):
        raise BadRow("wrong_type", "the row is no object")
    prompt = reader.read(row)
    is_answered = not isinstance(prompt, str) and len(prompt) > 1 and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    answers = (prompt[-1:],) if is_answered else ()
    return draft_of(prompt[:-1] if is_answered else prompt, answers, (), reader.read_tools(row))


def _asked(row: Any, original: Mapping[str, Any], where: Where, read: Any) -> Asked | Dropped:
    try:
        draft = read()
        variables = read_template_kwargs(row.get(TEMPLATE_KWARGS)) if isinstance(row, Mapping) else None
    except BadRow as error:
        return Dropped(error.reason, where, error.detail)
    except RecursionError:
        return Dropped("wrong_type", where, "nested too deeply")
    if is_empty_prompt(draft.prompt):
        return Dropped("empty_prompt", where)
    answers = tuple(text for response in draft.responses if (text := _answer_text(response)))
    return Asked(draft.prompt, where, original, draft.tools, variables, answers)


def _answer_text(response: Text) -> str:
    """An answer's words; "" where it is more than text (tool calls, several turns)."""
    if isinstance(response, str):
        return response.strip()
    is_text = len(response) == 1 and not response[0].get("tool_calls")
    return str(response[0]["content"]).strip() if is_text else ""
