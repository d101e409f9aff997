"""What decides the token groups of a source, as one key: its content, how it is read, the tokenizer, the template, and this code."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.data.reading.sources import DEMO_DATA, Source, as_sources
from orpo.data.settings import DataSettings

if TYPE_CHECKING:
    from orpo.data.template import TemplateEncoder

_NO_MATTER = ("dataset_streaming",)
_PACKAGES = ("orpo", "tokenizers", "transformers", "jinja2", "datasets", "pyarrow")

FileHash = Callable[[Path], str]
"""The hash of a file's content."""


def files_of(source: Source) -> list[Path] | None:
    """The files that a source may be read from; None where it is no file, folder or pattern."""
    if not isinstance(source.path, (str, Path)):
        return None
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if found.is_file())
    if str(source.path) == DEMO_DATA:
        return []
    if glob.has_magic(str(source.path)):
        return sorted(found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file())
    return None


def num_bytes_of(spec: Any, split: str | None) -> int | None:
    """Bytes of a source: of its files, or of a table in memory; None where that is not known without loading it."""
    sizes = [_num_bytes(source) for source in as_sources(spec, split=split)]
    return sum(size for size in sizes if size is not None) if None not in sizes else None


def _num_bytes(source: Source) -> int | None:
    if (files := files_of(source)) is not None:
        return sum(path.stat().st_size for path in files)
    if isinstance(source.path, (str, Path)):
        return None
    parts = source.path.values() if isinstance(source.path, Mapping) else [source.path]
    tables = [part for part in parts if hasattr(getattr(part, "data", None), "nbytes") and len(part)]
    return sum(part.data.nbytes * len(part) // max(part.data.num_rows, 1) for part in tables)


def rows_key(spec: Any, split: str | None, settings: DataSettings, encoder: TemplateEncoder, file_hash: FileHash) -> str | None:
    """The key of a source's token groups; None where nothing says what its content is, or what its tokenizer does.

    Args:
        file_hash: gives the hash of a file.
    """
    tokenizer = _tokenizer_facts(encoder)
    sources = [_source_facts(source, file_hash) for source in as_sources(spec, split=split, column_map=settings.column_map)]
    if tokenizer is None or None in sources:
        return None
    own = {name: value for name, value in asdict(settings).items() if name not in _NO_MATTER}
    facts = {"sources": sources, "settings": own, "tokenizer": tokenizer, "template": encoder.describe(), "code": _code()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _source_facts(source: Source, file_hash: FileHash) -> dict[str, Any] | None:
    files = files_of(source)
    content: Any
    if files is not None:
        content = [[str(path), file_hash(path)] for path in files]
    else:
        content = _object_facts(source)
        if content is None:
            return None
    column_map = None if source.column_map is None else dict(source.column_map)
    place = str(source.path) if isinstance(source.path, (str, Path)) else None
    return {
        **{name: getattr(source, name) for name in ("split", "weight", "name", "revision")},
        "place": place,
        "column_map": column_map,
        "content": content,
    }


def _object_facts(source: Source) -> Any:
    """The fingerprints that the `datasets` library keeps of its own data sets, those of a hub among them."""
    data = source.path
    if isinstance(data, (str, Path)):
        from orpo.data.reading.sources import load_hub

        data = load_hub(str(data), name=source.name, revision=source.revision, streaming=False)
    parts = data if isinstance(data, Mapping) else {"": data}
    found = {str(name): getattr(part, "_fingerprint", None) for name, part in parts.items()}
    is_whole = all(hasattr(part, "__len__") and hasattr(part, "features") for part in parts.values())
    return found if is_whole and all(found.values()) else None


def _tokenizer_facts(encoder: TemplateEncoder) -> dict[str, Any] | None:
    tokenizer = encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = tokenizer.backend_tokenizer.to_str()
    special = {str(name): str(value) for name, value in tokenizer.special_tokens_map.items()}
    return {"kind": type(tokenizer).__name__, "backend": hashlib.sha256(backend.encode()).hexdigest(), "special": special}


@cache
def _code() -> dict[str, str]:
    """The packages that make ids of texts, and the content of this one's."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return {"data": digest.hexdigest(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(path: Path) -> str:
    """What changes whenever a file is written: by it a hash is known again without reading the file."""
    facts = os.stat(path)
    shown = (str(path.absolute()), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    return hashlib.sha256(repr(shown).encode()).hexdigest()
