"""Rows of table files: csv and tsv, parquet, arrow."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from orpo.data.reading.cells import Read, cell_readers, read_cells
from orpo.data.reading.jsonfiles import BOM, Opener, RawRow, check_encoding, empty_file, invalid_utf8, too_large
from orpo.data.types import Dropped, Where
from orpo.errors import DataError

_CHUNK_BYTES = 1 << 20
_BATCH_BYTES = 64 << 20
_MAX_BATCH_ROWS = 1024


class _Lines:
    """Feeds the csv module decoded lines; of a record that has grown too large only the quotes and delimiters still pass.

    They are all that the csv module needs to find the record's end, so that a field of any size is skipped without being held.
    """

    def __init__(self, stream: BinaryIO, name: str, max_row_bytes: int) -> None:
        self.number = 0
        self.is_too_large = False
        self.record: list[str] = []
        """The lines of the record at hand, to find the column of what is wrong with it; none of one that is too large."""
        self.delimiter = ","
        self._stream, self._name, self._limit = stream, name, max_row_bytes
        self._num_bytes = 0

    def start_record(self) -> None:
        self._num_bytes, self.is_too_large = 0, False
        self.record.clear()

    def __iter__(self) -> Iterator[str]:
        while True:
            pieces: list[bytes] = []
            while piece := self._stream.readline(_CHUNK_BYTES):
                pieces.append(self._reduced(piece))
                if piece.endswith(b"\n"):
                    break
            if not pieces:
                return
            self.number += 1
            line = b"".join(pieces)
            if self.number == 1:
                line = line.removeprefix(BOM)
                check_encoding(self._name, line[:64])
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise invalid_utf8(self._name, error, self.number) from None

            if not self.is_too_large:
                self.record.append(text)
            yield text

    def _reduced(self, piece: bytes) -> bytes:
        self._num_bytes += len(piece)
        if self._num_bytes <= self._limit:
            return piece
        self.is_too_large = True
        self.record.clear()
        kept = re.sub(rb'[^"\n' + re.escape(self.delimiter.encode()) + rb"]+", b"", piece)
        return kept.replace(b'""', b"")  # a doubled quote opens and closes nothing


def broken_quote(lines: Sequence[str], delimiter: str) -> tuple[int, int]:
    """Where a record that the csv module refuses goes wrong: what follows a closing quote, else the quote that was never closed.

    Returns:
        (0-based line of the record, 1-based column).
    """
    opened, is_open, is_start = (0, 1), False, True
    for number, line in enumerate(lines):
        place = 0
        while place < len(line):
            mark = line[place]
            if is_open and mark == '"' and line[place + 1 : place + 2] == '"':
                place += 1
            elif is_open and mark == '"':
                is_open = False
                if line[place + 1 : place + 2] not in {delimiter, "\r", "\n", ""}:
                    return number, place + 2
            elif not is_open and mark == '"' and is_start:
                opened, is_open = (number, place + 1), True
            is_start = not is_open and mark == delimiter
            place += 1
    return opened


def _delimiter_of(header: str) -> str:
    return max(",;\t", key=header.count) if any(mark in header for mark in ",;\t") else ","


def read_csv(open_file: Opener, name: str, max_row_bytes: int) -> Iterator[RawRow]:
    """The records of a csv file with a header; the delimiter is the one of comma, semicolon and tab that the header holds most.

    An empty cell is an empty string; a record with too few cells lacks the last columns, one with too many is dropped.

    Raises:
        DataError: no or a doubled header, an open quote or text after a closing one, invalid UTF-8 (file:line:column).
    """
    # The module's own limit is one setting for the whole process; ours is enforced by _Lines.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * max_row_bytes + _CHUNK_BYTES))
    with open_file() as stream:
        source = _Lines(stream, name, max_row_bytes)
        lines = iter(source)
        header_line = next((line for line in lines if line.strip()), None)
        if header_line is None:
            raise empty_file(name)
        source.delimiter = _delimiter_of(header_line)
        header = next(csv.reader([header_line], delimiter=source.delimiter))
        header = [column.strip() for column in header]
        doubled = sorted({column for column in header if header.count(column) > 1})
        if doubled:
            raise DataError(
                f"the header names {', '.join(map(repr, doubled))} more than once",
                where=f"{name}:{source.number}",
                expected="one name per column",
                mend="rename the columns",
            )
        reader = csv.reader(lines, delimiter=source.delimiter, strict=True)
        row = 0
        while True:
            source.start_record()
            first_line = source.number + 1
            where = Where(name, row, first_line)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                line, column = broken_quote(source.record, source.delimiter)
                raise DataError(
                    f"broken CSV: {error}",
                    where=f"{name}:{first_line + line}:{column}",
                    expected='quotes doubled inside a quoted field: ""',
                    mend="quote every field that holds a comma, a quote or a line end",
                ) from None
            if cells:
                yield where, _record(header, cells, where, source, max_row_bytes)
                row += 1


def _record(header: list[str], cells: list[str], where: Where, source: _Lines, max_row_bytes: int) -> dict[str, str] | Dropped:
    if source.is_too_large:
        return too_large(where, max_row_bytes)
    if len(cells) > len(header):
        return Dropped("wrong_type", where, f"{len(cells)} cells, the header has {len(header)}")
    return dict(zip(header, cells, strict=False))


def _batch_rows(num_bytes: int, num_rows: int) -> int:
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * max(num_rows, 1) // max(num_bytes, 1)))


def _rows_of_batch(batch: Any, name: str, first_row: int, max_row_bytes: int, readers: Mapping[str, Read]) -> Iterator[RawRow]:
    for offset in range(batch.num_rows):
        where = Where(name, first_row + offset)
        one = batch.slice(offset, 1)
        # get_total_buffer_size counts the whole parent; nbytes counts what the slice covers.
        if batch.nbytes > max_row_bytes and one.nbytes > max_row_bytes:
            yield where, too_large(where, max_row_bytes)
            continue
        yield where, read_cells(one.to_pylist()[0], readers)


def read_batches(batches: Iterator[Any], name: str, max_row_bytes: int) -> Iterator[RawRow]:
    """The rows of pyarrow record batches."""
    row = 0
    for batch in batches:
        readers = cell_readers(batch.schema)
        for start in range(0, batch.num_rows, _MAX_BATCH_ROWS):
            piece = batch.slice(start, _MAX_BATCH_ROWS)
            if piece.nbytes <= max_row_bytes:
                yield from ((Where(name, row + offset), read_cells(value, readers)) for offset, value in enumerate(piece.to_pylist()))
            else:
                yield from _rows_of_batch(piece, name, row, max_row_bytes, readers)
            row += piece.num_rows


def _damaged(name: str, kind: str, error: Exception) -> DataError:
    return DataError(
        f"not a readable {kind} file: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where=name,
        expected=f"a whole {kind} file",
        mend="check that the file was written and copied to its end, and that its ending names its real format",
    )


def read_parquet(path: Path, name: str, max_row_bytes: int) -> Iterator[RawRow]:
    """The rows of a parquet file, a bounded batch at a time.

    Raises:
        DataError: the file is damaged or not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            batches = file.iter_batches(batch_size=_batch_rows(num_bytes, metadata.num_rows))
            yield from read_batches(batches, name, max_row_bytes)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, "parquet", error) from None


def read_arrow(path: Path, name: str, max_row_bytes: int) -> Iterator[RawRow]:
    """The rows of an arrow file, of either kind: the file format (feather) and the stream format (datasets' caches).

    Raises:
        DataError: the file is damaged or not arrow.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
                batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from read_batches(batches, name, max_row_bytes)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, "arrow", error) from None
