"""Words that the tasks' lines share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from orpo.system.intervals import smallest_shown


def interval(estimate: dict[str, float | None], style: str = ".3f") -> str:
    """`0.412 [0.301, 0.523]`."""
    value = format(estimate["value"], style)
    if estimate["low"] is None or estimate["high"] is None:
        return value
    return f"{value} [{format(estimate['low'], style)}, {format(estimate['high'], style)}]"


def gaps(result: dict[str, Any]) -> Iterator[str]:
    """What a judge left open."""
    if result["num_malformed"]:
        yield f"{result['num_malformed']} verdicts could not be read; they count for nothing"
    if result["num_unanswered"]:
        yield f"{result['num_unanswered']} questions got no reply; the same command asks them again"


def power_of_rate(rate: dict[str, float | None], num: int) -> Iterator[str]:
    """How far from one half a win rate must be to be told from it."""
    found = smallest_shown(rate["low"], rate["high"])
    if found is not None:
        yield f"{num} prompts would have shown a win rate that is {100 * found:.1f} points or more from 50 % (80 % power)"


def power_of_share(share: dict[str, float | None], num: int) -> Iterator[str]:
    """How far two models must be apart on these prompts, if each is measured by itself."""
    found = smallest_shown(share["low"], share["high"])
    if found is not None:
        yield f"{num} prompts would show two models {100 * math.sqrt(2) * found:.1f} points or more apart (80 % power)"
