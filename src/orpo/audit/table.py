"""The facts of all rows of an audit, in arrays: about half a kilobyte per row, whatever the length of its texts."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np

from orpo.audit.inspect import FLAGS, NUM_PERMUTATIONS, Chunk
from orpo.audit.surface import FEATURES

_NO_CATEGORY = 0


class Categories:
    """Numbers for strings that repeat (openings, languages); beyond a bound, further rare ones share the number 0."""

    def __init__(self, most: int = 200_000) -> None:
        self.names = ["…"]
        self._numbers: dict[str, int] = {}
        self._most = most

    def number(self, name: str) -> int:
        """The number of a string."""
        number = self._numbers.get(name)
        if number is None:
            if len(self.names) > self._most:
                return _NO_CATEGORY
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        return number


class AuditTable:
    """Columns over rows and over pairs, grown chunk by chunk, then frozen into arrays by `finish`.

    Row columns: `files`, `rows`, `lines` (the place), `reason_codes`, `flags`, `prompt_keys`, `row_keys`, `chosen_keys`, `signatures`
    (MinHash of the answers), `prompt_signatures`, `prompt_words`, `prompt_chars`, `scenarios`.

    Pair columns: `pair_rows` (index of the row), `pair_keys`, `pair_is_swapped`, `chosen_features` and `rejected_features` (FEATURES wide),
    `openings`, `closings`, `languages` (two numbers each), `similarities`.
    """

    def __init__(self) -> None:
        self.file_names = Categories()
        self.reason_names = Categories()
        self.scenario_names = Categories(10_000)
        self.opening_names, self.closing_names, self.language_names = Categories(), Categories(), Categories()
        self.excerpts: list[str] = []
        self.details: dict[int, str] = {}
        self._columns: dict[str, array[int] | array[float]] = {
            "files": array("i"),
            "rows": array("q"),
            "lines": array("q"),
            "reason_codes": array("i"),
            "flags": array("q"),
            "prompt_keys": array("Q"),
            "row_keys": array("Q"),
            "chosen_keys": array("Q"),
            "prompt_words": array("q"),
            "prompt_chars": array("q"),
            "scenarios": array("i"),
            "pair_rows": array("q"),
            "pair_keys": array("Q"),
            "pair_is_swapped": array("b"),
            "openings": array("i"),
            "closings": array("i"),
            "languages": array("i"),
            "similarities": array("f"),
        }
        self._features = bytearray()
        self._signatures = bytearray()
        self._prompt_signatures = bytearray()
        self.num_rows = 0

    def add(self, chunk: Chunk) -> None:
        """Take in the facts of a chunk of rows."""
        columns = self._columns
        columns["files"].extend(self.file_names.number(where.file) for where in chunk.wheres)
        columns["rows"].extend(where.row for where in chunk.wheres)
        columns["lines"].extend(where.line or 0 for where in chunk.wheres)
        columns["reason_codes"].extend(self.reason_names.number(reason) if reason else 0 for reason in chunk.reasons)
        columns["scenarios"].extend(self.scenario_names.number(name) if name is not None else 0 for name in chunk.scenarios)
        columns["pair_rows"].extend(row + self.num_rows for row in chunk.pair_rows)
        for name in ("flags", "prompt_keys", "row_keys", "chosen_keys", "prompt_words", "prompt_chars"):
            columns[name].extend(getattr(chunk, name))
        for name in ("pair_keys", "pair_is_swapped", "similarities"):
            columns[name].extend(getattr(chunk, name))
        for name, categories in (
            ("openings", self.opening_names),
            ("closings", self.closing_names),
            ("languages", self.language_names),
        ):
            columns[name].extend(categories.number(word) for pair in getattr(chunk, name) for word in pair)
        self.excerpts += chunk.excerpts
        self.details.update({self.num_rows + i: detail for i, detail in enumerate(chunk.details) if detail})
        if chunk.features:
            self._features += np.asarray(chunk.features, dtype=np.float32).tobytes()
        self._signatures += np.stack(chunk.signatures).tobytes()
        self._prompt_signatures += np.stack(chunk.prompt_signatures).tobytes()
        self.num_rows += len(chunk.wheres)

    def finish(self) -> None:
        """Freeze the columns into arrays."""
        c = {name: np.frombuffer(column, dtype=column.typecode) if len(column) else np.zeros(0) for name, column in self._columns.items()}
        self.files, self.rows, self.lines = c["files"], c["rows"], c["lines"]
        self.reason_codes, self.flags, self.scenarios = c["reason_codes"], c["flags"].astype(np.int64), c["scenarios"].astype(np.int64)
        self.prompt_keys, self.row_keys, self.chosen_keys = c["prompt_keys"], c["row_keys"], c["chosen_keys"]
        self.prompt_words, self.prompt_chars = c["prompt_words"], c["prompt_chars"]
        self.pair_rows, self.pair_keys = c["pair_rows"].astype(np.int64), c["pair_keys"]
        self.pair_is_swapped, self.similarities = c["pair_is_swapped"].astype(bool), c["similarities"]
        self.openings = c["openings"].astype(np.int64).reshape(-1, 2)
        self.closings = c["closings"].astype(np.int64).reshape(-1, 2)
        self.languages = c["languages"].astype(np.int64).reshape(-1, 2)
        both = np.frombuffer(self._features, dtype=np.float32).reshape(-1, 2, len(FEATURES))
        self.chosen_features, self.rejected_features = both[:, 0], both[:, 1]
        self.signatures = np.frombuffer(self._signatures, dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS)
        self.prompt_signatures = np.frombuffer(self._prompt_signatures, dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS)
        self.is_kept = self.reason_codes == 0

    def place(self, index: int) -> str:
        """`file:line`, or `file row n`, of a row."""
        name, line = self.file_names.names[self.files[index]], int(self.lines[index])
        return f"{name}:{line}" if line else f"{name} row {int(self.rows[index])}"

    def reasons(self) -> Counter[str]:
        """How many rows were dropped for which reason."""
        codes = Counter(self.reason_codes[~self.is_kept].tolist())
        return Counter({self.reason_names.names[code]: number for code, number in codes.items()})

    def with_reason(self, reason: str) -> np.ndarray:
        """Indices of the rows dropped for a reason."""
        return np.flatnonzero(self.reason_codes == self.reason_names.number(reason))

    def with_flag(self, flag: str) -> np.ndarray:
        """Indices of the rows that show a flag."""
        return np.flatnonzero(self.flags & (1 << FLAGS.index(flag)))
