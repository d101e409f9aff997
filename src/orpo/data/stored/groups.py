"""Token groups in one Arrow file of the kind that the `datasets` library writes (an IPC stream), memory-mapped.

A row's `content` is what its fingerprint is taken of, in that order: how many arrays, their lengths, which responses came to their end, the
pairs, then all ids. So the fingerprint of a file is the hash of one column, and a row needs one look to be read.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from orpo.data.stored.measures import Measures, measure
from orpo.data.types import TokenGroup, Where

SCHEMA = pa.schema(
    [
        pa.field("content", pa.list_(pa.int32())),
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("line", pa.int64()),
        pa.field("notes", pa.string()),
        pa.field("columns", pa.string()),
        *(pa.field(item.name, pa.uint64() if item.name == "prompt_hash" else pa.int32()) for item in fields(Measures)),
    ]
)
BATCH_ROWS = 4096
"""Rows of a record batch in a file: what is opened is proportional to their number."""

_READS_BETWEEN_RELEASES = 2048
_NO_LINE = -1


def content_of(group: TokenGroup) -> np.ndarray:
    """int32: the head, then all ids. Lengths first, so that no two groups read alike."""
    # Little-endian below, whatever the machine: a fingerprint is compared between machines.
    arrays = [group.prompt_ids, *group.response_ids]
    head = [len(arrays), *map(len, arrays), *map(int, group.is_ended), *(index for pair in group.pairs for index in pair)]
    return np.concatenate([np.asarray(head, dtype="<i4"), *arrays]).astype("<i4", copy=False)


def as_batch(groups: Sequence[TokenGroup]) -> pa.RecordBatch:
    """Groups as rows of a file.

    Raises:
        ValueError: a group has log-probabilities of a reference, which files do not keep.
    """
    if any(group.reference_logp_sums is not None for group in groups):
        raise ValueError("log-probabilities of a reference are not kept in files")
    contents = [content_of(group) for group in groups]
    offsets = np.zeros(len(groups) + 1, dtype=np.int32)
    np.cumsum([len(content) for content in contents], out=offsets[1:])
    flat = np.concatenate(contents) if contents else np.zeros(0, dtype=np.int32)
    found = measure(groups)
    lines = [_NO_LINE if group.where.line is None else group.where.line for group in groups]
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            pa.array([group.where.file for group in groups], pa.string()),
            pa.array([group.where.row for group in groups], pa.int64()),
            pa.array(lines, pa.int64()),
            pa.array([" ".join(group.notes) for group in groups], pa.string()),
            pa.array([json.dumps(group.columns) if group.columns else "" for group in groups], pa.string()),
            *(pa.array(getattr(found, item.name)) for item in fields(found)),
        ],
        schema=SCHEMA,
    )


def group_at(batch: pa.RecordBatch, at: int) -> TokenGroup:
    """A row of a batch as a group that holds nothing of the file."""
    content = batch.column(0)[at].values.to_numpy().copy()
    file, number, line, notes, columns = (batch.column(index)[at].as_py() for index in range(1, 6))
    num_arrays = int(content[0])
    ends = np.cumsum(content[1 : 1 + num_arrays])
    head, flat = content[1 + num_arrays : len(content) - int(ends[-1])].tolist(), content[len(content) - int(ends[-1]) :]
    prompt, *responses = np.split(flat, ends[:-1])
    num_ends, pairs = len(responses), head[len(responses) :]
    return TokenGroup(
        prompt_ids=prompt,
        response_ids=tuple(responses),
        pairs=tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        is_ended=tuple(map(bool, head[:num_ends])),
        where=Where(file, number, None if line == _NO_LINE else line),
        notes=tuple(notes.split()),
        columns=json.loads(columns) if columns else {},
    )


class GroupsWriter:
    """Writes batches into a file, in order, and takes their fingerprint.

    Args:
        path: a new file.
    """

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self._digest = hashlib.sha256()
        self._waiting: list[pa.RecordBatch] = []
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)

    def add(self, batch: pa.RecordBatch) -> None:
        """The next rows; they are written a few thousand together."""
        if not batch.num_rows:
            return
        self._digest.update(_flat(batch).data)
        self._waiting.append(batch)
        self.num_rows += batch.num_rows
        if sum(one.num_rows for one in self._waiting) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            # One batch of the small ones that wait: opening a file costs by the batch.
            self._writer.write_batch(pa.Table.from_batches(self._waiting, SCHEMA).combine_chunks().to_batches()[0])
            self._waiting = []

    def close(self) -> None:
        """Write what waits."""
        self._flush()
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    @property
    def fingerprint(self) -> str:
        """Of the rows so far, as `orpo.data.dataset.fingerprint`."""
        return self._digest.hexdigest()


def _flat(batch: pa.RecordBatch) -> np.ndarray:
    return batch.column(0).flatten().to_numpy()


class StoredGroups(Sequence[TokenGroup]):
    """The rows of a file, or some of them, read when they are asked for.

    What was read of the file stays in the system's cache, which all processes share, and not in this process: its pages are given back
    every few thousand rows.

    Args:
        path: a file of `GroupsWriter`.
        rows: which of its rows, ascending; None: all.
        whole_fingerprint: of all rows of the file, where it is known.

    Raises:
        ValueError: `rows` are in another order.
    """

    def __init__(self, path: str | Path, rows: np.ndarray | None = None, *, whole_fingerprint: str | None = None) -> None:
        if rows is not None and np.any(np.diff(rows) <= 0):
            raise ValueError("rows of a file are taken in its order")
        self.path = Path(path)
        self._fingerprint = whole_fingerprint if rows is None else None
        with self.path.open("rb") as file:
            # Mapped by Python and not by pyarrow, whose map cannot give its pages back (`release`).
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(self._map))) as reader:
            self._batches = list(reader)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._rows = rows
        self._num_reads = 0

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...

    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = int(index) % len(self) if self._rows is None else int(self._rows[index])
        found = group_at(*self._place(row))
        self._num_reads += 1
        if self._num_reads % _READS_BETWEEN_RELEASES == 0:
            self.release()
        return found

    def __iter__(self) -> Iterator[TokenGroup]:
        return (self[number] for number in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A map cannot be sent to another process, which opens the file for itself.
        return _reopened, (self.path, self._rows, self._fingerprint)

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[number], row - int(self._starts[number])

    def take(self, rows: np.ndarray) -> StoredGroups:
        """Some of the rows, by their place in this set."""
        return StoredGroups(self.path, np.asarray(rows, dtype=np.int64) if self._rows is None else self._rows[rows])

    def release(self) -> None:
        """Give back the pages of the file that this process has looked at."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def measures(self) -> Measures:
        """Of all rows; read from the file, not computed."""
        columns = [self._column(item.name) for item in fields(Measures)]
        self.release()
        return Measures(*columns)

    def _column(self, name: str) -> np.ndarray:
        parts = [batch.column(name).to_numpy() for batch in self._batches]
        whole = np.concatenate([np.zeros(0, SCHEMA.field(name).type.to_pandas_dtype()), *parts])
        return whole if self._rows is None else whole[self._rows]

    def places(self) -> Iterator[Where]:
        """Where the rows came from."""
        for row in range(len(self)) if self._rows is None else self._rows:
            batch, at = self._place(int(row))
            file, number, line = (batch.column(index)[at].as_py() for index in (1, 2, 3))
            yield Where(file, number, None if line == _NO_LINE else line)
        self.release()

    def fingerprint(self) -> str:
        """As `orpo.data.dataset.fingerprint`; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for content in self._contents():
                digest.update(content.data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _contents(self) -> Iterator[np.ndarray]:
        """What the rows hold, in order, batch by batch of the file."""
        for number, batch in enumerate(self._batches):
            flat, offsets = _flat(batch), batch.column(0).offsets.to_numpy()
            if self._rows is None:
                yield flat
            else:
                start = int(self._starts[number])
                inside = self._rows[np.searchsorted(self._rows, start) : np.searchsorted(self._rows, self._starts[number + 1])] - start
                # A batch's offsets need not begin at 0; its flattened values do.
                yield from (flat[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]] for row in inside)
            self.release()


def _reopened(path: Path, rows: np.ndarray | None, fingerprint: str | None) -> StoredGroups:
    found = StoredGroups(path, rows)
    found._fingerprint = fingerprint
    return found
