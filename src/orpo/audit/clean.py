"""Writing the cleaned data set: the rows as they were, without those that hurt, and a log of what left and why."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orpo.audit.auditor import AuditOptions
from orpo.audit.findings import KINDS
from orpo.audit.result import Audit
from orpo.data.formats import Stream
from orpo.data.reading.sources import as_sources
from orpo.data.rows.messages import type_name
from orpo.data.types import Dropped, Where
from orpo.errors import DataError, UserError


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was written.

    Attributes:
        num_written: rows in the new file; num_left: rows of the audit that are not (rated rows of one prompt are one row of the audit).
        left: finding code -> rows that left for it; a row with several is counted under each.
    """

    path: Path
    log_path: Path
    num_written: int
    num_left: int
    left: Counter[str]

    def sentence(self) -> str:
        """The result in words."""
        reasons = ", ".join(f"{number} {code}" for code, number in self.left.most_common())
        return f"{self.num_written} rows in {self.path}; {self.num_left} left ({reasons or 'none'}), listed in {self.log_path}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        counts = {"num_written": self.num_written, "num_left": self.num_left, "left": dict(self.left)}
        return {"path": str(self.path), "log_path": str(self.log_path), **counts}


def write_clean(audit: Audit, source: Any, options: AuditOptions, path: str | Path, *, keep: Collection[str] = ()) -> Cleaned:
    """Write the rows that are fit to train on as JSON lines, unchanged, and beside them `<path>.log.jsonl`.

    Args:
        audit: of this very source, with these options.
        path: a new file ending in .jsonl.
        keep: finding codes whose rows stay (rows that cannot be read as preferences leave in any case).

    Raises:
        UserError: the path is taken or does not end in .jsonl, an unknown code in `keep`, or the source changed since the audit.

    Example: `found` and `options` are those of `run_audit`.

        >>> from orpo.audit import write_clean
        >>> write_clean(found, "pairs.jsonl", options, "clean.jsonl").num_written
        0
    """
    path = Path(path)
    log_path = path.with_name(path.name + ".log.jsonl")
    _check(path, log_path, keep)
    kept_codes = frozenset(keep)
    left: Counter[str] = Counter()
    num_written = num_left = 0
    partial, partial_log = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.log.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as out, partial_log.open("w", encoding="utf-8", newline="\n") as log:
            for index, where, rows in _numbered(source, options):
                _check_same(audit, index, where)
                codes = [code for code in audit.leaving.get(index, []) if code not in kept_codes]
                if codes:
                    left.update(codes)
                    num_left += 1
                    _write_line(
                        log,
                        {
                            "file": where.file,
                            "line": where.line,
                            "row": where.row,
                            "codes": codes,
                            "why": [KINDS[code].title for code in codes],
                            "detail": audit.table.details.get(index, ""),
                        },
                    )
                else:
                    num_written += _write_rows(out, rows)
            for file in (out, log):
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        partial_log.replace(log_path)
    finally:
        partial.unlink(missing_ok=True)
        partial_log.unlink(missing_ok=True)
    return Cleaned(path, log_path, num_written, num_left, left)


def _check(path: Path, log_path: Path, keep: Collection[str]) -> None:
    if path.suffix != ".jsonl":
        raise UserError(f"the cleaned set is written as JSON lines, not {path.suffix!r}", where=str(path), mend="give it the ending .jsonl")
    for taken in (path, log_path):
        if taken.exists():
            raise UserError("the file exists", where=str(taken), expected="a new file", mend="choose another name, or remove it")
    unknown = sorted(code for code in keep if code not in KINDS or not KINDS[code].leaves)
    if unknown:
        raise UserError(
            f"no finding {unknown[0]!r} makes rows leave",
            where="--keep",
            expected=", ".join(code for code, kind in KINDS.items() if kind.leaves),
        )


def _numbered(source: Any, options: AuditOptions) -> Iterator[tuple[int, Where, list[Any]]]:
    """(number, place, rows of the source) of each row of the audit, in its order."""
    index = 0
    for item in as_sources(source, split=options.split, column_map=options.column_map):
        stream = Stream(item, **options.reading)
        for where, _, originals in stream.with_originals():
            if options.max_rows is not None and index >= options.max_rows:
                return
            yield index, where, originals
            index += 1


def _check_same(audit: Audit, index: int, where: Where) -> None:
    if index >= audit.num_rows or audit.table.place(index) != str(where):
        raise DataError("the data changed since the audit", where=str(where), expected="the same rows", mend="run the audit again")


def _write_rows(file: IO[str], rows: list[Any]) -> int:
    for row in rows:
        if isinstance(row, Dropped) or not isinstance(row, Mapping):
            raise AssertionError(f"an unreadable row ({type_name(row)}) was kept")
        _write_line(file, row)
    return len(rows)


def _write_line(file: IO[str], value: Any) -> None:
    # U+2028 and its like are escaped, so that no reader takes them for line ends; lone surrogates cannot be written in UTF-8.
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    for character in ("\u2028", "\u2029", "\u0085"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    file.write(text + "\n")


def _plain(value: Any) -> Any:
    """Values of parquet and arrow columns that JSON has no form for."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (bytes, bytearray)):
        return value.decode("latin-1")
    raise TypeError(f"{type(value).__name__} has no JSON form")
