"""Intervals of shares that are honest for small counts, and the smallest difference that a measurement would have shown.

A bootstrap of seven right answers out of seven draws seven right answers every time: [100 %, 100 %]. Wilson's interval says 65 to 100 %.
"""

from __future__ import annotations

import math

Z = 1.959964
"""Of a 95 % interval."""
_Z_POWER = 0.841621
"""Of 80 % power."""
SHOWN_FACTOR = (Z + _Z_POWER) / Z
"""A true difference of so many half-widths of its 95 % interval leaves zero outside of that interval in 80 % of all measurements."""


def wilson(num_right: float, num: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score interval); (0, 1) without observations."""
    if num == 0:
        return 0.0, 1.0
    share = num_right / num
    centre = (share + Z * Z / (2 * num)) / (1 + Z * Z / num)
    half = Z / (1 + Z * Z / num) * math.sqrt(share * (1 - share) / num + Z * Z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_shares(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of the second share minus the first, both of the same cases.

    Source: Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired data (Statistics in
    Medicine 17, 1998), method 10: Wilson's limits of either share, squared and added with the correlation between the two.
    """
    num = both + only_first + only_second + neither
    if num == 0:
        return -1.0, 1.0
    first, second = (both + only_first) / num, (both + only_second) / num
    low_1, high_1 = wilson(first * num, num)
    low_2, high_2 = wilson(second * num, num)
    phi = _correlation(both, only_first, only_second, neither)
    down = (second - low_2) ** 2 - 2 * phi * (second - low_2) * (high_1 - first) + (high_1 - first) ** 2
    up = (high_2 - second) ** 2 - 2 * phi * (high_2 - second) * (first - low_1) + (first - low_1) ** 2
    change = second - first
    return change - math.sqrt(max(down, 0.0)), change + math.sqrt(max(up, 0.0))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Phi of the two answers, corrected for continuity where it is positive, as in Newcombe's method."""
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if product == 0:
        return 0.0
    excess = float(both * neither - only_first * only_second)
    if excess > 0:
        excess = max(excess - (both + only_first + only_second + neither) / 2, 0.0)
    return excess / math.sqrt(product)


def smallest_shown(low: float | None, high: float | None) -> float | None:
    """The true difference that would have shown with 80 % power, from the 95 % interval of the measured one; None without an interval."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return None
    return SHOWN_FACTOR * (high - low) / 2
