"""A whole source to token groups: by several processes where that pays, into the cache where there is one, else into memory."""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from orpo.data.dataset import DataReport, chunks, empty_report, log_warnings
from orpo.data.settings import DataSettings
from orpo.data.stored.content import num_bytes_of, rows_key
from orpo.data.stored.groups import GroupsWriter, as_batch, group_at
from orpo.data.stored.measures import prompt_hash
from orpo.data.stored.tokencache import AUTO, GROUPS_NAME, MIN_BYTES, CachedSet, TokenCache, cache_folder
from orpo.data.stored.workers import can_fork, map_in_processes
from orpo.data.template import unusable_row
from orpo.data.types import Dropped, Preference, Text, TokenGroup, Where

if TYPE_CHECKING:
    from orpo.data.template import TemplateEncoder

logger = logging.getLogger(__name__)

Rows = Iterable[Preference | Dropped]
Chunk = Sequence[Preference | Dropped]


@dataclass(frozen=True, slots=True)
class Means:
    """With what rows are tokenised.

    Attributes:
        num_processes: the option `dataset_num_proc`.
        cache: the option `token_cache`.
        rows_alone: what one process tokenises before others are started: a set that ends there is done sooner without.
    """

    num_processes: int | None = None
    cache: str | None = None
    rows_alone: int = 2048


@dataclass
class TokenisedRows:
    """Token groups of a source.

    Attributes:
        groups: in memory, or in the cache.
        report: what became of every row.
        prompts: some prompts as the rows have them, by where they are.
        note: what there is to say of the cache, or None.
    """

    groups: Sequence[TokenGroup]
    report: DataReport
    prompts: dict[Where, Text] = field(default_factory=dict)
    note: str | None = None


