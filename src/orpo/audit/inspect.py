"""What an audit keeps of each row: numbers and hashes, never the text, so that memory does not grow with the length of the rows.

Rows are inspected in chunks, in several processes where there are enough of them.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np

from orpo.audit import surface
from orpo.audit.surface import key_of, words_of
from orpo.data.formats import judge, rough_size, to_draft
from orpo.data.rows.messages import BadRow, plain_text
from orpo.data.rows.recognise import Shape, detect_shape
from orpo.data.rows.shapes import Draft
from orpo.data.types import Dropped, Where

NUM_PERMUTATIONS = 64
CHUNK_ROWS = 256
_CHUNK_CHARS = 4 << 20
_WORTH_A_PROCESS = 8
"""Chunks from which the start of processes pays."""
_MOST_PAIRS = 8
_EXCERPT_CHARS = 100
_SAMPLE_CHARS = 1200
_MOST_WORDS = 20_000
"""Words of a text that are looked at; a text beyond this is far beyond any max_length."""

FLAGS = (
    *surface.TEXT_FLAGS,
    "turn_in_answer",
    "looks_cut",
    "low_contrast",
    "benchmark_overlap",
    "evaluation_overlap",
)
"""Row flags, by their bit."""

LOW_CONTRAST = 0.95
"""Share of common words from which two answers hardly differ."""


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """What the inspection of a row needs to know.

    Attributes:
        pairs, sft_rows, column_map: as in `load_preferences`.
        scenario_column: column to slice by.
        benchmark_runs: sorted hashes of the word runs of benchmark prompts.
        benchmark_keys, evaluation_keys: sorted hashes of whole prompts.
    """

    pairs: str = "best_worst"
    sft_rows: bool = False
    column_map: Mapping[str, str] | None = None
    scenario_column: str | None = None
    benchmark_runs: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    benchmark_keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    evaluation_keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


@dataclass(slots=True)
class Chunk:
    """The facts of some rows, in columns. `R` are responses, `P` pairs, all rows together; `keys` are 64-bit hashes, 0 for none."""

    wheres: list[Where] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    excerpts: list[str] = field(default_factory=list)
    scenarios: list[str | None] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    prompt_keys: list[int] = field(default_factory=list)
    row_keys: list[int] = field(default_factory=list)
    chosen_keys: list[int] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    prompt_signatures: list[np.ndarray] = field(default_factory=list)
    prompt_words: list[int] = field(default_factory=list)
    prompt_chars: list[int] = field(default_factory=list)
    pair_rows: list[int] = field(default_factory=list)
    pair_keys: list[int] = field(default_factory=list)
    pair_is_swapped: list[bool] = field(default_factory=list)
    features: list[tuple[list[float], list[float]]] = field(default_factory=list)
    openings: list[tuple[str, str]] = field(default_factory=list)
    closings: list[tuple[str, str]] = field(default_factory=list)
    languages: list[tuple[str, str]] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    samples: list[tuple[int, int, str, str]] = field(default_factory=list)
    """(row key, index in the chunk, prompt, chosen answer) of the rows that the sample may take."""


class Inspector:
    """Inspects rows of one shape; one per process."""

    def __init__(self, shape: Shape, options: InspectOptions) -> None:
        from datasketch import MinHash

        self.shape, self.options = shape, options
        self._hasher = surface.WordHasher()
        self._empty = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=_as_it_is)

    def inspect(self, rows: Iterable[tuple[Where, Any]], cutoff: int) -> Chunk:
        """The facts of some rows, with the texts of those whose key is below the cutoff."""
        chunk = Chunk()
        for where, row in rows:
            self._one(chunk, where, row, cutoff)
        return chunk

    def signature(self, word_hashes: np.ndarray) -> np.ndarray:
        """datasketch's MinHash of a text's word runs: uint32, shape (NUM_PERMUTATIONS,)."""
        sketch = self._empty.copy()
        sketch.update_batch(surface.shingles(word_hashes).tolist())
        return sketch.hashvalues.astype(np.uint32)

    def prompt_signature(self, prompt: str) -> np.ndarray:
        """The MinHash of a prompt."""
        return self.signature(self._hasher.hashes(words_of(prompt)[:_MOST_WORDS]))

    def _one(self, chunk: Chunk, where: Where, row: Any, cutoff: int) -> None:
        draft: Draft | None = None
        dropped = row if isinstance(row, Dropped) else None
        if dropped is None:
            try:
                draft = to_draft(row, self.shape)
            except BadRow as error:
                dropped = Dropped(error.reason, where, error.detail)
            except RecursionError:
                dropped = Dropped("wrong_type", where, "nested too deeply")
        scenario = None
        if draft is not None:
            judged = judge(draft, row, self.shape, where)
            dropped = judged if isinstance(judged, Dropped) else None
            scenario = row.get(self.options.scenario_column) if self.options.scenario_column else None
        chunk.wheres.append(where)
        chunk.reasons.append(dropped.reason if dropped else None)
        chunk.details.append(dropped.detail if dropped else "")
        chunk.scenarios.append(scenario if isinstance(scenario, str) or scenario is None else repr(scenario)[:60])
        if draft is None:
            self._without_draft(chunk)
        else:
            self._with_draft(chunk, draft, is_kept=dropped is None)
            key = chunk.row_keys[-1]
            if dropped is None and key < cutoff:
                texts = (draft.prompt, draft.responses[draft.pairs[0][0] if draft.pairs else 0])
                prompt, chosen = (plain_text(text)[:_SAMPLE_CHARS] for text in texts)
                chunk.samples.append((key, len(chunk.wheres) - 1, prompt, chosen))

    @staticmethod
    def _without_draft(chunk: Chunk) -> None:
        chunk.excerpts.append("")
        for numbers in (chunk.flags, chunk.prompt_keys, chunk.row_keys, chunk.chosen_keys, chunk.prompt_words, chunk.prompt_chars):
            numbers.append(0)
        chunk.signatures.append(np.zeros(NUM_PERMUTATIONS, np.uint32))
        chunk.prompt_signatures.append(np.zeros(NUM_PERMUTATIONS, np.uint32))

    def _with_draft(self, chunk: Chunk, draft: Draft, *, is_kept: bool) -> None:
        prompt, answers = plain_text(draft.prompt), [plain_text(response) for response in draft.responses]
        words = [words_of(text)[:_MOST_WORDS] for text in (prompt, *answers)]
        hashes = [self._hasher.hashes(some) for some in words]
        stripped = [answer.strip() for answer in answers]
        asked = draft.prompt if isinstance(draft.prompt, str) else draft.prompt[-1]["content"] if draft.prompt else ""
        chunk.excerpts.append(" ".join(asked[: 4 * _EXCERPT_CHARS].split())[:_EXCERPT_CHARS])
        chunk.prompt_keys.append(key_of(" ".join(words[0]) or prompt.strip()))
        chunk.row_keys.append(key_of(prompt.strip(), *stripped, repr(draft.pairs)))
        chunk.chosen_keys.append(key_of(stripped[draft.pairs[0][0] if draft.pairs else 0]))
        chunk.prompt_words.append(len(words[0]))
        chunk.prompt_chars.append(len(prompt))
        chunk.prompt_signatures.append(self.signature(hashes[0]))
        chunk.signatures.append(self.signature(np.concatenate(hashes[1:])))
        flags = set().union(*(surface.text_flags(text) for text in (prompt, *answers)))
        flags |= self._overlaps(chunk.prompt_keys[-1], hashes[0])
        if any(surface.holds_turn(answer) for answer in answers):
            flags.add("turn_in_answer")
        if is_kept:
            flags |= self._pairs(chunk, draft, words, answers, stripped)
        chunk.flags.append(sum(1 << FLAGS.index(flag) for flag in flags))

    def _overlaps(self, key: int, hashes: np.ndarray) -> set[str]:
        options, found = self.options, set()
        if _contains(options.evaluation_keys, key):
            found.add("evaluation_overlap")
        if _contains(options.benchmark_keys, key):
            found.add("benchmark_overlap")
        elif len(options.benchmark_runs) and len(hashes) >= surface.BENCHMARK_WORDS:
            runs = surface.run_hashes(hashes, surface.BENCHMARK_WORDS)
            places = np.searchsorted(options.benchmark_runs, runs)
            # What is larger than all has a place behind the last; any place will do, since what lies there is compared.
            places[places == len(options.benchmark_runs)] = 0
            if np.any(options.benchmark_runs[places] == runs):
                found.add("benchmark_overlap")
        return found

    def _pairs(self, chunk: Chunk, draft: Draft, words: Sequence[list[str]], answers: Sequence[str], stripped: Sequence[str]) -> set[str]:
        """The facts of each pair of a row that is kept."""
        flags: set[str] = set()
        prompt_words = frozenset(words[0])
        chosen = {i for i, _ in draft.pairs} or {0}
        if any(surface.looks_cut(answers[i], len(words[i + 1])) for i in chosen):
            flags.add("looks_cut")
        of = {
            i: (surface.features(answers[i], words[i + 1], prompt_words), surface.language_of(answers[i], words[i + 1]))
            for i in {index for pair in draft.pairs[:_MOST_PAIRS] for index in pair}
        }
        for i, j in draft.pairs[:_MOST_PAIRS]:
            alike = surface.similarity(words[i + 1], words[j + 1])
            if alike >= LOW_CONTRAST:
                flags.add("low_contrast")
            chunk.pair_rows.append(len(chunk.wheres) - 1)
            chunk.pair_keys.append(key_of(" ".join(words[0]), *sorted((stripped[i], stripped[j]))))
            chunk.pair_is_swapped.append(stripped[i] > stripped[j])
            chunk.features.append((of[i][0], of[j][0]))
            chunk.languages.append((of[i][1], of[j][1]))
            chunk.openings.append((" ".join(words[i + 1][:2]), " ".join(words[j + 1][:2])))
            chunk.closings.append((" ".join(words[i + 1][-2:]), " ".join(words[j + 1][-2:])))
            chunk.similarities.append(alike)
        return flags


def _contains(keys: np.ndarray, key: int) -> bool:
    place = int(np.searchsorted(keys, np.uint64(key)))
    return place < len(keys) and int(keys[place]) == key


def _as_it_is(value: int) -> int:
    """datasketch's hash function for values that are hashes already."""
    return value


