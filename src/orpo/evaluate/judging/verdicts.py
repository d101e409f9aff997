"""Reading a judge's verdict. Strictly: what does not follow the format, or says two things, is no verdict, and is never guessed at."""

from __future__ import annotations

import re

_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*([A-Z])\s*\]\]")
LOWEST_RATING, HIGHEST_RATING = 1.0, 10.0


def read_rating(text: str) -> float | None:
    """The one rating `[[1]]` to `[[10]]` in a judge's reply, or None: no rating, out of range, or different ones."""
    found = {float(value) for value in _RATING.findall(text)}
    if len(found) != 1:
        return None
    rating = found.pop()
    return rating if LOWEST_RATING <= rating <= HIGHEST_RATING else None


def read_choice(text: str) -> str | None:
    """The one verdict `[[A]]`, `[[B]]` or `[[C]]` (tie) in a judge's reply, or None."""
    found = set(_CHOICE.findall(text))
    if len(found) != 1:
        return None
    choice = found.pop()
    return choice if choice in ("A", "B", "C") else None


def read_model_name(text: str) -> str | None:
    """ "m" or "M": the whole of a reply in AlpacaEval's format, or None."""
    name = text.strip()
    return name if name in ("m", "M") else None
