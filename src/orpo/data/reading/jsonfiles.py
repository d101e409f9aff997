"""Rows of JSON files, one at a time, whatever the size of the file or of a row.

Three layouts exist in practice and their file endings do not tell them apart: one object per line, one array, one object that wraps the
rows. Lines are split on "\\n" alone, since JSON strings may hold U+2028, U+2029 and U+0085 as they are, which `str.splitlines` and
text-mode readers of other tools take for line ends.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from orpo.data.reading.splits import SPLIT_NAMES, pick_split, require_only_split, split_of_name
from orpo.data.types import Dropped, Where
from orpo.errors import DataError

RawRow = tuple[Where, Any]
"""Where a row is, and its value: any JSON value, or a `Dropped` where it could not be taken in."""

Opener = Callable[[], BinaryIO]

BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 1 << 29
_SPACE = re.compile(r"[ \t\r\n]*")
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE_STRING = re.compile(r'["\[\]{},]')
_WRAPPERS = ("data", "rows", "examples", "instances", "items", "train")
_SPLIT_WORDS = frozenset(word for words in SPLIT_NAMES.values() for word in words)
_LONGEST_ATOM = 16
"""Characters within which a cut literal, number sign or escape may end; a decoding error further from the end is a real one."""
_NUMBER_TAIL = 2
"""Characters after which a number may still go on: of "1e+5" cut before the 5, "1" is a number too."""


def too_large(where: Where, max_row_bytes: int) -> Dropped:
    return Dropped("row_too_large", where, f"more than {max_row_bytes / 2**20:g} MiB")


def invalid_utf8(name: str, error: UnicodeDecodeError, line: int = 1, column: int = 1) -> DataError:
    """The error for bytes that are not UTF-8, at file, line and column; `line` and `column` are where the decoded bytes begin."""
    good = error.object[: error.start].decode("utf-8")
    if num_newlines := good.count("\n"):
        line, column = line + num_newlines, len(good) - good.rfind("\n")
    else:
        column += len(good)
    return DataError(
        f"byte 0x{error.object[error.start]:02x} is not valid UTF-8",
        where=f"{name}:{line}:{column}",
        expected="text in UTF-8",
        mend="save the file as UTF-8 (for instance: iconv -f LATIN1 -t UTF-8 FILE), or remove the damaged line",
    )


def check_encoding(name: str, head: bytes) -> None:
    """Refuses UTF-16 and UTF-32 by their byte-order marks, and binary files by their zero bytes."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in head[:4]:
        raise DataError(
            "the file is not UTF-8 text (it looks like UTF-16, UTF-32 or a binary file)",
            where=f"{name}:1",
            expected="text in UTF-8",
            mend="save the file as UTF-8, or give it the ending of its real format (.gz, .parquet, .arrow)",
        )


def empty_file(name: str) -> DataError:
    return DataError("the file is empty", where=name, expected="at least one row", mend="check the path, or how the file was written")


def _broken(name: str, line: int, column: int, message: str) -> DataError:
    return DataError(
        f"broken JSON: {message}",
        where=f"{name}:{line}:{column}",
        expected="one JSON object per row",
        mend="repair or remove this row; a file cut off in the middle has to be written again",
    )


def _load(text: str, where: Where) -> Any:
    """The value of a complete JSON text; a `Dropped` for valid JSON that Python will not hold. Raises JSONDecodeError."""
    try:
        return json.loads(text)
    except RecursionError:
        return Dropped("wrong_type", where, "nested too deeply")
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits, which Python refuses to convert (sys.set_int_max_str_digits)
        return Dropped("wrong_type", where, str(error).split(";")[0])


def read_json_lines(open_file: Opener, name: str, max_row_bytes: int) -> Iterator[RawRow]:
    """One JSON value per line; blank lines are passed over, a row above `max_row_bytes` is not held in memory.

    Raises:
        DataError: a line that is not JSON or not UTF-8 (file:line:column).
    """
    row = 0
    with open_file() as stream:
        for line_number, raw in _lines(stream, name, max_row_bytes):
            where = Where(name, row, line_number)
            if raw is None:
                yield where, too_large(where, max_row_bytes)
                row += 1
                continue
            try:
                text = raw.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise invalid_utf8(name, error, line_number) from None
            if not text.strip():
                continue
            try:
                value = _load(text, where)
            except json.JSONDecodeError as error:
                raise _broken(name, line_number, error.pos + 1, error.msg) from None
            yield where, value
            row += 1


