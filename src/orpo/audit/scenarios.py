"""Coverage and balance: how many pairs each scenario has, and how varied its chosen answers are.

Scenarios are the values of a column, or groups of similar prompts found by their words where there is no such column.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from orpo.audit.surface import words_of
from orpo.audit.table import AuditTable

COLUMNS = ("scenario", "category", "topic", "domain", "task", "source", "subset", "dataset")
"""Columns that are taken for the scenario where they divide the rows into a few groups."""

MOST_SCENARIOS = 60
_NUM_CLUSTERS = 8
_WORDS_COMPARED = 2000
THIN_SHARE = 0.2
"""A scenario with less than this part of an even share is thin."""

DOMINANT_SHARE = 0.6
FLAT_VARIETY = 0.35
"""Share of distinct word triples, over the same number of words, below which chosen answers hardly vary."""


@dataclass(slots=True)
class Scenario:
    """One scenario.

    Attributes:
        num_pairs: its pairs; scaled up where scenarios were found on a sample.
        share: of all pairs.
        chosen_longer: share of its pairs whose chosen answer has more words.
        variety: share of distinct word triples in its chosen answers, over at most the same number of words for each scenario; NaN where
            there are too few words.
    """

    name: str
    num_pairs: int
    share: float
    chosen_longer: float
    variety: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "num_pairs": self.num_pairs,
            "share": round(self.share, 4),
            "chosen_longer": round(self.chosen_longer, 4),
            "variety": None if np.isnan(self.variety) else round(self.variety, 4),
        }


class ScenarioSample:
    """A uniform sample of usable rows with their texts, for what hashes cannot tell: those with the smallest keys.

    Keys are hashes, so the rows that have the smallest ones are as good as drawn, and who they are does not depend on how the rows were
    divided among processes.
    """

    def __init__(self, size: int = 4000) -> None:
        self.size = size
        self._held: list[tuple[int, int, str, str]] = []
        self._keys: set[int] = set()

    def cutoff(self) -> int:
        """Only rows with a smaller key can still enter."""
        return -self._held[0][0] if len(self._held) >= self.size else 1 << 64

    def offer(self, key: int, row: int, prompt: str, chosen: str) -> None:
        """Take a row in, unless its key is too large or known."""
        if key in self._keys or key >= self.cutoff():
            return
        self._keys.add(key)
        heapq.heappush(self._held, (-key, row, prompt, chosen))
        if len(self._held) > self.size:
            self._keys.discard(-heapq.heappop(self._held)[0])

    def items(self) -> list[tuple[int, str, str]]:
        """(row, prompt, chosen) in the order of the rows."""
        return sorted((row, prompt, chosen) for _, row, prompt, chosen in self._held)


def variety(texts: list[str]) -> float:
    """Share of distinct word triples in the first _WORDS_COMPARED words; NaN below 200 words."""
    words = [word for text in texts for word in [*words_of(text), "\n"]][:_WORDS_COMPARED]
    if len(words) < 200:
        return float("nan")
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples)


def find_scenarios(table: AuditTable, sample: ScenarioSample, *, has_column: bool) -> list[Scenario]:
    """The scenarios of a data set, the largest first."""
    of_row = _column(table) if has_column else {}
    if not of_row:
        of_row = _clusters(sample)
    if not of_row:
        return []
    pair_names = [of_row.get(row) for row in table.pair_rows.tolist()]
    counts = Counter(name for name in pair_names if name is not None)
    total = counts.total()
    longer = table.chosen_features[:, 0] > table.rejected_features[:, 0]
    longer_of = Counter(name for name, is_longer in zip(pair_names, longer.tolist(), strict=True) if is_longer and name is not None)
    texts: dict[str, list[str]] = {}
    for row, _, chosen in sample.items():
        if row in of_row:
            texts.setdefault(of_row[row], []).append(chosen)
    scale = len(table.pair_rows) / total if total else 1.0
    return [
        Scenario(name, round(number * scale), number / total, longer_of[name] / number, variety(texts.get(name, [])))
        for name, number in counts.most_common()
    ]


def _column(table: AuditTable) -> dict[int, str]:
    names = table.scenario_names.names
    rows = np.flatnonzero(table.is_kept & (table.scenarios > 0))
    return {row: names[table.scenarios[row]] for row in rows.tolist()}


def _clusters(sample: ScenarioSample) -> dict[int, str]:
    """Groups of prompts with similar words, named by their most telling words."""
    items = sample.items()
    if len(items) < 100:
        return {}
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    vectorizer = TfidfVectorizer(
        max_features=4000, max_df=0.3, min_df=3, sublinear_tf=True, tokenizer=words_of, token_pattern=None, lowercase=False
    )
    try:
        weights = vectorizer.fit_transform([prompt for _, prompt, _ in items])
    except ValueError:  # no word is common enough
        return {}
    num_parts = min(24, weights.shape[1] - 1)
    if num_parts < 2:
        return {}
    parts = normalize(TruncatedSVD(num_parts, random_state=0).fit_transform(weights))
    labels = KMeans(_NUM_CLUSTERS, n_init=2, random_state=0).fit_predict(parts)
    terms = np.asarray(vectorizer.get_feature_names_out())
    overall = np.asarray(weights.mean(axis=0)).ravel()
    names: dict[int, str] = {}
    for label in sorted(set(labels.tolist())):
        mean = np.asarray(weights[labels == label].mean(axis=0)).ravel()
        telling = [word for word in terms[np.argsort(overall - mean)] if _is_telling(word)][:3]
        names[label] = " · ".join(telling) or f"group {label + 1}"
    return {row: names[label] for (row, _, _), label in zip(items, labels.tolist(), strict=True)}


def _is_telling(word: str) -> bool:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return not word.isascii() or (len(word) > 2 and word not in ENGLISH_STOP_WORDS)
