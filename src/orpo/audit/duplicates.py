"""Rows that repeat, nearly repeat or contradict each other, found on hashes and MinHash signatures alone."""

from __future__ import annotations

import numpy as np

from orpo.audit.inspect import NUM_PERMUTATIONS
from orpo.audit.table import AuditTable

NEAR = 0.8
"""Estimated share of common word runs, of the answers and of the prompts, from which two rows are near duplicates."""

_BANDS, _BAND_ROWS = 10, 6
"""Bands of the locality-sensitive hashing: two rows of similarity 0.8 meet in one with probability 0.95, of 0.5 with 0.15."""


def later_copies(keys: np.ndarray) -> np.ndarray:
    """Indices of the entries whose key stood earlier already; the key 0 means none."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.flatnonzero((first[inverse] != np.arange(len(keys))) & (keys != 0))


def near_copies(signatures: np.ndarray, prompt_signatures: np.ndarray, candidates: np.ndarray) -> dict[int, int]:
    """index -> the earlier index that it nearly repeats, in its answers and in its prompt, among the candidates.

    datasketch's LSH finds who may be similar, the signatures decide. Rows that share no band with any other cannot be found by it and are
    sorted out beforehand, so that its tables hold a few rows instead of all; a row that repeats another is not put into the tables, so that
    a thousand variations of one template cost a thousand look-ups and not a million.

    Args:
        signatures, prompt_signatures: of the answers and of the prompts, uint32, shape (rows, NUM_PERMUTATIONS).
        candidates: indices of the rows to compare, in order.
    """
    from datasketch import MinHash, MinHashLSH

    sketches = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=(_BANDS, _BAND_ROWS))
    probe = MinHash(num_perm=NUM_PERMUTATIONS)
    found: dict[int, int] = {}
    for index in candidates[_shares_a_band(signatures[candidates])].tolist():
        sketch = probe.copy()
        sketch.hashvalues = signatures[index].astype(probe.hashvalues.dtype)
        near = [int(other) for other in sketches.query(sketch)]
        alike = [other for other in near if _is_near(signatures, other, index) and _is_near(prompt_signatures, other, index)]
        if alike:
            found[index] = min(alike)
        else:
            sketches.insert(index, sketch)
    return found


def _is_near(signatures: np.ndarray, first: int, second: int) -> bool:
    return bool(np.mean(signatures[first] == signatures[second]) >= NEAR)


def _shares_a_band(signatures: np.ndarray) -> np.ndarray:
    """Whether each row has a band in common with another row."""
    is_shared = np.zeros(len(signatures), dtype=bool)
    for band in range(_BANDS if len(signatures) else 0):
        piece = np.ascontiguousarray(signatures[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS])
        whole = piece.view(np.dtype((np.void, piece.dtype.itemsize * _BAND_ROWS))).ravel()
        _, inverse, counts = np.unique(whole, return_inverse=True, return_counts=True)
        is_shared |= counts[inverse] > 1
    return is_shared


def contradictions(table: AuditTable) -> np.ndarray:
    """Rows with a pair that another row has the other way round."""
    _, inverse = np.unique(table.pair_keys, return_inverse=True)
    num_keys = int(inverse.max()) + 1 if len(inverse) else 0
    one_way = np.bincount(inverse, weights=table.pair_is_swapped, minlength=num_keys) > 0
    other_way = np.bincount(inverse, weights=~table.pair_is_swapped, minlength=num_keys) > 0
    return np.unique(table.pair_rows[(one_way & other_way)[inverse]])


def repeated_prompts(table: AuditTable, left_out: np.ndarray) -> np.ndarray:
    """Usable rows whose prompt has other usable rows with other answers."""
    rows = np.setdiff1d(np.flatnonzero(table.is_kept & (table.prompt_keys != 0)), left_out)
    _, inverse, counts = np.unique(table.prompt_keys[rows], return_inverse=True, return_counts=True)
    return rows[counts[inverse] > 1] if len(rows) else rows


def repeated_chosen(table: AuditTable, left_out: np.ndarray) -> np.ndarray:
    """Usable rows whose chosen answer is that of another prompt too."""
    rows = np.setdiff1d(np.flatnonzero(table.is_kept & (table.chosen_keys != 0)), left_out)
    if not len(rows):
        return rows
    _, answer = np.unique(table.chosen_keys[rows], return_inverse=True)
    together = np.unique(np.stack([answer.astype(np.uint64), table.prompt_keys[rows]], axis=1), axis=0)
    num_prompts = np.bincount(together[:, 0].astype(np.int64), minlength=int(answer.max()) + 1)
    return rows[num_prompts[answer] > 1]


def near_prompts(signatures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Indices of the signatures that nearly repeat one of the references (both of prompts: uint32, NUM_PERMUTATIONS wide)."""
    from datasketch import MinHash, MinHashLSH

    joint = np.concatenate([references, signatures])
    is_shared = _shares_a_band(joint)
    sketches = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=(_BANDS, _BAND_ROWS))
    probe = MinHash(num_perm=NUM_PERMUTATIONS)
    found: list[int] = []
    for index in np.flatnonzero(is_shared).tolist():
        sketch = probe.copy()
        sketch.hashvalues = joint[index].astype(probe.hashvalues.dtype)
        if index < len(references):
            sketches.insert(index, sketch)
        elif any(_is_near(joint, int(other), index) for other in sketches.query(sketch)):
            found.append(index - len(references))
    return np.asarray(found, dtype=np.int64)