def _lines(stream: BinaryIO, name: str, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(1-based number, bytes) of each line; None in place of the bytes of a line that is too long."""
    number = 0
    while raw := stream.readline(max_bytes + 2):  # two more for the line's end, which counts for nothing
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM)
            check_encoding(name, raw[:64])
        if len(raw) > max_bytes and not raw.endswith(b"\n"):
            while (rest := stream.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, raw


class _Window:
    """A sliding piece of the decoded file: `text` from `position` on is unread; knows the line and column of `position`."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self.text, self.position, self.is_complete = "", 0, False
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # keeps the first half of a character that a chunk cuts in two
        self._mark, self._line, self._column = 0, 1, 1
        self._is_first = True

    def fill(self) -> None:
        """Drops what was read and takes in at least as much again as is unread, so that long rows cost linear time."""
        self._advance_mark()
        self.text, self.position, self._mark = self.text[self.position :], 0, 0
        chunk = self._stream.read(max(_CHUNK_BYTES, len(self.text)))
        if self._is_first:
            chunk, self._is_first = chunk.removeprefix(BOM), False
            check_encoding(self.name, chunk[:64])
        try:
            decoded = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise invalid_utf8(self.name, error, *self.place_of(len(self.text))) from None
        self.text += decoded
        self.is_complete = not chunk

    def _advance_mark(self) -> None:
        self._line, self._column = self.place_of(self.position)
        self._mark = self.position

    def place_of(self, position: int) -> tuple[int, int]:
        """1-based line and column of a position of `text` that is not before `self.position`'s last known place."""
        num_newlines = self.text.count("\n", self._mark, position)
        if num_newlines:
            return self._line + num_newlines, position - self.text.rfind("\n", self._mark, position)
        return self._line, self._column + position - self._mark

    def line(self) -> int:
        self._advance_mark()
        return self._line

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self.text):
                return self.text[self.position]
            if self.is_complete:
                return ""
            self.fill()

    def error(self, message: str, position: int | None = None) -> DataError:
        return _broken(self.name, *self.place_of(self.position if position is None else position), message)


def read_json_array(open_file: Opener, name: str, max_row_bytes: int) -> Iterator[RawRow]:
    """The elements of one JSON array, each decoded when it is asked for.

    Raises:
        DataError: broken JSON or invalid UTF-8 (file:line:column).
    """
    with open_file() as stream:
        window = _Window(stream, name)
        if window.peek() != "[":
            raise window.error("expected '['")
        window.position += 1
        row = 0
        if window.peek() == "]":
            window.position += 1
        else:
            while True:
                window.peek()
                where = Where(name, row, window.line())
                yield where, _element(window, where, max_row_bytes)
                row += 1
                mark = window.peek()
                if mark not in {",", "]"}:
                    raise window.error("expected ',' or ']' after this row" if mark else "the file ends inside the array")
                window.position += 1
                if mark == "]":
                    break
        if window.peek():
            raise window.error("text after the end of the array")


def _element(window: _Window, where: Where, max_row_bytes: int) -> Any:
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.position)
            # "12" at the end of what was read may be the beginning of "123", which is valid JSON too.
            is_whole = end + _NUMBER_TAIL < len(window.text) or window.is_complete
        except json.JSONDecodeError as error:
            is_whole = False
            cut = error.pos >= len(window.text) - _LONGEST_ATOM or error.msg.startswith("Unterminated string")
            if window.is_complete or not cut:
                raise window.error(error.msg if window.position < len(window.text) else "the file ends here", error.pos) from None
        except RecursionError:
            _skip_element(window)
            return Dropped("wrong_type", where, "nested too deeply")
        except ValueError as error:
            _skip_element(window)
            return Dropped("wrong_type", where, str(error).split(";")[0])
        if is_whole and end - window.position <= max_row_bytes:
            window.position = end
            return value
        if len(window.text) - window.position > max_row_bytes:
            _skip_element(window)
            return too_large(where, max_row_bytes)
        window.fill()


