"""Pairs from scored answers: what every choice keeps to, whatever the scores, and what each way means."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo.errors import UserError
from orpo.onpolicy.choice import LEFT_OUT, WAYS, PairRule, Rated, choose_pairs_of, similarity

TEXTS = st.sampled_from(["", " ", "one", "one ", "two words", "three words here", "a much longer answer than all of the others", "42"])
ANSWERS = st.lists(st.builds(Rated, TEXTS, st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0, -3.0]), st.booleans()), max_size=8)
RULES = st.builds(
    PairRule,
    choose=st.sampled_from(WAYS),
    min_margin=st.sampled_from([0.0, 0.5, 2.0]),
    max_pairs=st.integers(1, 5),
    max_length_ratio=st.none() | st.sampled_from([1.0, 2.0]),
    right_at=st.sampled_from([0.0, 1.0]),
    cut=st.sampled_from(["rejected", "drop", "keep"]),
)


@given(ANSWERS, RULES)
def test_every_pair_keeps_to_the_rule_and_the_rest_is_counted(answers: list[Rated], rule: PairRule) -> None:
    pairs, left_out = choose_pairs_of(answers, rule)
    assert len(pairs) <= rule.max_pairs
    assert len(set(pairs)) == len(pairs)
    for chosen, rejected in ((answers[a], answers[b]) for a, b in pairs):
        assert chosen.text.strip()
        assert rejected.text.strip()
        assert chosen.text.strip() != rejected.text.strip()
        assert chosen.score is not None
        assert rejected.score is not None
        assert chosen.score > rejected.score
        assert chosen.score - rejected.score >= rule.min_margin
        assert rule.cut == "keep" or not chosen.is_cut
        assert rule.cut != "drop" or not rejected.is_cut
        assert rule.choose != "right_wrong" or chosen.score >= rule.right_at > rejected.score
    assert set(left_out) <= set(LEFT_OUT)
    assert pairs or left_out, "no pair and no reason"


def scored(*scores: float) -> list[Rated]:
    return [Rated(f"answer number {number} {'x' * number}", score) for number, score in enumerate(scores)]


def test_the_ways() -> None:
    answers = scored(0.0, 5.0, 1.0, 4.0)
    assert choose_pairs_of(answers, PairRule())[0] == [(1, 0)]
    assert choose_pairs_of(answers, PairRule(max_pairs=9))[0] == [(1, 0), (3, 2)]
    assert len(choose_pairs_of(answers, PairRule("all", max_pairs=9))[0]) == 6
    assert choose_pairs_of(answers, PairRule("right_wrong", right_at=4.0, max_pairs=2))[0] == [(3, 2), (1, 0)]


def test_the_low_answer_is_not_the_worst_where_samples_are_many() -> None:
    scores = [10.0, *[5.0 + n / 10 for n in range(20)], 2.0, -30.0]
    (chosen, rejected), *_ = choose_pairs_of(scored(*scores), PairRule("best_low"))[0]
    assert scores[chosen] == 10.0
    mean = sum(scores) / len(scores)
    low = mean - 2 * (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    assert scores[rejected] == min(scores[1:], key=lambda score: abs(score - low)) == 2.0 != min(scores)


def test_right_and_wrong_of_one_length_meet() -> None:
    answers = [Rated("right " * 9, 1.0), Rated("good", 1.0), Rated("wrong " * 9, 0.0), Rated("evil", 0.0)]
    assert choose_pairs_of(answers, PairRule("right_wrong", max_pairs=2))[0] in ([(0, 2), (1, 3)], [(1, 3), (0, 2)])


@pytest.mark.parametrize(
    ("answers", "rule", "reason"),
    [
        ([], {}, "one_answer"),
        ([Rated("one", 1.0)], {}, "one_answer"),
        ([Rated("one", 1.0), Rated("two", 1.0)], {}, "tie"),
        ([Rated("one", 1.0), Rated("two", None)], {}, "no_score"),
        ([Rated("one", 1.0), Rated("one\n", 0.0)], {}, "identical_answer"),
        ([Rated("one", 1.0, True), Rated("two", 0.0, True)], {}, "only_cut"),
        ([Rated("one", 0.0), Rated("two", 0.5)], {"choose": "right_wrong"}, "no_right"),
        ([Rated("one", 1.0), Rated("two", 1.0)], {"choose": "right_wrong"}, "no_wrong"),
        ([Rated("one", 1.0), Rated("two", 0.9)], {"min_margin": 0.5}, "margin"),
        ([Rated("one", 1.0), Rated("two" * 9, 0.0)], {"max_length_ratio": 2.0}, "lengths"),
        ([Rated("a b c d e f g", 1.0), Rated("a b c d e f h", 0.0)], {"max_similarity": 0.8}, "near_identical"),
        ([Rated("one", 1.0), Rated("two", 0.5), Rated("six", 0.0)], {"choose": "all"}, "over_max_pairs"),
    ],
)
def test_reasons(answers: list[Rated], rule: dict[str, Any], reason: str) -> None:
    assert choose_pairs_of(answers, PairRule(**rule))[1][reason]


def test_line_ends_are_words() -> None:
    assert similarity("1. a\n2. b", "1. a 2. b") < 1
    assert similarity("a b", "a b") == 1


@pytest.mark.parametrize("values", [{"choose": "best"}, {"min_margin": -1}, {"max_pairs": 0}, {"max_length_ratio": 0.5}, {"cut": "no"}])
def test_values_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        PairRule(**values).check()
