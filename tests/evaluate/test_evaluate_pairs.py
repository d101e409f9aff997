"""Scores by the engine against plain forwards, and the statistics over them against hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orpo.data.types import TokenGroup, Where
from orpo.errors import UserError
from orpo.evaluate.bootstrap import estimate_mean, estimate_means, estimate_share
from orpo.evaluate.pairs import LENGTH_SLICE, log_odds, paired_difference, slice_pairs, summarise
from orpo.inference.scores import score_groups, score_tokens


def make_groups(count: int, *, seed: int = 0, vocab: int = 128, num_responses: int = 2) -> list[TokenGroup]:
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(3, vocab, size=generator.integers(low, high)).astype(np.int32)

    return [
        TokenGroup(
            prompt_ids=ids(1, 20),
            response_ids=tuple(ids(1, 12) for _ in range(num_responses)),
            pairs=tuple((0, other) for other in range(1, num_responses)),
            is_ended=(True,) * num_responses,
            where=Where("made", row),
            columns={"scenario": "even" if row % 2 == 0 else "odd", "rank": row},
        )
        for row in range(count)
    ]


def plain_token_logps(model: torch.nn.Module, group: TokenGroup) -> list[np.ndarray]:
    """One unpadded forward per answer: the oracle."""
    found = []
    for ids in group.response_ids:
        sequence = torch.from_numpy(np.concatenate([group.prompt_ids, ids]).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(input_ids=sequence).logits[0].double().log_softmax(-1)
        rows = torch.arange(len(group.prompt_ids) - 1, sequence.shape[1] - 1)
        found.append(logps[rows, sequence[0, len(group.prompt_ids) :]].numpy())
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("nll_scope", ["sequence", "response"])
def test_scores_equal_plain_forwards(tiny_model_factory, architecture, nll_scope):
    model, groups = tiny_model_factory(architecture), make_groups(7, num_responses=3)
    tokens = score_tokens(model, groups, nll_scope=nll_scope, max_tokens=60)
    means = score_groups(model, groups, nll_scope=nll_scope, max_tokens=60)
    for group, found, mean_R in zip(groups, tokens, means, strict=True):
        for expected, logps, mean in zip(plain_token_logps(model, group), found, mean_R, strict=True):
            np.testing.assert_allclose(logps, expected, atol=2e-5)
            assert mean == pytest.approx(expected.mean(), abs=2e-5)
    assert means[0].shape == (3,)
    assert means[0].dtype == np.float64


def test_scores_do_not_depend_on_the_cut(tiny_model_factory):
    model, groups = tiny_model_factory(), make_groups(9)
    whole = np.concatenate(score_groups(model, groups, max_tokens=10**6))
    single = np.concatenate(score_groups(model, groups, max_tokens=1))
    alone = np.concatenate([score_groups(model, [group])[0] for group in groups])
    np.testing.assert_allclose(single, whole, atol=1e-5)
    np.testing.assert_allclose(alone, whole, atol=1e-5)


def test_scoring_falls_back_to_padded_where_sharing_does_not_hold(tiny_model_factory, caplog):
    model, groups = tiny_model_factory("mamba"), make_groups(3)
    scores = score_groups(model, groups)
    assert "falls back to the padded engine" in caplog.text
    for group, score_R in zip(groups, scores, strict=True):
        np.testing.assert_allclose(score_R, [logps.mean() for logps in plain_token_logps(model, group)], atol=1e-4)


def test_the_model_comes_back_as_it_was(tiny_model_factory):
    model = tiny_model_factory().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    attention = model.config._attn_implementation
    seen = []
    score_groups(model, make_groups(4), compute_dtype=torch.bfloat16, progress=lambda done, total: seen.append((done, total)))
    assert model.training
    assert model.config._attn_implementation == attention
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "lm_head.weight")
        assert torch.equal(parameter, before[name])
    assert seen[-1] == (4, 4)


def test_bf16_scores_are_near_the_exact_ones(tiny_model_factory):
    model, groups = tiny_model_factory(initializer_range=0.05), make_groups(6)
    exact, coarse = (np.concatenate(score_groups(model, groups, compute_dtype=dtype)) for dtype in (None, torch.bfloat16))
    assert 0 < np.abs(exact - coarse).max() < 0.03


def test_summary_of_known_numbers():
    groups = make_groups(4)
    scores = [np.array([-1.0, -2.0]), np.array([-1.0, -1.0]), np.array([-3.0, -1.0]), np.array([0.0, -0.5])]
    found = summarise(groups, scores)
    assert (found.num_pairs, found.num_prompts) == (4, 4)
    assert found.accuracy.value == 0.5  # the tie is a miss
    assert found.margin.value == pytest.approx((1 + 0 - 2 + 0.5) / 4)
    assert found.chosen_logp.value == pytest.approx(-1.25)
    assert found.rejected_logp.value == pytest.approx(-1.125)
    expected = [math.log(p / (1 - p)) for p in map(math.exp, (-1, -2, -1, -1, -3, -1))]
    sure = -1e-12 - math.log(-math.expm1(-1e-12))
    half = -0.5 - math.log(-math.expm1(-0.5))
    ratio = (expected[0] - expected[1] + expected[2] - expected[3] + expected[4] - expected[5] + sure - half) / 4
    assert found.log_odds_ratio.value == pytest.approx(ratio)
    assert found.accuracy.low <= 0.5 <= found.accuracy.high
    assert found.to_dict()["margin"].keys() == {"value", "low", "high"}


def test_log_odds_are_those_of_training():
    from orpo.objective import log_odds as trained

    values = np.array([0.0, -1e-12, -1e-8, -0.69, -50.0, -1e4])
    np.testing.assert_allclose(log_odds(values), trained(torch.from_numpy(values)).numpy(), rtol=1e-12)


def test_pairs_of_one_prompt_are_drawn_together():
    values = np.repeat([0.0, 1.0], 500)
    alone = estimate_mean(values)
    together = estimate_mean(values, [0] * 500 + [1] * 500)
    assert alone.high - alone.low < 0.1
    assert (together.low, together.high) == (0.0, 1.0)
    single = estimate_mean([1.0, 2.0], ["same", "same"])
    assert single.value == 1.5
    assert single.to_dict() == {"value": 1.5, "low": None, "high": None}


def test_intervals_cover_the_mean_they_estimate():
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        found = estimate_means(generator.normal(1.0, 2.0, size=(40, 1)), range(40), seed=trial, num_bootstrap=300)[0]
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.985  # 95 % asked for; the percentile bootstrap of 40 values is a little narrow


def test_intervals_are_a_function_of_data_and_seed():
    values, clusters = np.random.default_rng(0).normal(size=(30, 2)), [f"prompt {row % 11}" for row in range(30)]
    first, again = (estimate_means(values, clusters, seed=5) for _ in range(2))
    assert first == again
    assert first != estimate_means(values, clusters, seed=6)


def test_paired_difference_sees_a_small_common_shift_in_noisy_pairs():
    generator = np.random.default_rng(1)
    groups = make_groups(60)
    before = [generator.normal(-3, 1, size=2) for _ in groups]
    after = [score + np.array([0.05, -0.05]) + generator.normal(0, 0.01, size=2) for score in before]
    found = paired_difference(groups, before, after)
    assert found.margin.value == pytest.approx(0.1, abs=0.01)
    assert found.margin.low > 0.08
    assert found.chosen_logp.excludes_zero
    unpaired = summarise(groups, after).margin
    assert unpaired.high - unpaired.low > 10 * (found.margin.high - found.margin.low)
    same = paired_difference(groups, before, before)
    assert (same.margin.low, same.margin.high) == (0, 0)
    assert not same.margin.excludes_zero


def test_slices_part_the_pairs():
    groups = make_groups(40)
    scores = [np.array([-1.0, -2.0]) if row % 2 == 0 else np.array([-2.0, -1.0]) for row in range(40)]
    found = slice_pairs(groups, scores, "scenario")
    assert {label: part.accuracy.value for label, part in found.items()} == {"even": 1.0, "odd": 0.0}
    by_length = slice_pairs(groups, scores, LENGTH_SLICE)
    assert set(by_length) == {"chosen longer", "chosen shorter", "about equal"}
    assert sum(part.num_pairs for part in by_length.values()) == 40
    quarters = slice_pairs(groups, scores, "rank")
    assert [part.num_pairs for part in quarters.values()] == [10, 10, 10, 10]


def test_length_slices_take_each_pair_by_itself():
    def ids(count: int) -> np.ndarray:
        return np.arange(3, 3 + count, dtype=np.int32)

    group = TokenGroup(ids(4), (ids(8), ids(2), ids(10), ids(20)), ((0, 1), (0, 2), (0, 3)), (True,) * 4, Where("made", 0))
    found = slice_pairs([group], [np.array([-1.0, -2.0, -2.0, -0.5])], LENGTH_SLICE)
    assert {label: (part.num_pairs, part.accuracy.value) for label, part in found.items()} == {
        "chosen longer": (1, 1.0),
        "about equal": (1, 1.0),
        "chosen shorter": (1, 0.0),
    }


def test_unknown_slices_and_empty_data_say_what_there_is():
    groups = make_groups(2)
    with pytest.raises(UserError, match="rank, scenario"):
        slice_pairs(groups, [np.zeros(2)] * 2, "topic")
    with pytest.raises(UserError, match="no pair"):
        summarise([], [])


def test_few_pairs_claim_no_certainty():
    """Seven right out of seven: Wilson's interval, and a change that so few could not have told."""
    groups = make_groups(7)
    right = [np.array([-1.0, -2.0])] * 7
    found = summarise(groups, right)
    assert (found.accuracy.value, round(found.accuracy.low, 3), found.accuracy.high) == (1.0, 0.646, 1.0)
    change = paired_difference(groups, right, right).accuracy
    assert change.value == 0
    assert change.low == pytest.approx(-change.high)
    assert change.high > 0.3
    assert change.smallest_shown == pytest.approx(1.43 * change.high, abs=1e-2)


def test_pairs_of_one_prompt_are_no_independent_witnesses():
    """The same seven verdicts under each of two prompts, then under one prompt for each."""
    groups = make_groups(8, num_responses=3)
    scores = [np.array([-1.0, -2.0, -0.5 if row % 2 else -3.0]) for row in range(8)]
    clustered = summarise(groups, scores).accuracy
    one_each = estimate_share([1.0, 1.0, 0.0, 1.0] * 4)
    assert clustered.value == one_each.value == 0.75
    assert (clustered.low, clustered.high) != (one_each.low, one_each.high)
    same = [np.array([-1.0, -2.0, -3.0])] * 8
    assert summarise(groups, same).accuracy.low == pytest.approx(estimate_share([1.0] * 8).low)  # eight prompts, not sixteen pairs
