"""What can be seen of a text without understanding it: words, shingle hashes, and the features a model might learn instead of quality.

All of it is cheap (well under a millisecond for a few hundred words), since an audit does it for every answer of a data set.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
"""A word, or one character of the scripts that are written without spaces."""

SHINGLE_WORDS = 5
BENCHMARK_WORDS = 13
"""Length of a word run that two texts do not share by chance; the usual choice for finding benchmarks in training data."""

_NUMBER = re.compile(r"\d+")
_CAPITAL = re.compile(r"[A-Z]")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s", re.MULTILINE)
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
_REFUSAL = re.compile(
    r"\b(?:I(?:'m|’m| am) (?:sorry|unable|not able)|I (?:can(?:'t|’t|not)|cannot|won(?:'t|’t)) (?:help|assist|provide|do|answer|fulfil)"
    r"|as an AI|I apologi[sz]e, but|not (?:able|appropriate|comfortable) to (?:help|assist|provide|answer))",
    re.IGNORECASE,
)
_APOLOGY = re.compile(r"\b(?:sorry|apologi[sz]e|apologies)\b", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:maybe|perhaps|might|possibly|probably|it depends|generally|typically|I think)\b", re.IGNORECASE)
_FIRST_PERSON = re.compile(r"\b(?:I|I'm|I’m|my|me|we|our)\b")

_REPLACEMENT = "\ufffd"
_MOJIBAKE = re.compile(
    "Ã[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]"
    "|â€[\u0080-\u00bf\u0153\u02dc\u2018-\u2122]|Â[\u00a0-\u00bf]|ï»¿"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")
_SPECIAL = re.compile(
    r"<\|[a-z0-9_ -]{2,40}\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>|\[(?:PAD|CLS|SEP|MASK)\]",
    re.IGNORECASE,
)
_TURN = re.compile(r"(?:\A|\n)\s*(?:Human|User|Assistant|AI|### ?(?:Instruction|Response|Human|Assistant)) ?:", re.IGNORECASE)

FEATURES = (
    "words",
    "characters",
    "lines",
    "bullets",
    "headings",
    "bold",
    "code",
    "digits",
    "questions",
    "exclamations",
    "links",
    "emoji",
    "capitals",
    "refusal",
    "apology",
    "hedges",
    "first person",
    "repeats the prompt",
    "varied words",
    "non-ASCII",
    "ends with a full stop",
)
"""Names of the surface features of an answer, in the order of `features`."""

TEXT_FLAGS: dict[str, re.Pattern[str] | str] = {
    "replacement_character": _REPLACEMENT,
    "mojibake": _MOJIBAKE,
    "control_characters": _CONTROL,
    "special_token_text": _SPECIAL,
}

_STOPWORDS = {
    "en": "the of and to in is that for it with as was on are this you be by not have from or an at",
    "de": "der die und das nicht ist ein eine mit sich auf den für von dem zu ich es auch sie",
    "fr": "le la les des est un une dans que pour pas sur avec vous ce il elle du au qui",
    "es": "el la los las de que y en un una es por con para no su se del al lo",
    "it": "il lo la gli di che è un una per non con sono del della nel si le da",
    "pt": "o os as de que e em um uma é para com não do da no na se por mais",
    "nl": "de het een van en is dat niet op te zijn voor met die aan er als ook",
    "pl": "nie jest się na do to że jak ale po co za od przez dla oraz w z i",
}
_STOPWORD_SETS = {code: frozenset(words.split()) for code, words in _STOPWORDS.items()}
_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("ko", re.compile("[\uac00-\ud7af]")),
    ("zh", re.compile("[\u3400-\u9fff]")),
    ("ru", re.compile("[\u0400-\u04ff]")),
    ("ar", re.compile("[\u0600-\u06ff]")),
    ("hi", re.compile("[\u0900-\u097f]")),
)


class WordHasher:
    """32-bit hashes of words, remembered, since most words of a data set are the same few thousand."""

    _MOST = 1 << 18

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def hashes(self, words: Sequence[str]) -> np.ndarray:
        """uint64 array, shape (words,)."""
        known = self._known
        if len(known) > self._MOST:
            known.clear()
        found = list(map(known.get, words))
        if None in found:
            for place, word in enumerate(words):
                if found[place] is None:
                    found[place] = known[word] = zlib.crc32(word.encode("utf-8", "replace"))
        return np.asarray(found, dtype=np.uint64)


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the input (the finaliser of splitmix64); uint64 wraps around by design."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def run_hashes(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """64-bit hashes of all runs of `size` words; of the whole text where it is shorter. Unsorted, with repeats."""
    size = min(size, len(word_hashes))
    if size == 0:
        return np.empty(0, dtype=np.uint64)
    num_runs = len(word_hashes) - size + 1
    total = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(size):  # the multiplier is odd, so each word's place counts
        total = total * _MULTIPLIER + word_hashes[offset : offset + num_runs] + np.uint64(1)
    return _mixed(total)


def shingles(word_hashes: np.ndarray) -> np.ndarray:
    """Distinct 32-bit hashes of the runs of SHINGLE_WORDS words, for MinHash."""
    return np.unique(run_hashes(word_hashes, SHINGLE_WORDS) >> np.uint64(32))


def features(text: str, words: Sequence[str], prompt_words: frozenset[str]) -> list[float]:
    """The surface features of an answer, in the order of FEATURES; counts as logarithms, so that one long outlier does not rule."""
    num_chars, num_words = len(text), len(words)
    distinct = set(words)
    num_capitals = len(_CAPITAL.findall(text[:2000]))
    stripped = text.rstrip()
    counts = (
        num_words,
        num_chars,
        text.count("\n"),
        len(_BULLET.findall(text)),
        len(_HEADING.findall(text)) if "#" in text else 0,
        text.count("**") // 2,
        text.count("`") // 2,
        len(_NUMBER.findall(text)),
        text.count("?"),
        text.count("!"),
        text.count("http"),
        0 if text.isascii() else len(_EMOJI.findall(text)),
    )
    return [
        *(math.log1p(count) for count in counts),
        num_capitals / max(min(num_chars, 2000), 1),
        float(_REFUSAL.search(text[:400]) is not None),
        float(_APOLOGY.search(text) is not None),
        float(len(_HEDGE.findall(text))),
        len(_FIRST_PERSON.findall(text)) / max(num_words, 1),
        len(distinct & prompt_words) / max(len(distinct), 1),
        len(distinct) / max(num_words, 1),
        0.0 if text.isascii() else sum(character > "\x7f" for character in text[:2000]) / max(min(num_chars, 2000), 1),
        float(stripped.endswith((".", "!", "?", "。", "！", "？", '."', ".)"))),
    ]


def language_of(text: str, words: Sequence[str]) -> str:
    """A guess at the language: by script, else by the commonest words; "?" where nothing speaks for one."""
    if not text.isascii():
        start = text[:400]
        for code, pattern in _SCRIPTS:
            if len(pattern.findall(start)) > 0.15 * len(start):
                return code
    distinct = set(words[:200])
    best = max(_STOPWORD_SETS, key=lambda code: len(_STOPWORD_SETS[code] & distinct))
    return best if len(_STOPWORD_SETS[best] & distinct) >= 2 else "?"


def text_flags(text: str) -> set[str]:
    """Which of TEXT_FLAGS a text shows."""
    found = {"special_token_text"} if ("<" in text or "[" in text) and _SPECIAL.search(text) else set()
    if _CONTROL.search(text):
        found.add("control_characters")
    if not text.isascii():
        if _REPLACEMENT in text:
            found.add("replacement_character")
        if _MOJIBAKE.search(text):
            found.add("mojibake")
    return found


def holds_turn(answer: str) -> bool:
    """Whether an answer goes on into another speaker's turn."""
    return ":" in answer and _TURN.search(answer) is not None


def looks_cut(answer: str, num_words: int) -> bool:
    """Whether an answer of some length stops in the middle of a sentence."""
    end = answer.rstrip()[-1:]
    return num_words >= 30 and (end.isalpha() or end == ",") and not (end >= "\u2e80")


def similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of words that two texts have in common, repeats counted (multiset Jaccard): 1 for the same words in any order."""
    if not first and not second:
        return 1.0
    counts: dict[str, int] = {}
    for word in first:
        counts[word] = counts.get(word, 0) + 1
    shared = 0
    for word in second:
        left = counts.get(word, 0)
        if left:
            counts[word] = left - 1
            shared += 1
    return shared / (len(first) + len(second) - shared)


def words_of(text: str) -> list[str]:
    """Lower-case words."""
    return _WORD.findall(text.lower())


def key_of(*texts: str) -> int:
    """A 64-bit hash of texts, never 0; the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return int.from_bytes(digest.digest(), "little") or 1


def prompt_key(prompt: str) -> int:
    """The hash under which prompts count as the same: case, white space and punctuation do not matter, unless there is nothing else."""
    return key_of(" ".join(words_of(prompt)) or prompt.strip())
