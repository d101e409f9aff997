"""Texts that begin alike, tokenised once where they do.

Tokenizers look for added tokens first and treat what stands between two of them apart: no id depends on what is on the other side of one.
So the sequences of a row, which all begin with its prompt, need that prompt once, and each its own rest from the prompt's last such token
on. What is told here of a token is proved from the tokenizer's own table, and tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Encode = Callable[[list[str]], list[list[int]]]

_TRIED = ("x", " x", "\nx", "X y", "\n\n", "  ", "é", "▁x")
_MOST_KNOWN, _LONGEST_KNOWN = 256, 64


class Cuts:
    """Tokens of a tokenizer that nothing is tokenised across.

    Args:
        tokenizer: a transformers tokenizer; one without a fast backend has none.
        candidates: texts of added tokens that a template prints.
        encode: texts to ids, without adding special tokens.
    """

    def __init__(self, tokenizer: Any, candidates: Iterable[str], encode: Encode) -> None:
        self._encode = encode
        self._ids = _sure_cuts(tokenizer, candidates, encode)
        self._opening = tuple(text for text, (_, eats_left) in self._ids.items() if not eats_left)
        self._known: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._ids)

    def begins_with_one(self, texts: Iterable[str]) -> bool:
        """Whether each of the texts begins with such a token, and one that leaves alone what stands before it."""
        return bool(self._opening) and all(text.startswith(self._opening) for text in texts)

    def last(self, prompt: str, full: Sequence[str]) -> int:
        """Where the last such token of a prompt begins, if all of the sequences begin with the prompt up to its end; else 0."""
        at, text = max(((prompt.rfind(text), text) for text in self._ids), default=(0, ""))
        return at if at > 0 and all(whole.startswith(prompt[: at + len(text)]) for whole in full) else 0

    def num_behind(self, rest: str) -> int:
        """How many ids the end of a prompt has, from its last such token on."""
        if (found := self._known.get(rest)) is None:
            found = len(self._encode([rest])[0])
            if len(rest) <= _LONGEST_KNOWN and len(self._known) < _MOST_KNOWN:  # a header is the same in all rows
                self._known[rest] = found
        return found

    def encode(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Ids of the texts of each row: a prompt, and sequences that begin with it (or do not: then they are tokenised whole).

        Args:
            rows: the prompt first.
        """
        places = [self.last(prompt, full) for prompt, *full in rows]
        texts = [text for (prompt, *full), at in zip(rows, places, strict=True) for text in (prompt, *(whole[at:] for whole in full))]
        made = iter(self._encode(texts))
        found = []
        for (prompt, *full), at in zip(rows, places, strict=True):
            alone = next(made)
            head = alone[: len(alone) - self.num_behind(prompt[at:])] if at else []
            found.append([alone, *(head + next(made) for _ in full)])
        return found


def _sure_cuts(tokenizer: Any, candidates: Iterable[str], encode: Encode) -> dict[str, tuple[int, bool]]:
    """Id of each token that is found wherever its text stands, and whether it takes the white space before it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        return {}
    table = {token.content: (index, token) for index, token in backend.get_added_tokens_decoder().items()}
    # Found in the text as it stands, before the others: only these can keep one of them from being found.
    first = [text for text, (_, token) in table.items() if not token.normalized]
    found = {}
    for text in set(candidates) & set(first):
        index, token = table[text]
        # An unknown character has the unknown token's id as well, and a word's border may hide a token.
        if token.single_word or text == tokenizer.unk_token or not text.strip():
            continue
        if not any(_hides(other, text) for other in first) and _is_apart(text, index, encode):
            found[text] = (index, bool(token.lstrip))
    return found


def _hides(other: str, text: str) -> bool:
    """Whether a token may stand so that this one, which begins inside of it, is not found."""
    return (other != text and text in other) or other.endswith(tuple(text[:size] for size in range(1, len(text))))


def _is_apart(text: str, index: int, encode: Encode) -> bool:
    """Whether ids on either side of a token are the same with and without the other side."""
    sides = [(before, after) for before in _TRIED for after in _TRIED]
    lefts, rights = encode([before + text for before in _TRIED]), encode([text + after for after in _TRIED])
    if not all(left[-1:] == [index] for left in lefts) or not all(right[:1] == [index] for right in rights):
        return False
    made = encode([before + text + after for before, after in sides])
    return made == [left + right[1:] for left in lefts for right in rights]
