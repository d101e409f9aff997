"""Logged numbers: exact means over rows and tokens, whatever micro-batches, steps and ranks they came from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo.engine.layout import collate
from orpo.objective import METRICS, ORPO, evaluate
from orpo.system.ranks import all_reduce_sum
from orpo.training import metrics
from orpo.training.metrics import MetricSums, means
from orpo.training.steps import without_weight
from randomgroups import group, random_groups

CPU = torch.device("cpu")
ALPHA = 0.5


def identity(values: torch.Tensor) -> torch.Tensor:
    return values


def totals(**values: float) -> dict[str, float]:
    return {**dict.fromkeys(METRICS, 0.0), **values}


def test_names_and_values_by_hand() -> None:
    """Two pairs: log-probabilities -1 over -2 and -3 over -1; log odds ratios as given; 8 counted tokens with NLL 20 in all."""
    found = means(
        totals(
            num_nll_tokens=8, nll_sum=20, num_pairs=2, chosen_logp_sum=-4, rejected_logp_sum=-3, accuracy_sum=1,
            log_odds_ratio_sum=-1.0, log_sigmoid_sum=-2.5, nll_grad_square=9, preference_grad_square=1,
        ),
        reward_scale=ALPHA,
    )  # fmt: skip
    assert found == pytest.approx(
        {
            "nll_loss": 2.5,
            "rewards/chosen": -1.0,
            "rewards/rejected": -0.75,
            "rewards/accuracies": 0.5,
            "rewards/margins": -0.25,
            "logps/chosen": -2.0,
            "logps/rejected": -1.5,
            # TRL's names, which say less than they seem to: the mean of log sigmoid(log OR), and the mean of log OR.
            "log_odds_ratio": -1.25,
            "log_odds_chosen": -0.5,
            "grad_share/odds_ratio": 0.25,
        }
    )


def test_without_pairs_or_tokens_nothing_is_made_up() -> None:
    assert means(totals(num_nll_tokens=4, nll_sum=2, nll_grad_square=1), reward_scale=ALPHA) == {"nll_loss": 0.5}
    assert "nll_loss" not in means(totals(num_pairs=1, chosen_logp_sum=-1), reward_scale=ALPHA)
    assert means(totals(), reward_scale=ALPHA) == {}


def test_zero_gradient_has_no_share() -> None:
    assert "grad_share/odds_ratio" not in means(totals(num_pairs=1), reward_scale=ALPHA)


@given(cuts=st.lists(st.integers(1, 9), max_size=4), seed=st.integers(0, 1000))
def test_means_do_not_depend_on_how_rows_are_cut(cuts: list[int], seed: int) -> None:
    """TRL logs the unweighted mean of micro-batches, so that a short last one counts as much as a full one."""
    groups = random_groups(10, seed=seed, kinds=("pair", "four", "sft"))
    table = -4 * torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bounds = sorted({0, *cuts, 10})
    sums, whole = MetricSums(CPU), collate(groups)
    loss = torch.zeros((), dtype=torch.float64)
    for start, end in itertools.pairwise(bounds):
        batch = collate(groups[start:end]).with_normalisers(whole.index.num_nll_tokens, whole.index.num_pairs)
        found = evaluate(ORPO(ALPHA), table[batch.target_N], batch.index)
        sums.add(found.sums, num_tokens=batch.num_tokens)
        loss += found.loss
    sums.end_step(loss, 10)
    logs = sums.take(reward_scale=ALPHA, reduce=identity)
    expected = evaluate(ORPO(ALPHA), table[whole.target_N], whole.index)
    assert logs.pop("loss") == pytest.approx(expected.loss.item())
    assert logs == pytest.approx(means(dict(zip(METRICS, expected.sums.tolist(), strict=True)), reward_scale=ALPHA))


def test_loss_is_the_mean_of_steps_and_the_rest_the_mean_of_rows() -> None:
    """Two steps: one pair with accuracy 1, then three pairs with accuracy 0. Losses 1 and 3."""
    sums = MetricSums(CPU)
    for num_pairs, accuracy, loss in ((1, 1, 1.0), (3, 0, 3.0)):
        values = totals(num_pairs=num_pairs, accuracy_sum=accuracy)
        sums.add(torch.tensor([values[name] for name in METRICS]), num_tokens=1)
        sums.end_step(torch.tensor(loss), num_pairs)
    logs = sums.take(reward_scale=ALPHA, reduce=identity)
    assert logs["loss"] == 2.0
    assert logs["rewards/accuracies"] == 0.25


def test_a_log_starts_anew_and_an_empty_one_says_nothing() -> None:
    sums = MetricSums(CPU)
    assert sums.take(reward_scale=ALPHA, reduce=identity) == {}
    sums.add(torch.ones(len(METRICS)), num_tokens=5)
    sums.end_step(torch.tensor(1.0), 1)
    assert sums.take(reward_scale=ALPHA, reduce=identity)["loss"] == 1.0
    assert sums.take(reward_scale=ALPHA, reduce=identity) == {}


def test_two_ranks_are_reduced_once_and_count_as_one() -> None:
    """Each rank has its part of every step, times two for the mean over ranks; the second rank is played by doubling."""
    calls = 0

    def reduce(values: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return 2 * values

    sums = MetricSums(CPU, world_size=2)
    values = totals(num_pairs=2, accuracy_sum=1, num_nll_tokens=4, nll_sum=6)
    for _ in range(3):
        sums.add(torch.tensor([values[name] for name in METRICS]), num_tokens=10)
        sums.end_step(torch.tensor(1.5), 4)
    logs = sums.take(reward_scale=ALPHA, reduce=reduce)
    assert calls == 1
    assert logs["loss"] == 1.5
    assert logs["rewards/accuracies"] == 0.5
    assert logs["nll_loss"] == 1.5


def test_throughput_counts_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and saving between two steps do not slow the training down."""
    clock = iter([10.0, 12.0, 1000.0, 1002.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    sums = MetricSums(CPU)
    values = totals(num_pairs=3)
    for _ in range(2):
        sums.start()
        sums.add(torch.tensor([values[name] for name in METRICS]), num_tokens=40)
        sums.end_step(torch.tensor(1.0), 3)
        sums.stop()
    sums.stop()  # a second stop is none
    logs = sums.take(reward_scale=ALPHA, reduce=identity)
    assert logs["tokens_per_second"] == 80 / 4
    assert logs["pairs_per_second"] == 6 / 4
    assert sums.busy_s == 0.0


def test_state_goes_through_json_bit_by_bit() -> None:
    import json

    sums, other = MetricSums(CPU), MetricSums(CPU)
    sums.add(torch.rand(len(METRICS), dtype=torch.float64) / 3, num_tokens=7)
    sums.end_step(torch.tensor(math.pi), 2)
    other.restore([json.loads(json.dumps(sums.state()))])
    assert torch.equal(sums.values, other.values)
    assert sums.busy_s == other.busy_s


def test_float64_sums_lose_nothing_over_a_long_log() -> None:
    sums = MetricSums(CPU)
    ones = torch.full((len(METRICS),), 0.1, dtype=torch.float32)
    for _ in range(10_000):
        sums.add(ones, num_tokens=1)
        sums.end_step(torch.tensor(1.0), 1)
    assert sums.values[0].item() == pytest.approx(10_000 * float(torch.tensor(0.1)), rel=1e-12)


def test_a_filler_changes_no_mean() -> None:
    sums = MetricSums(CPU)
    for batch in (collate([group([1], [2, 3], [4])]), without_weight(collate([group([5], [6], [7])]))):
        found = evaluate(ORPO(ALPHA), -torch.ones(len(batch.target_N)), batch.index)
        sums.add(found.sums, num_tokens=batch.num_tokens)
    sums.end_step(torch.tensor(1.0), 1)
    logs = sums.take(reward_scale=ALPHA, reduce=identity)
    assert logs["logps/chosen"] == logs["logps/rejected"] == -1.0
    assert logs["nll_loss"] == 1.0


def test_one_process_needs_no_reduction() -> None:
    values = torch.arange(3.0)
    assert all_reduce_sum(values) is values