_worker: Inspector | None = None


def _start_worker(head: list[Any], where: str, options: InspectOptions) -> None:
    global _worker
    shape = detect_shape(head, options.column_map, pairs=options.pairs, sft_rows=options.sft_rows, where=where)
    _worker = Inspector(shape, options)


def _work(rows: list[tuple[Where, Any]], cutoff: int) -> Chunk:
    if _worker is None:
        raise AssertionError("the worker was not started")
    return _worker.inspect(rows, cutoff)


def default_workers() -> int:
    """Processes to inspect with: one per core, at most four."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _chunks(rows: Iterable[tuple[Where, Any]]) -> Iterator[list[tuple[Where, Any]]]:
    """Rows in chunks of a bounded number and size."""
    chunk: list[tuple[Where, Any]] = []
    size = 0
    for where, row in rows:
        chunk.append((where, row))
        size += rough_size(row)
        if len(chunk) >= CHUNK_ROWS or size > _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def inspect_rows(
    rows: Iterable[tuple[Where, Any]],
    shape: Shape,
    head: Sequence[Any],
    options: InspectOptions,
    num_workers: int,
    cutoff: Callable[[], int],
) -> Iterator[Chunk]:
    """The facts of all rows, chunk by chunk and in order.

    Processes are started only for data that is worth their start, and are given the rows that the shape was recognised from, since a shape
    holds functions. At most a few chunks of rows are held at a time. `cutoff()` is asked before each chunk which rows' texts are wanted.
    """
    chunks = _chunks(rows)
    first = list(itertools.islice(chunks, _WORTH_A_PROCESS))
    if num_workers < 2 or len(first) < _WORTH_A_PROCESS:
        inspector = Inspector(shape, options)
        yield from (inspector.inspect(some, cutoff()) for some in itertools.chain(first, chunks))
        return
    # Not fork, which would copy the locks of libraries' threads as they are at this moment, held ones too.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (list(head), "the data set", options))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for rows_of_chunk in itertools.chain(first, chunks):
            waiting.append(pool.submit(_work, rows_of_chunk, cutoff()))
            if len(waiting) >= 3 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
