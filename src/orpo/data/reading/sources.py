"""Where rows come from: files, folders, globs, hub ids, data sets and lists, each read as (where, row) one at a time."""

from __future__ import annotations

import difflib
import glob
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from orpo.data.reading import jsonfiles, tables
from orpo.data.reading.cells import cell_readers, read_cells
from orpo.data.reading.jsonfiles import RawRow
from orpo.data.reading.splits import did_you_mean, pick_split, read_split, require_only_split, split_of_file, split_of_name
from orpo.data.types import Where
from orpo.errors import DataError

DEMO_DATA = "orpo-demo"
"""The name under which the packaged preference pairs go wherever a data set is named."""

MAX_ROW_BYTES = 16 << 20
"""A row above this is dropped as `row_too_large`, without being held in memory."""

_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class AbsentDataError(DataError):
    """The data is not at hand: no such path, or the hub does not answer."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place that rows come from.

    Args:
        path: file, folder, glob, hub id, `datasets` object, or a list of rows.
        split: which split to take, or which part of it (`train[:100]`, `test[10%:50%]`); None takes the only one, or `train`.
        weight: share of this source in a mix (see `orpo.data.formats.stream_preferences`); None: all of it.
        column_map: our column names to this source's.
        name: the hub data set's configuration.
        revision: the hub data set's commit, tag or branch.
    """

    path: Any
    split: str | None = None
    weight: float | None = None
    column_map: Mapping[str, str] | None = None
    name: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and (isinstance(self.weight, bool) or not self.weight > 0 or self.weight == float("inf")):
            raise DataError(
                f"weight {self.weight!r}", where=self.label, expected="a positive number", mend="leave the source out to skip it"
            )

    @property
    def label(self) -> str:
        """What to call the source in messages."""
        return str(self.path) if isinstance(self.path, (str, Path)) else "the data set"


def as_sources(spec: Any, *, split: str | None = None, column_map: Mapping[str, str] | None = None) -> list[Source]:
    """One `Source` per place: of a path, an object, a list of paths, or a list of mappings with `path` and the other fields.

    Raises:
        DataError: a mapping with unknown keys, or an empty list.
    """
    if isinstance(spec, Source):
        return [spec]
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise DataError("the list is empty", where="the data set", expected="at least one row or one source", mend="give some data")
        is_sources = all(isinstance(item, (str, Path, Source)) or (isinstance(item, dict) and "path" in item) for item in spec)
        if is_sources:
            return [_one_source(item, split, column_map) for item in spec]
    return [Source(spec, split=split, column_map=column_map)]


def _one_source(item: Any, split: str | None, column_map: Mapping[str, str] | None) -> Source:
    if isinstance(item, Source):
        return item
    if not isinstance(item, dict):
        return Source(item, split=split, column_map=column_map)
    known = Source.__dataclass_fields__
    unknown = sorted(str(key) for key in item if key not in known)
    if unknown:
        raise DataError(
            f"unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}",
            where=f"source {item['path']}",
            expected=f"keys among {', '.join(known)}",
            mend="correct the key",
        )
    return Source(**{"split": split, "column_map": column_map, **item})


def read_source(
    spec: Any,
    split: str | None = None,
    *,
    streaming: bool = False,
    max_row_bytes: int = MAX_ROW_BYTES,
    name: str | None = None,
    revision: str | None = None,
) -> Iterator[RawRow]:
    """The rows of one place, one at a time.

    Files and folders are always read piece by piece; `streaming` matters for hub ids alone (read over the network as needed, without a
    copy on disk).

    Args:
        spec: a file (json, jsonl, csv, tsv, parquet, arrow, or any of these with .gz), folder, glob, hub id, `orpo-demo`, `Source`, a
            `datasets` object, a table, or any iterable of rows.
        split: which split of a folder, data-set dictionary or hub id; None takes the only one, or `train`. A slice takes a part of its
            rows: `train[:100]`, `train[10%:50%]`, `[-10:]`.
        max_row_bytes: rows above this are given as `Dropped("row_too_large", …)`.

    Yields:
        (where, value): the value is whatever stands there, for the caller to judge, or a `Dropped`.

    Raises:
        DataError: nothing there, unknown format, no such split, broken JSON or CSV, invalid UTF-8, a damaged file.
    """
    if isinstance(spec, Source):
        name, revision, split, spec = spec.name, spec.revision, spec.split or split, spec.path
    taken, part = read_split(split, str(spec) if isinstance(spec, (str, Path)) else "the data set")
    if part is None:
        return _open_place(spec, taken, streaming, max_row_bytes, name, revision)
    if isinstance(spec, Iterator):  # to be read twice
        spec = list(spec)
    return part.take(lambda: _open_place(spec, taken, streaming, max_row_bytes, name, revision))


