"""Verdicts, claims, counted operations: `orpo.compare` without training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orpo.compare.data import first_by_prompt
from orpo.compare.measure import Cost, FlopCounter, count_step
from orpo.compare.methods import stage_rows
from orpo.compare.results import Scored, compare_methods, judge_claims, moved_right, sweep_table
from orpo.data.types import TokenGroup, Where
from orpo.training.steps import StepDataset, StepSampler
from randomgroups import random_groups

LABELS = {"one": "One", "two": "Two"}


def _groups(number: int) -> list[TokenGroup]:
    ids = np.arange(3, 8, dtype=np.int32)
    return [TokenGroup(np.array([row], np.int32), (ids[:4], ids[:2]), ((0, 1),), (True, True), Where("d", row)) for row in range(number)]


def _scores(margin: np.ndarray) -> list[np.ndarray]:
    return [np.array([-1.0, -1.0 - value]) for value in margin]


def _verdict(one: list[np.ndarray], two: list[np.ndarray], metric: str = "margin") -> dict[str, Any]:
    groups = _groups(len(one[0]))
    start = _scores(np.zeros(len(groups)))
    scored = {name: Scored(groups, start, [_scores(margin) for margin in seeds]) for name, seeds in (("one", one), ("two", two))}
    return next(item for item in compare_methods("one", "two", scored, LABELS) if item["metric"] == metric)


def test_a_clear_difference_is_told_with_its_sign() -> None:
    chance = np.random.default_rng(0)
    low = chance.normal(0.0, 0.5, 60)
    verdict = _verdict([low + 0.5, low + 0.4], [low, low])
    assert verdict["is_clear"]
    assert verdict["difference"]["value"] == pytest.approx(0.45)
    assert verdict["text"].startswith("margin: One is 0.450 nats per token higher than Two")
    assert not _verdict([low], [low])["is_clear"]


def test_seeds_that_disagree_decide_nothing() -> None:
    """One seed far ahead and one a little behind: the mean's interval is clear of zero, the verdict is not."""
    base = np.random.default_rng(1).normal(0.0, 0.1, 60)
    verdict = _verdict([base + 1.0, base - 0.01], [base, base])
    assert verdict["difference"]["low"] > 0
    assert not verdict["is_clear"]
    assert "cannot be told apart" in verdict["text"]
    assert "so many pairs and seeds would have shown a difference of" in verdict["text"]


def test_an_interval_over_zero_decides_nothing() -> None:
    noise = np.random.default_rng(2).normal(0.02, 1.0, 30)
    verdict = _verdict([noise], [np.zeros(30)])
    assert verdict["difference"]["low"] < 0 < verdict["difference"]["high"]
    assert not verdict["is_clear"]


def test_implicit_reward_is_that_of_dpo() -> None:
    """By hand: chosen rises by 0.1 over 4 tokens, rejected by 0.15 over 2: 0.4 against 0.3."""
    groups = _groups(1)
    right, _ = moved_right(groups, [np.array([-1.0, -1.0])], [np.array([-0.9, -0.85])])
    assert right == [1.0]
    wrong, _ = moved_right(groups, [np.array([-1.0, -1.0])], [np.array([-0.9, -0.75])])
    assert wrong == [0.0]


def _estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("chosen", "rejected", "holds"),
    [
        (_estimate(0.3, 0.2, 0.4), _estimate(0.1, 0.05, 0.2), True),
        (_estimate(0.3, 0.2, 0.4), _estimate(0.1, -0.05, 0.2), None),
        (_estimate(0.3, 0.2, 0.4), _estimate(-0.1, -0.2, -0.05), False),
    ],
)
def test_the_claim_about_sft(chosen: dict[str, float], rejected: dict[str, float], holds: bool | None) -> None:
    method = {"change": {"chosen_logp": chosen, "rejected_logp": rejected}}
    (claim,) = judge_claims({"sft": method}, [])
    assert claim["holds"] is holds


