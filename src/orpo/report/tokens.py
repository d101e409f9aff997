"""Pairs token by token: each token's log-probability before and after, as three colourings of the same text.

The odds ratio is made of the mean over an answer's tokens; this shows which of them moved it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orpo.report.sections import Section, Token, TokenPair, TokenText, items, number, part, show, text

LEVELS = (-0.1, -0.5, -1.2, -2.3, -3.9, -6.0)
"""Log-probabilities (nats) that part the levels 0 to 6: 90 %, 61 %, 30 %, 10 %, 2 %, 0.25 %."""
STEPS = (0.1, 0.35, 0.8, 1.6, 3.0)
"""Changes (nats) that part the levels 0 to 5, in both directions."""
_MOST_TOKENS = 600


def token_section(record: dict[str, Any] | None) -> Section:
    """The pairs that `orpo eval` kept token by token."""
    section = Section("tokens", "Token by token", short="Tokens")
    for shown in items(record, "result", "shown"):
        pair = _pair(shown)
        if pair is not None:
            section.pairs.append(pair)
    if section.pairs:
        section.lead.append(
            "Log-probabilities of each token of held-out pairs, under the model before and after: pairs whose margin moved most in both "
            "directions, and ordinary ones. Hover over a token, or tap it, for its numbers."
        )
    return section


def _pair(shown: Any) -> TokenPair | None:
    answers = []
    means: dict[str, tuple[float | None, float]] = {}
    for side in ("chosen", "rejected"):
        tokens = [text(token) for token in items(shown, "model", side, "tokens")]
        after = _logps(part(shown, "model", side, "logps"), len(tokens))
        if not tokens or after is None:
            return None
        before = _logps(part(shown, "against", side, "logps"), len(tokens))
        means[side] = (None if before is None else sum(before) / len(before), sum(after) / len(after))
        answers.append(_answer(side, tokens, before, after, means[side]))
    old, new = ((means["chosen"][when], means["rejected"][when]) for when in (0, 1))
    margin = show((new[0] or 0) - (new[1] or 0), "+.2f")
    if old[0] is not None and old[1] is not None:
        margin = f"{show(old[0] - old[1], '+.2f')} → {margin}"
    where = text(part(shown, "where")).replace("\\", "/").rpartition("/")[2]
    return TokenPair(where, f"margin {margin} nats per token", text(part(shown, "model", "prompt")), answers)


def _logps(values: Any, count: int) -> list[float] | None:
    """As many finite numbers as there are tokens, or None."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    known = [value for value in found if value is not None]
    return known if len(known) == count == len(found) and count else None


def _answer(
    side: str, tokens: Sequence[str], before: list[float] | None, after: list[float], mean: tuple[float | None, float]
) -> TokenText:
    old, new = mean
    summary = f"mean {show(new, '.2f')}"
    if old is not None:
        summary = f"mean {show(old, '.2f')} → {show(new, '.2f')} ({show(new - old, '+.2f')})"
    if len(tokens) > _MOST_TOKENS:
        summary += f"; the first {_MOST_TOKENS} of {len(tokens)} tokens"
    views = [_token(token, None if before is None else before[i], after[i]) for i, token in enumerate(tokens[:_MOST_TOKENS])]
    return TokenText(side, summary, views)


def _token(token: str, before: float | None, after: float) -> Token:
    classes, told = [f"a{_level(after)}"], f"{show(after, '.2f')} ({_chance(after)})"
    if before is not None:
        change = after - before
        size = sum(abs(change) >= step for step in STEPS)
        classes += [f"b{_level(before)}", f"{'u' if change > 0 else 'd'}{size}"]
        told = f"before {show(before, '.2f')} ({_chance(before)}), after {told}, change {show(change, '+.2f')}"
    return Token(_visible(token), " ".join(classes), told)


def _level(logp: float) -> int:
    return sum(logp < level for level in LEVELS)


def _chance(logp: float) -> str:
    share = math.exp(min(logp, 0.0))
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _visible(token: str) -> str:
    from orpo.data.preview import visible

    return visible(token) or "·"
