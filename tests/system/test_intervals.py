"""Intervals of shares: the textbook's numbers, and how often they hold what they should."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest

from orpo.system.intervals import paired_shares, smallest_shown, wilson


@pytest.mark.parametrize(
    ("right", "num", "low", "high"), [(50, 100, 0.404, 0.596), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (0, 0, 0.0, 1.0)]
)
def test_wilson(right: int, num: int, low: float, high: float) -> None:
    assert wilson(right, num) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_all_right_is_no_certainty() -> None:
    low, high = wilson(7, 7)
    assert (round(low, 3), high) == (0.646, 1.0)
    down, up = paired_shares(7, 0, 0, 0)
    assert down == pytest.approx(-up) == pytest.approx(low - 1)


def test_a_paired_interval_turns_with_its_sides() -> None:
    for counts in itertools.product(range(4), repeat=4):
        both, first, second, neither = counts
        low, high = paired_shares(both, first, second, neither)
        other_low, other_high = paired_shares(both, second, first, neither)
        assert (low, high) == (pytest.approx(-other_high), pytest.approx(-other_low))
        assert low <= (second - first) / max(sum(counts), 1) <= high


@pytest.mark.parametrize("chances", [(0.6, 0.05, 0.25, 0.1), (0.85, 0.05, 0.05, 0.05), (0.3, 0.2, 0.2, 0.3), (0.0, 0.0, 0.4, 0.6)])
def test_a_paired_interval_holds_the_truth_as_often_as_it_says(chances: tuple[float, ...]) -> None:
    """Over every outcome of 16 cases with its probability, at these chances of both, first alone, second alone, neither."""
    num, truth, held = 16, chances[2] - chances[1], 0.0
    for a, b, c in itertools.product(range(num + 1), repeat=3):
        d = num - a - b - c
        if d < 0:
            continue
        ways = math.factorial(num) // math.prod(map(math.factorial, (a, b, c, d)))
        chance = ways * math.prod(p**count for p, count in zip(chances, (a, b, c, d), strict=True))
        low, high = paired_shares(a, b, c, d)
        held += chance if low - 1e-12 <= truth <= high + 1e-12 else 0.0
    assert 0.92 < held <= 1.0


def test_the_smallest_difference_shows_four_times_out_of_five() -> None:
    """A true difference of that size, measured with this error: how often does its interval leave out zero?"""
    error = 0.03
    found = smallest_shown(-1.959964 * error, 1.959964 * error)
    assert found is not None
    far = NormalDist(found, error)
    assert 1 - far.cdf(1.959964 * error) + far.cdf(-1.959964 * error) == pytest.approx(0.8, abs=1e-4)
    assert smallest_shown(None, 0.2) is None
    assert smallest_shown(math.nan, 0.2) is None
