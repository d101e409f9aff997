"""From any source to preferences: recognise the shape, read the rows, judge each one.

Nothing is dropped silently: each row that cannot be trained on becomes a `Dropped` with a reason code. What is wrong with a whole
source stops with a `DataError` before anything else is loaded.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orpo.data.reading.sources import MAX_ROW_BYTES, Source, as_sources, read_source
from orpo.data.rows.columns import normal_name
from orpo.data.rows.jsontext import decode
from orpo.data.rows.messages import BadRow, is_empty_answer, is_empty_prompt, plain_text, type_name
from orpo.data.rows.recognise import Shape, detect_shape, merge_rated_rows, rename
from orpo.data.rows.shapes import Draft
from orpo.data.rows.variables import TEMPLATE_KWARGS, read_template_kwargs
from orpo.data.types import REASONS, Dropped, Preference, Where
from orpo.errors import DataError

__all__ = ["Shape", "Source", "detect_shape", "load_preferences", "read_source", "stream_preferences", "to_preference"]

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 1000
_MEDIA = frozenset(
    [
        *("image", "images", "image_path", "image_paths", "chosen_images", "rejected_images", "pixel_values"),
        *("video", "videos", "audio", "audios"),
    ]
)
"""Columns of multimodal data sets, which mean that the text alone is not the row."""
_SAMPLE_BYTES = 32 << 20
_MAX_COLUMN_CHARS = 500
_WARN_IDENTICAL_SHARE = 0.01


def to_draft(row: Any, shape: Shape) -> Draft:
    """A row as its shape reads it, not yet judged.

    Raises:
        BadRow: the row is at fault.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong_type", f"the row is a {type_name(row)}, not an object")
    row = rename(row, shape.column_map)
    if shape.group_column is not None and "completions" not in row:
        row = merge_rated_rows([row], shape)
    try:
        return shape.reader(decode(row, shape.json_columns) if shape.json_columns else row)
    except BadRow as error:
        if error.reason == "no_preference" and shape.group_column is not None and len(row["completions"]) == 1:
            raise BadRow("unpaired", "the only rated response of its prompt") from None
        raise


def judge(draft: Draft, row: Mapping[Any, Any], shape: Shape, where: Where) -> Preference | Dropped:
    """The preference that a draft makes, or why it makes none."""
    if (medium := _medium(row, shape)) is not None:
        return Dropped("not_text", where, f"in {medium}")
    if is_empty_prompt(draft.prompt):
        return Dropped("empty_prompt", where)
    for index, response in enumerate(draft.responses):
        if is_empty_answer(response):
            return Dropped("empty_answer", where, _name_of(index, draft))
    for chosen, rejected in draft.pairs:
        if _same_answer(draft.responses[chosen], draft.responses[rejected]):
            return Dropped("identical_answers", where)
    used = shape.used | {theirs for _, theirs in shape.column_map}
    columns = {key: value for key, value in row.items() if isinstance(key, str) and key not in used and _travels(value)}
    try:
        variables = read_template_kwargs(row.get(TEMPLATE_KWARGS))
    except BadRow as bad:
        return Dropped(bad.reason, where, bad.detail)
    columns.pop(TEMPLATE_KWARGS, None)
    return Preference(draft.prompt, draft.responses, draft.pairs, where, draft.tools, columns, variables)


def _medium(row: Mapping[Any, Any], shape: Shape) -> str | None:
    """The column that holds what is no text and belongs to the row's conversation: images, sound, film."""
    for key, value in row.items():
        if isinstance(key, str) and normal_name(key) in _MEDIA and key not in shape.used and value not in (None, "", [], {}, ()):
            return repr(key)
    return None


def _name_of(index: int, draft: Draft) -> str:
    return ("chosen", "rejected")[index] if draft.pairs == ((0, 1),) else f"response {index + 1}"


def _same_answer(first: Any, second: Any) -> bool:
    """Equal but for white space at the ends; answers with tool calls are compared whole."""
    if not isinstance(first, str) and any("tool_calls" in message for message in (*first, *second)):
        return bool(first == second)
    return plain_text(first).strip() == plain_text(second).strip()