def _open_place(
    spec: Any, split: str | None, streaming: bool, max_row_bytes: int, name: str | None, revision: str | None
) -> Iterator[RawRow]:
    if not isinstance(spec, (str, Path)):
        return _read_object(spec, split, max_row_bytes)
    path = Path(spec).expanduser()
    if str(spec) == DEMO_DATA and not path.exists():
        return _read_folder(Path(__file__).parents[1] / "demo", split, max_row_bytes, label=DEMO_DATA)
    if path.is_file():
        return _read_file(path, split, max_row_bytes)
    if path.is_dir():
        return _read_folder(path, split, max_row_bytes)
    text = str(spec)
    if glob.has_magic(text):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file() and _format_of(Path(found)))
        if not files:
            raise DataError("no file matches", where=text, expected=f"files ending in {', '.join(_FORMATS)}", mend="check the pattern")
        return _read_matches(files, split, max_row_bytes, text)
    if _format_of(path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise _not_found(path)
    return _read_hub(text, split, streaming=streaming, name=name, revision=revision, max_row_bytes=max_row_bytes)


def _format_of(path: Path) -> str:
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return ending if ending in _FORMATS else ""


def _not_found(path: Path) -> AbsentDataError:
    folder = path.parent
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1) if folder.is_dir() else []
    hint = f"did you mean {folder / near[0]}?" if near else "check the path; a relative one starts at the current folder"
    return AbsentDataError("no such file or folder", where=str(path), expected="a file, a folder or a data set's hub id", mend=hint)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_file(path: Path, split: str | None, max_row_bytes: int) -> Iterator[RawRow]:
    kind, name = _format_of(path), str(path)
    if not kind:
        raise DataError(
            f"unknown ending {path.suffix!r}",
            where=name,
            expected=f"one of {', '.join(_FORMATS)}, the text formats also with .gz",
            mend="rename the file to its real format, or convert it",
        )
    if kind != ".json":  # which may hold splits by name
        require_only_split(split, name, split_of_name(name))
    if kind in {".parquet", ".pq"}:
        return tables.read_parquet(path, name, max_row_bytes)
    if kind in {".arrow", ".feather"}:
        return tables.read_arrow(path, name, max_row_bytes)
    return _read_text(path, kind, split, max_row_bytes)


def _read_text(path: Path, kind: str, split: str | None, max_row_bytes: int) -> Iterator[RawRow]:
    name = str(path)

    def open_file() -> BinaryIO:
        return _open(path)

    try:
        if kind in {".csv", ".tsv"}:
            yield from tables.read_csv(open_file, name, max_row_bytes)
        else:
            yield from jsonfiles.read_json(open_file, name, max_row_bytes, split)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"damaged gzip file: {error}", where=name, expected="a whole gzip file", mend="copy or write the file again"
        ) from None
    except PermissionError:
        raise DataError("the file may not be read", where=name, mend="change its permissions") from None


def _read_files(files: list[Path], split: str | None, max_row_bytes: int) -> Iterator[RawRow]:
    for path in files:
        yield from _read_file(path, split, max_row_bytes)


def _read_matches(files: list[Path], split: str | None, max_row_bytes: int, pattern: str) -> Iterator[RawRow]:
    """The files that a pattern matches: all of them, or those that announce the split asked for."""
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(split_of_file(path, path.parent) or "", []).append(path)
    names = [name for name in found if name]
    if split is None or not names or (split == "train" and "train" not in names):
        return _read_files(files, split, max_row_bytes)
    return _read_files(found[pick_split(names, split, pattern)], None, max_row_bytes)