def test_cost_claims_are_ratios_of_what_was_counted() -> None:
    def method(*stages: dict[str, float]) -> dict[str, Any]:
        totals = {name: sum(stage[name] for stage in stages) for name in stages[0]}
        return {"runs": [{"stages": list(stages), "totals": {**totals, "peak_bytes": max(stage["peak_bytes"] for stage in stages)}}]}

    def cost(forward: int, flops: float) -> dict[str, float]:
        return {"forward_passes": forward, "flops": flops, "train_s": flops, "peak_bytes": 100}

    methods = {"orpo": method(cost(200, 10.0)), "sft+dpo": method(cost(100, 5.0), cost(400, 12.0))}
    claims = {claim["claim"]: claim for claim in judge_claims(methods, [])}
    assert claims["ORPO halves the forward passes of DPO"]["holds"] is True
    assert claims["ORPO needs less computation than SFT + DPO"]["evidence"].startswith("0.59 times")
    assert claims["ORPO needs less memory than SFT + DPO"]["holds"] is None


@pytest.mark.parametrize(("low", "high", "holds"), [(20.0, 24.0, True), (29.0, 34.0, None), (41.0, 50.0, False)])
def test_general_language_is_judged_where_it_was_measured(low: float, high: float, holds: bool | None) -> None:
    def method(value: float, low: float, high: float) -> dict[str, Any]:
        retention = {"result": {"model": {"perplexity": {"value": value, "low": low, "high": high}}}}
        costs = {"forward_passes": 1, "flops": 1.0, "train_s": 1.0, "peak_bytes": 1}
        return {"runs": [{"stages": [costs], "totals": costs, "evaluations": {"retention": retention}}]}

    methods = {"orpo": method((low + high) / 2, low, high), "sft+dpo": method(35.0, 30.0, 40.0)}
    (claim,) = (one for one in judge_claims(methods, []) if "language" in one["claim"])
    assert claim["holds"] is holds
    assert f"({low:.1f} to {high:.1f}) against 35.0 (30.0 to 40.0)" in claim["evidence"]


def test_a_sweep_needs_two_of_each() -> None:
    trials = [
        {"options": {"learning_rate": rate, "beta": beta}, "validation": {"margin": {"value": rate * beta}, "accuracy": {"value": 0.5}}}
        for rate in (1.0, 2.0)
        for beta in (3.0, 5.0)
    ]
    table = sweep_table(trials, "beta")
    assert table is not None
    assert table["margin"] == [[3.0, 5.0], [6.0, 10.0]]
    assert sweep_table(trials[:2], "beta") is None


def test_counted_operations_are_torchs_own(tiny_model_factory: Any) -> None:
    model = tiny_model_factory("llama")
    ids = torch.arange(3, 35)[None]

    def step() -> None:
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        step()
    with FlopCounter() as ours:
        step()
    assert ours.total == theirs.get_total_flops() > 0
    with FlopCounter() as in_place:
        torch.zeros(4, 8).addmm_(torch.ones(4, 3), torch.ones(3, 8))
    assert in_place.total == 2 * 4 * 3 * 8


def test_sft_is_not_made_to_pay_for_rejected_answers() -> None:
    groups = random_groups(6, seed=0)
    rows = stage_rows("sft", groups)
    for group, row in zip(groups, rows, strict=True):
        if len(group.pairs) == 1:
            assert [ids.tolist() for ids in row.response_ids] == [group.response_ids[group.pairs[0][0]].tolist()]
            assert row.pairs == ()
    assert stage_rows("orpo", groups) == groups


def test_a_sample_moves_by_one_row_at_most() -> None:
    groups = _groups(50)
    picked = first_by_prompt(groups, 20)
    fewer = first_by_prompt(groups[1:], 20)
    assert len(picked) == 20
    assert [group.where.row for group in picked] == sorted(group.where.row for group in picked)
    assert len({group.where.row for group in picked} - {group.where.row for group in fewer}) <= 1


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_row_that_fills_an_empty_place_is_no_pair(num_ranks: int) -> None:
    """Five rows in steps of three leave ranks without a row; what they compute instead is counted as work and as no pair."""
    groups, costs = _groups(5), []
    rows = StepDataset(groups, world_size=num_ranks)
    for rank in range(num_ranks):
        sampler = StepSampler(groups, rows_per_step=3, max_rows=1, max_tokens=100, rank=rank, world_size=num_ranks)
        costs.append(Cost())
        for step in sampler:
            for plan in step:
                count_step(costs[-1], rows[plan], flops=1)
    assert sum(cost.num_pairs for cost in costs) == 5
    assert all(cost.num_steps == 2 and cost.forward_tokens > 0 for cost in costs)
    assert sum(cost.forward_passes for cost in costs) > 2 * 5, "a filler is computed"