def _travels(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= _MAX_COLUMN_CHARS)


def to_preference(row: Any, shape: Shape, where: Where) -> Preference | Dropped:
    """One row as a preference, or the reason why it cannot be one. Never raises, whatever JSON value the row is."""
    if isinstance(row, Dropped):
        return row
    try:
        draft = to_draft(row, shape)
    except BadRow as error:
        return Dropped(error.reason, where, error.detail)
    except RecursionError:
        return Dropped("wrong_type", where, "nested too deeply")
    return judge(draft, row, shape, where)


class Stream:
    """The rows of one source as (where, row), with the source's shape; rows are read when they are asked for.

    Rated rows of one prompt come as one row. The first rows are held to recognise the shape, then given like the others.

    Raises:
        DataError: as `read_source` and `detect_shape`.
    """

    def __init__(
        self,
        source: Source,
        *,
        pairs: str = "best_worst",
        sft_rows: bool = False,
        streaming: bool = False,
        max_row_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        self.source = source
        rows = read_source(source, streaming=streaming, max_row_bytes=max_row_bytes)
        head = _head(rows)
        if not head:
            raise DataError("no rows", where=source.label, expected="at least one row", mend="check the path and the split")
        self._rows = itertools.chain(head, rows)
        label = str(head[0][0].file)
        self.head = [row for _, row in head]
        self.shape = detect_shape(self.head, source.column_map, pairs=pairs, sft_rows=sft_rows, where=label)

    def __iter__(self) -> Iterator[tuple[Where, Any]]:
        for where, row, _ in self.with_originals():
            yield where, row

    def with_originals(self) -> Iterator[tuple[Where, Any, list[Any]]]:
        """(where, row as it is read, rows as they stand in the source): several of the latter where rated rows were put together."""
        column = self.shape.group_column
        if column is None:
            for where, row in self._rows:
                yield where, row, [row]
            return
        for is_prompt, found in self._by_prompt(column):
            if is_prompt:
                originals = [row for _, row in found]
                yield found[0][0], merge_rated_rows([rename(row, self.shape.column_map) for row in originals], self.shape), originals
            else:
                for where, row in found:
                    yield where, row, [row]

    def _by_prompt(self, column: str) -> Iterator[tuple[bool, list[tuple[Where, Any]]]]:
        """(whether they have a prompt, rows that belong together), in the order of each one's first row."""
        if not self.shape.is_scattered:
            for (is_prompt, _), items in itertools.groupby(self._rows, key=lambda item: _group_key(item[1], self.shape, column)):
                yield is_prompt, list(items)
            return
        groups: dict[Any, list[tuple[Where, Any]]] = {}
        for where, row in self._rows:
            groups.setdefault(_group_key(row, self.shape, column), []).append((where, row))
        for (is_prompt, _), rows in groups.items():
            yield is_prompt, rows


def _head(rows: Iterator[tuple[Where, Any]]) -> list[tuple[Where, Any]]:
    """The first rows; fewer where they are large, so that a sample stays small."""
    head: list[tuple[Where, Any]] = []
    num_bytes = 0
    for where, row in rows:
        head.append((where, row))
        num_bytes += rough_size(row)
        if len(head) >= _SAMPLE_ROWS or num_bytes > _SAMPLE_BYTES:
            break
    return head


def rough_size(value: Any) -> int:
    """Characters of the texts in a value, two levels deep."""
    if isinstance(value, str):
        return len(value)
    items: Iterable[Any] = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(len(item) if isinstance(item, str) else 100 for item in items)


def _group_key(row: Any, shape: Shape, column: str) -> tuple[bool, Any]:
    if isinstance(row, Mapping):
        value = rename(row, shape.column_map).get(column)
        if value is not None:
            return True, repr(value)
    return False, id(row)


def stream_preferences(
    source: Any,
    *,
    split: str | None = None,
    column_map: Mapping[str, str] | None = None,
    pairs: str = "best_worst",
    sft_rows: bool = False,
    strict: bool = False,
    streaming: bool = True,
    max_row_bytes: int = MAX_ROW_BYTES,
    is_again: bool = False,
    is_endless: bool = False,
) -> Iterator[Preference | Dropped]:
    """Preferences and dropped rows one at a time, for sets larger than memory. Arguments and errors as for `load_preferences`.

    What is wrong with a whole source is raised at once, what is wrong further on in it when it is reached. With `is_again` the source was
    opened before, and its shape is not told once more; with `is_endless` it is never read to its end: a shape that needs that is refused.

    Example:
        >>> from orpo.data.formats import stream_preferences
        >>> rows = [
        ...     {"question": "2 + 2?", "answers": ["4", "5"], "scores": [1, 0]},
        ...     {"question": "3 + 3?", "answers": ["6", ""], "scores": [1, 0]},
        ... ]
        >>> [type(item).__name__ for item in stream_preferences(rows, column_map={"prompt": "question", "completions": "answers"})]
        ['Preference', 'Dropped']
    """
    streams = _open_streams(
        source, split, column_map, pairs, sft_rows, streaming, max_row_bytes, level=logging.DEBUG if is_again else logging.INFO
    )
    for stream in streams if is_endless else ():
        if stream.shape.is_scattered:
            raise DataError(
                "rows of one prompt stand apart, so that the whole source would have to be read to find them",
                where=stream.source.label,
                expected="rows of one prompt one after the other",
                mend="sort the rows by prompt, or leave streaming out",
            )
    return _strictly(_mixed(streams), strict)


def _open_streams(
    source: Any,
    split: str | None,
    column_map: Mapping[str, str] | None,
    pairs: str,
    sft_rows: bool,
    streaming: bool,
    max_row_bytes: int,
    *,
    level: int = logging.INFO,
) -> list[Stream]:
    sources = as_sources(source, split=split, column_map=column_map)
    weights = [item.weight is not None for item in sources]
    if any(weights) and not all(weights):
        raise DataError(
            "some sources have a weight and some have none",
            where="the data set",
            expected="a weight for each source, or for none",
            mend="give the others weight: 1",
        )
    streams = [Stream(item, pairs=pairs, sft_rows=sft_rows, streaming=streaming, max_row_bytes=max_row_bytes) for item in sources]
    for stream in streams:
        logger.log(level, "%s: %s", stream.source.label, stream.shape)
    return streams


def _verdicts(stream: Stream) -> Iterator[Preference | Dropped]:
    for where, row in stream:
        yield to_preference(row, stream.shape, where)


def _mixed(streams: Sequence[Stream]) -> Iterator[Preference | Dropped]:
    """One source after the other; with weights, interleaved in those proportions until one runs out, so that no row is used twice."""
    weights = [stream.source.weight for stream in streams]
    readers = [_verdicts(stream) for stream in streams]
    if len(streams) == 1 or None in weights:
        yield from itertools.chain.from_iterable(readers)
        return
    shares = [weight for weight in weights if weight is not None]
    taken = [0] * len(shares)
    while True:
        # Whose turn it is: the source that one row more would put least ahead of its share.
        turn = min(range(len(shares)), key=lambda index: (taken[index] + 1) / shares[index])
        for item in readers[turn]:
            yield item
            # A dropped row is passed on and counts for nothing: the proportions are of what is trained on.
            if isinstance(item, Preference):
                taken[turn] += 1
                break
        else:
            logger.info(
                "the mix ends with %s, after %s rows of each source: weights hold, no row is used twice",
                streams[turn].source.label,
                "/".join(map(str, taken)),
            )
            return


def _strictly(items: Iterator[Preference | Dropped], strict: bool) -> Iterator[Preference | Dropped]:
    for item in items:
        if strict and isinstance(item, Dropped):
            raise strict_error(item)
        yield item


def strict_error(dropped: Dropped) -> DataError:
    """The error that `strict` makes of a dropped row."""
    detail = f" ({dropped.detail})" if dropped.detail else ""
    return DataError(
        f"{dropped.reason}: {REASONS[dropped.reason]}{detail}",
        where=str(dropped.where),
        expected="a row that can be trained on",
        mend="repair or remove the row, or leave strict_data out (strict, in Python): such rows are then dropped and counted",
    )


def load_preferences(
    source: Any,
    *,
    split: str | None = None,
    column_map: Mapping[str, str] | None = None,
    pairs: str = "best_worst",
    sft_rows: bool = False,
    strict: bool = False,
    streaming: bool = False,
    max_rows: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> tuple[list[Preference], list[Dropped], Shape]:
    """All preferences of a source, and all rows that make none.

    Args:
        source: a file (json, jsonl, csv, tsv, parquet, arrow, .gz), folder, glob, hub id, `datasets` object, list of rows, or a list of
            several sources (paths, `Source`s, or mappings with `path`, `weight`, `split`, …), read one after the other, or mixed in the
            proportions of their weights.
        split: the split to take where there are several; None: the only one, or `train`.
        column_map: our column names to the source's, where it is not recognised by itself.
        pairs: the pairs of a row with several judged responses: `best_worst`, `all`, `adjacent`, `margin:M`.
        sft_rows: take rows with one answer and none to reject as SFT-only rows.
        strict: stop at the first row that would be dropped, naming file and line.
        streaming: read a hub data set over the network, without a copy on disk.
        max_rows: stop after this many rows.
        max_row_bytes: rows above this are dropped, without being held in memory.

    Returns:
        (preferences, dropped rows, shape); with several sources, a shape that names each.

    Raises:
        DataError: the source is missing, damaged or not a preference data set, or nothing in it can be used.

    Example:
        >>> from orpo.data.formats import load_preferences
        >>> preferences, dropped, shape = load_preferences("pairs.jsonl")
        >>> len(preferences), len(dropped)
        (12, 0)
        >>> preferences[0].responses
        ('A good answer to 0.', 'No. 0!')
    """
    streams = _open_streams(source, split, column_map, pairs, sft_rows, streaming, max_row_bytes)
    preferences: list[Preference] = []
    dropped: list[Dropped] = []
    for item in itertools.islice(_strictly(_mixed(streams), strict), max_rows):
        (preferences if isinstance(item, Preference) else dropped).append(item)  # type: ignore[arg-type]
    reasons = Counter(item.reason for item in dropped)
    if not preferences:
        raise nothing_left(dropped, ", ".join(stream.source.label for stream in streams))
    _warn(reasons, len(preferences) + len(dropped))
    return preferences, dropped, _joint_shape(streams)


def _joint_shape(streams: Sequence[Stream]) -> Shape:
    shape = streams[0].shape
    if len(streams) == 1:
        return shape
    return Shape("several sources", "; ".join(f"{stream.source.label}: {stream.shape}" for stream in streams), shape.reader)


def nothing_left(dropped: Sequence[Dropped], where: str) -> DataError:
    """The error for a source of which every row was dropped, with the histogram of reasons and the first row of each."""
    first: dict[str, Dropped] = {}
    for item in dropped:
        first.setdefault(item.reason, item)
    told = {reason: f"{item.where}{f', {item.detail}' if item.detail else ''}" for reason, item in first.items()}
    counts = Counter(item.reason for item in dropped).most_common()
    histogram = "; ".join(f"{number} {reason}: {REASONS[reason]} (first: {told[reason]})" for reason, number in counts)
    return DataError(
        f"no row can be trained on: {histogram}",
        where=where,
        expected="at least one usable preference",
        mend="`orpo audit` shows the rows and what to do about each reason",
    )


def _warn(reasons: Mapping[str, int], num_rows: int) -> None:
    if reasons:
        logger.warning("%d of %d rows dropped: %s", sum(reasons.values()), num_rows, ", ".join(f"{n} {r}" for r, n in reasons.items()))
    identical = reasons.get("identical_answers", 0)
    if identical > _WARN_IDENTICAL_SHARE * num_rows:
        logger.warning("%.1f %% of the rows have the same answer on both sides; check how the pairs were made", 100 * identical / num_rows)