def _read_folder(folder: Path, split: str | None, max_row_bytes: int, label: str | None = None) -> Iterator[RawRow]:
    label = label or str(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise DataError(f"not a readable saved data set: {error}", where=str(folder), mend="save it again with save_to_disk") from None
        return _read_object(saved, split, max_row_bytes, label=label)
    files = sorted(
        path
        for path in folder.rglob("*")
        if _format_of(path) and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        endings = sorted({path.suffix or path.name for path in folder.iterdir()})[:8]
        raise DataError(
            f"no data file in this folder (found: {', '.join(endings) or 'nothing'})",
            where=str(folder),
            expected=f"files ending in {', '.join(_FORMATS)}",
            mend="check the path",
        )
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(split_of_file(path, folder) or "", []).append(path)
    if set(found) == {""}:
        require_only_split(split, label)
        return _read_files(files, None, max_row_bytes)
    by_name = {key or "train": paths for key, paths in found.items() if key or "train" not in found}
    return _read_files(by_name[pick_split(by_name, split, label)], None, max_row_bytes)


def _read_object(data: Any, split: str | None, max_row_bytes: int, label: str = "the data set") -> Iterator[RawRow]:
    if isinstance(data, Mapping):
        is_plain = any(isinstance(value, (str, list, tuple, dict)) or not hasattr(value, "__iter__") for value in data.values())
        if data and not is_plain:
            return _read_object(data[pick_split(data, split, label)], None, max_row_bytes, label)
        taken, rows = jsonfiles.rows_of_document(dict(data), split, label)
        return ((Where(f"{label}[{taken}]" if taken else label, row), value) for row, value in enumerate(rows))
    is_of_datasets = hasattr(data, "with_format") and hasattr(data, "features")  # Dataset, IterableDataset
    require_only_split(split, label, announced=str(data.split) if is_of_datasets and data.split else None)
    if is_of_datasets:
        features, data = data.features, data.with_format(None)  # plain Python values
        readers = cell_readers(features.arrow_schema, is_decoded=True) if features is not None else {}
        return ((Where(label, row), read_cells(value, readers)) for row, value in enumerate(data))
    if hasattr(data, "to_batches"):  # pyarrow.Table
        return tables.read_batches(iter(data.to_batches(max_chunksize=1024)), label, max_row_bytes)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas.DataFrame
        data = data.to_dict(orient="records")
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise DataError(
            f"a {type(data).__name__} holds no rows",
            where=label,
            expected="a path, a hub id, a data set or a list of rows",
            mend="pass train_dataset as one of these",
        )
    return ((Where(label, row), value) for row, value in enumerate(iter(data)))


def _read_hub(
    hub_id: str, split: str | None, *, streaming: bool, name: str | None, revision: str | None, max_row_bytes: int
) -> Iterator[RawRow]:
    data = load_hub(hub_id, streaming=streaming, name=name, revision=revision)
    taken = pick_split(data, split, hub_id)
    return _read_object(data[taken], None, max_row_bytes, label=f"{hub_id}[{taken}]")


def load_hub(hub_id: str, *, streaming: bool, name: str | None = None, revision: str | None = None) -> Any:
    """A data set of the hub, its splits by name; from the local copy where the hub does not answer.

    Raises:
        AbsentDataError: it is not there, or cannot be loaded.
    """
    import datasets

    from orpo.system.machine import hub_answers

    is_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = is_offline or not hub_answers()
    try:
        return datasets.load_dataset(hub_id, name, split=None, revision=revision, streaming=streaming)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise AbsentDataError(
            f"neither a file or folder here nor a data set that could be loaded from the hub: {first_line}",
            where=hub_id,
            expected="a path that exists, or a data set's hub id and a connection",
            mend="check the spelling and the connection; `hf download --repo-type dataset` fetches it beforehand",
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = is_offline