class KeptPrompts:
    """Prompts as the rows have them, kept while rows pass by: of every row, or of every second, fourth, … where there are many."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self.kept: dict[Where, Text] = {}

    def watch(self, rows: Rows) -> Iterator[Preference | Dropped]:
        """The rows, unchanged."""
        step = 1
        for number, row in enumerate(rows):
            if number % step == 0 and isinstance(row, Preference):
                self.kept[row.where] = row.prompt
                if len(self.kept) > self._most:
                    step *= 2
                    for where in list(self.kept)[1::2]:
                        del self.kept[where]
            yield row


def tokenise_source(
    open_rows: Callable[[], Rows],
    encoder: TemplateEncoder,
    *,
    spec: Any,
    split: str | None,
    settings: DataSettings,
    means: Means,
    tell: Callable[[str], None] = lambda line: None,
) -> TokenisedRows:
    """The token groups of a source: read from the cache, or made.

    Args:
        open_rows: gives its rows, judged; called again if the cache fails on the way.
        spec, split: the source, as `orpo.data.formats.stream_preferences` takes it.
        settings: how it is read.
        tell: receives what a user should know while he waits.

    Raises:
        DataError: with `strict_data`, at the first dropped row; or what reading or tokenising raises.
    """
    cache = _cache_for(spec, split, settings, means)
    key = None if cache is None else rows_key(spec, split, settings, encoder, cache.file_hash)
    if cache is None or key is None:
        return _in_memory(open_rows(), encoder, means)
    try:
        found, was_there = cache.get(
            key,
            functools.partial(_write, open_rows=open_rows, encoder=encoder, means=means, num_bytes=num_bytes_of(spec, split)),
            lambda: tell("             another process tokenises these rows; waiting for it"),
        )
    except OSError as error:  # of the cache: what sources raise are DataErrors
        logger.warning(
            "the token cache %s cannot be used (%s): rows are tokenised at every start and held in memory; "
            "token_cache: FOLDER names another place, token_cache: none does without",
            cache.folder,
            error.strerror or error,
        )
        return _in_memory(open_rows(), encoder, means)
    report = empty_report(encoder)
    report.restore(found.facts["report"])
    log_warnings(report)
    how = "read from" if was_there else "written to"
    return TokenisedRows(found.groups, report, _prompts_of(found), f"{how} the token cache {cache.folder}")


def _cache_for(spec: Any, split: str | None, settings: DataSettings, means: Means) -> TokenCache | None:
    folder = cache_folder(means.cache)
    if folder is None or settings.dataset_streaming:
        return None
    if means.cache == AUTO:
        num_bytes = num_bytes_of(spec, split)
        if num_bytes is not None and num_bytes < MIN_BYTES:
            return None
    return TokenCache(folder)


def _prompts_of(found: CachedSet) -> dict[Where, Text]:
    return {Where(*where): prompt if isinstance(prompt, str) else tuple(prompt) for where, prompt in found.facts["prompts"]}


def _in_memory(rows: Rows, encoder: TemplateEncoder, means: Means) -> TokenisedRows:
    prompts, report = KeptPrompts(), empty_report(encoder)
    groups: list[TokenGroup] = []
    for part, some in encode_all(chunks(prompts.watch(rows)), encoder, means):
        report.merge(part)
        groups += some
    log_warnings(report)
    return TokenisedRows(groups, report, prompts.kept)


def _write(folder: Path, *, open_rows: Callable[[], Rows], encoder: TemplateEncoder, means: Means, num_bytes: int | None) -> dict[str, Any]:
    """Tokenise into a folder of the cache.

    Args:
        num_bytes: of the sources, which is about what their ids take: with less than that free nothing is begun.

    Returns:
        The facts to keep.
    """
    if shutil.disk_usage(folder).free < (num_bytes or 0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rows = open_rows()
    prompts, report = KeptPrompts(), empty_report(encoder)
    writer = GroupsWriter(folder / GROUPS_NAME)
    try:
        for part, some in _encoded(chunks(prompts.watch(rows)), encoder, means):
            report.merge(part)
            writer.add(as_batch(some) if isinstance(some, list) else some)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    kept = [[[where.file, where.row, where.line], prompt] for where, prompt in prompts.kept.items()]
    return {"report": report.to_state(), "fingerprint": writer.fingerprint, "prompts": kept}


Encoded = tuple[DataReport, list[TokenGroup] | pa.RecordBatch]
"""What became of some rows, and their groups: as they are, or as rows of a file where another process made them."""


def _encoded(pieces: Iterator[Chunk], encoder: TemplateEncoder, means: Means, set_aside: frozenset[int] = frozenset()) -> Iterator[Encoded]:
    num_processes, num_rows = means.num_processes or 1, 0
    for chunk in pieces:
        yield encode_chunk(chunk, encoder, set_aside)
        num_rows += len(chunk)
        if num_processes > 1 and can_fork() and num_rows >= means.rows_alone:
            break
    if (first := next(pieces, None)) is None:
        return
    work = functools.partial(_encode_for_file, encoder=encoder, set_aside=set_aside)
    for part, content in map_in_processes(work, itertools.chain([first], pieces), num_processes):
        with pa.ipc.open_stream(content) as reader:
            yield part, reader.read_next_batch()


def encode_all(
    pieces: Iterator[Chunk], encoder: TemplateEncoder, means: Means, set_aside: frozenset[int] = frozenset()
) -> Iterator[tuple[DataReport, list[TokenGroup]]]:
    """What became of each chunk of rows, in order, and its groups.

    Args:
        set_aside: hashes of prompts whose rows are dropped as `held_out`.
    """
    for part, some in _encoded(pieces, encoder, means, set_aside):
        yield part, some if isinstance(some, list) else [group_at(some, at) for at in range(some.num_rows)]


def encode_chunk(chunk: Chunk, encoder: TemplateEncoder, set_aside: frozenset[int] = frozenset()) -> tuple[DataReport, list[TokenGroup]]:
    """Some rows as groups, and what became of each; `set_aside` as for `encode_all`."""
    report, groups = DataReport(), []
    encoded = iter(encoder.encode_many([row for row in chunk if isinstance(row, Preference)]))
    for row in chunk:
        result = row if isinstance(row, Dropped) else next(encoded)
        if encoder.is_strict and isinstance(result, Dropped):
            raise unusable_row(result)
        if set_aside and isinstance(result, TokenGroup) and prompt_hash(result.prompt_ids) in set_aside:
            result = Dropped("held_out", result.where)
        report.add(result)
        if isinstance(result, TokenGroup):
            groups.append(result)
    return report, groups


def _encode_for_file(chunk: Chunk, *, encoder: TemplateEncoder, set_aside: frozenset[int]) -> tuple[DataReport, bytes]:
    report, groups = encode_chunk(chunk, encoder, set_aside)
    sink = pa.BufferOutputStream()
    batch = as_batch(groups)
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return report, sink.getvalue().to_pybytes()
