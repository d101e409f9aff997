"""Prompts that training data should not share: those of the evaluation data and of known benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo.audit import surface
from orpo.audit.inspect import InspectOptions, Inspector
from orpo.audit.surface import prompt_key, words_of
from orpo.data.formats import Shape, stream_preferences
from orpo.data.reading.sources import read_source
from orpo.data.rows.messages import plain_text
from orpo.data.types import Preference
from orpo.errors import DataError

_PROMPT_KEYS = ("prompt", "instruction", "question", "turns", "query", "input", "text", "messages", "conversations")


@dataclass(frozen=True, slots=True)
class References:
    """Hashes of reference prompts.

    Attributes:
        keys: sorted hashes of whole prompts (case, white space and punctuation aside).
        runs: sorted hashes of their runs of BENCHMARK_WORDS words.
        signatures: MinHash signatures, shape (prompts, permutations).
        num_prompts: how many prompts there are.
    """

    keys: np.ndarray
    runs: np.ndarray
    signatures: np.ndarray
    num_prompts: int


def references_of(prompts: Iterable[str]) -> References:
    """The hashes of some prompts."""
    inspector = Inspector(Shape("prompts", "", _no_reader), InspectOptions())
    hasher = surface.WordHasher()
    keys: list[int] = []
    runs: list[np.ndarray] = []
    signatures: list[np.ndarray] = []
    for prompt in prompts:
        keys.append(prompt_key(prompt))
        words = words_of(prompt)
        if len(words) >= surface.BENCHMARK_WORDS:
            runs.append(surface.run_hashes(hasher.hashes(words), surface.BENCHMARK_WORDS))
        signatures.append(inspector.prompt_signature(prompt))
    return References(
        np.unique(np.asarray(keys, dtype=np.uint64)),
        np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64),
        np.stack(signatures) if signatures else np.empty((0, 0), np.uint32),
        len(keys),
    )


def _no_reader(row: Mapping[str, Any]) -> Any:
    raise AssertionError("prompts alone have no rows to read")


def evaluation_prompts(source: Any, **options: Any) -> Iterator[str]:
    """The prompts of an evaluation set: of preferences in any shape, or of a file that holds prompts alone.

    Raises:
        DataError: neither.
    """
    try:
        items = stream_preferences(source, **options)
        first = next(items, None)
    except DataError as error:
        if not isinstance(source, (str, Path)):
            raise
        try:
            yield from benchmark_prompts([source], options.get("split"))
        except DataError:
            raise error from None
        return
    for item in itertools.chain([] if first is None else [first], items):
        if isinstance(item, Preference):
            yield plain_text(item.prompt)


def benchmark_prompts(paths: Sequence[Any], split: str | None = None) -> Iterator[str]:
    """The prompts in benchmark files: text files with one per line, or rows with a prompt column, a list of turns, or plain strings.

    Raises:
        DataError: a file holds no prompt.
    """
    for path in paths:
        num_found = 0
        rows: Iterable[Any] = _lines(Path(path)) if str(path).endswith(".txt") else (value for _, value in read_source(path, split))
        for row in rows:
            for prompt in _prompts_of(row):
                num_found += 1
                yield prompt
        if not num_found:
            raise DataError(
                "no prompts found",
                where=str(path),
                expected=f"text lines, or rows with one of {', '.join(_PROMPT_KEYS)}",
                mend="rename the column that holds the prompts",
            )


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), expected="a UTF-8 text file", mend="check the path") from None


def _prompts_of(row: Any) -> Iterator[str]:
    if isinstance(row, Mapping):
        row = next((row[key] for key in _PROMPT_KEYS if row.get(key)), None)
    items = row if isinstance(row, (list, tuple)) else [row]
    for item in items:
        if isinstance(item, Mapping):
            is_user = item.get("role", item.get("from")) in {"user", "human"}
            item = item.get("content", item.get("value")) if is_user else None
        if isinstance(item, str) and item.strip():
            yield item
