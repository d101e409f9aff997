"""Words and hashes of texts, and when two prompts count as the same."""

from __future__ import annotations

import hashlib
import re

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
"""A word, or one character of the scripts that are written without spaces."""


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