def _skip_element(window: _Window) -> None:
    """Moves past one element without holding more of it than a chunk."""
    depth, in_string = 0, False
    while True:
        found = (_IN_STRING if in_string else _OUTSIDE_STRING).search(window.text, window.position)
        if found is None or (found[0] == "\\" and found.end() == len(window.text)):
            if window.is_complete:
                raise window.error("the file ends inside this row")
            window.position = len(window.text) if found is None else found.start()
            window.fill()
            continue
        mark = found[0]
        if mark == '"':
            in_string = not in_string
        elif mark == "\\":
            window.position = found.end() + 1
            continue
        elif mark in "[{":
            depth += 1
        elif depth == 0:
            window.position = found.start()
            return
        elif mark in "]}":
            depth -= 1
        window.position = found.end()


def _read_document(open_file: Opener, name: str) -> Any:
    with open_file() as stream:
        raw = stream.read(_MAX_DOCUMENT_BYTES + 1).removeprefix(BOM)
    if len(raw) > _MAX_DOCUMENT_BYTES:
        raise DataError(
            f"one JSON object of more than {_MAX_DOCUMENT_BYTES >> 20} MiB",
            where=name,
            expected="JSON lines or one JSON array, which are read row by row",
            mend="write one row per line (.jsonl)",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(name, error) from None
    try:
        return _load(text, Where(name, 0, 1))
    except json.JSONDecodeError as error:
        raise _broken(name, error.lineno, error.colno, error.msg) from None


def rows_of_document(value: Any, split: str | None, name: str) -> tuple[str | None, list[Any]]:
    """(split taken, rows) of one JSON value: a list of rows, named splits, a wrapper around a list, columns, or one row.

    Raises:
        DataError: it has no such split, or several and none is asked for.
    """
    if not isinstance(value, dict) or not value:
        require_only_split(split, name, split_of_name(name))
        return None, value if isinstance(value, list) else [value]
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    of_rows = [key for key, item in lists.items() if item and all(isinstance(row, dict) and not _is_message(row) for row in item)]
    if split is not None and (split in of_rows or lists.get(split) == []):
        return split, value[split]
    if len(of_rows) == 1 and (len(value) == 1 or of_rows[0] in _WRAPPERS):
        if of_rows[0] in _SPLIT_WORDS:
            return of_rows[0], value[pick_split(of_rows, split, name)]
        require_only_split(split, name, split_of_name(name))
        return of_rows[0], value[of_rows[0]]
    if len(of_rows) == len(value) > 1:
        if "train" in value and split is None:
            return "train", value["train"]
        raise DataError(
            f"the file holds several lists of rows: {', '.join(map(repr, of_rows))}",
            where=name,
            expected="one of them named as the split" if split is None else f"a list named {split!r}",
            mend=f"choose one with the split option, for instance {of_rows[0]!r}",
        )
    require_only_split(split, name, split_of_name(name))
    columns = list(value.values())
    if len(lists) == len(value) and len({len(item) for item in columns}) == 1 and not any(_is_message(x) for item in columns for x in item):
        return None, [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return None, [value]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys()) and bool({"content", "value"} & value.keys())


def read_json(open_file: Opener, name: str, max_row_bytes: int, split: str | None = None) -> Iterator[RawRow]:
    """The rows of a JSON file, whichever of the three layouts it has.

    Raises:
        DataError: empty file, broken JSON or invalid UTF-8 (file:line:column), or several lists and no split that names one.
    """
    layout = _layout(open_file, name, max_row_bytes)
    if layout != "document":
        require_only_split(split, name, split_of_name(name))
    if layout == "lines":
        yield from read_json_lines(open_file, name, max_row_bytes)
    elif layout == "array":
        yield from read_json_array(open_file, name, max_row_bytes)
    else:
        _, rows = rows_of_document(_read_document(open_file, name), split, name)
        for row, value in enumerate(rows):
            yield Where(name, row), value


def _layout(open_file: Opener, name: str, max_row_bytes: int) -> str:
    with open_file() as stream:
        line, lead = b"", b""
        is_first = True
        while not lead:
            line = stream.readline(max_row_bytes + 2)
            if not line:
                raise empty_file(name)
            if is_first:
                line, is_first = line.removeprefix(BOM), False
                check_encoding(name, line[:64])
            lead = line.strip()[:1]
        has_more = any(piece.strip() for piece in iter(lambda: stream.read(_CHUNK_BYTES), b""))
    try:
        json.loads(line)
        is_whole = True
    except (ValueError, RecursionError):
        is_whole = False
    is_line_file = name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    if lead == b"[":
        return "lines" if is_whole and has_more else "array"
    if lead != b"{" or is_line_file:
        return "lines"
    return "lines" if is_whole and has_more else "document"
