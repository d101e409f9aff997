"""The equations against arithmetic by hand, against mpmath, and at the edges where the field's implementations give NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from orpo.engine.layout import collate
from orpo.objective import (
    DPO,
    MAX_LOGP,
    METRICS,
    ORPO,
    SFT,
    Objective,
    ObjectiveValue,
    ResponseIndex,
    SimPO,
    evaluate,
    log_odds,
    log_odds_ratio,
    mean_logp,
    nll_term,
    sum_logp,
)
from orpo.training.steps import without_weight
from randomgroups import as_pairs, group, random_groups

FAULT_VALUES = (0.0, -1e-12, -1e-8, -1e-7, -0.69, -50.0, -1e4)
"""Log-probabilities where TRL 1.16's log-odds is not finite or has no finite gradient for most pairs."""


def floats(lowest: float) -> st.SearchStrategy[float]:
    """float32 values from `lowest` to 0; torch may flush subnormal ones to zero, so none are drawn."""
    return st.floats(lowest, 0.0, width=32, allow_subnormal=False)


LOGPS = st.one_of(st.sampled_from(FAULT_VALUES), floats(-(2.0**100)), floats(-30.0), floats(-(2.0**-10)))


def pair_index(num_chosen: int = 1, num_rejected: int = 1, *, num_prompt: int = 0, prompt_weight: float = 1.0) -> ResponseIndex:
    """One pair: prompt tokens, then the chosen answer's, then the rejected one's."""
    response_N = [-1] * num_prompt + [0] * num_chosen + [1] * num_rejected
    weight_N = [prompt_weight] * num_prompt + [1.0] * num_chosen + [0.0] * num_rejected
    return ResponseIndex(
        response_N=torch.tensor(response_N),
        nll_weight_N=torch.tensor(weight_N),
        num_tokens_R=torch.tensor([float(num_chosen), float(num_rejected)]),
        chosen_B=torch.tensor([0]),
        rejected_B=torch.tensor([1]),
        num_nll_tokens=sum(weight_N),
        num_pairs=1.0,
    )


def named(evaluation: ObjectiveValue) -> dict[str, float]:
    return dict(zip(METRICS, evaluation.sums.tolist(), strict=True))


# --- by hand ---------------------------------------------------------------------------------------------------------------------------


def test_the_papers_equations_on_four_tokens() -> None:
    """
    chosen answer:   two tokens with probabilities 1/2 and 1/8
    rejected answer: two tokens with probabilities 1/2 and 1/2

    Equation 3, length-normalised: P(chosen) = (1/2 * 1/8)^(1/2) = 1/4, P(rejected) = (1/2 * 1/2)^(1/2) = 1/2
    Equation 4: odds(chosen) = (1/4) / (3/4) = 1/3, odds(rejected) = (1/2) / (1/2) = 1
    Equation 5: OR = (1/3) / 1 = 1/3
    Equation 7: L_OR = -log sigmoid(log 1/3) = -log((1/3) / (1 + 1/3)) = -log 1/4 = log 4
    L_SFT: mean over the chosen tokens = (log 2 + log 8) / 2 = log 4
    Equation 6, lambda = 1/2: L = log 4 + 1/2 * log 4 = 3 log 2

    Derivatives: dL_OR / d log OR = sigmoid(log 1/3) - 1 = 1/4 - 1 = -3/4
                 d log odds / d log P = 1 / (1 - P): 4/3 for the chosen, 2 for the rejected
                 d log P / d log p(token) = 1/2 (mean over two tokens)
                 chosen token:   -1/2 (NLL) + 1/2 * -3/4 * 4/3 * 1/2 = -1/2 - 1/4 = -3/4
                 rejected token:              1/2 * +3/4 *  2  * 1/2 = 3/8
    """
    logp_N = torch.tensor([1 / 2, 1 / 8, 1 / 2, 1 / 2], dtype=torch.float64).log()
    found = evaluate(ORPO(orpo_alpha=0.5, orpo_beta=1.0), logp_N, pair_index(2, 2))
    assert found.loss.item() == pytest.approx(3 * math.log(2), rel=1e-12)
    assert found.grad_N.tolist() == pytest.approx([-3 / 4, -3 / 4, 3 / 8, 3 / 8], rel=1e-12)
    assert named(found) == pytest.approx(
        {
            "num_nll_tokens": 2,
            "nll_sum": 2 * math.log(4),
            "num_pairs": 1,
            "odds_ratio_loss_sum": math.log(4),
            "chosen_logp_sum": -math.log(4),
            "rejected_logp_sum": -math.log(2),
            "accuracy_sum": 0,
            "log_odds_ratio_sum": -math.log(3),
            "log_sigmoid_sum": -math.log(4),
            "nll_grad_square": 2 * 0.5**2,
            "preference_grad_square": 2 * 0.25**2 + 2 * 0.375**2,
            "chosen_tokens": 2,
            "rejected_tokens": 2,
        },
        rel=1e-12,
    )


def test_the_temperature_stands_inside_the_sigmoid() -> None:
    """orpo_beta = 2 on the same tokens: sigmoid(2 log 1/3) = (1/9) / (1 + 1/9) = 1/10, so L_OR = log 10, not 2 log 4 or log 4."""
    logp_N = torch.tensor([1 / 2, 1 / 8, 1 / 2, 1 / 2], dtype=torch.float64).log()
    found = evaluate(ORPO(orpo_alpha=0.5, orpo_beta=2.0), logp_N, pair_index(2, 2))
    assert found.loss.item() == pytest.approx(math.log(4) + 0.5 * math.log(10), rel=1e-12)
    # TRL's logged names stay those of the paper's form, whatever the temperature.
    assert named(found)["log_sigmoid_sum"] == pytest.approx(-math.log(4))


def test_the_next_token_loss_counts_prompt_and_chosen_tokens_alike() -> None:
    """A prompt token of probability 1/2 before them: (log 2 + log 2 + log 8) / 3 = 5 log 2 / 3. Rejected tokens never count."""
    logp_N = torch.tensor([1 / 2, 1 / 2, 1 / 8, 1 / 2, 1 / 2], dtype=torch.float64).log()
    found = evaluate(SFT(), logp_N, pair_index(2, 2, num_prompt=1))
    assert found.loss.item() == pytest.approx(5 * math.log(2) / 3, rel=1e-12)
    assert found.grad_N.tolist() == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 0, 0])


def test_dpo_by_hand() -> None:
    """Equation 7 of DPO: log-ratios to the reference are log 1/16 - log 1/4 = -log 4 and log 1/4 - log 1/8 = log 2, their difference
    -log 8; with beta = 1/3, sigmoid(-log 2) = 1/3, so the loss is log 3. It has no next-token term."""
    logp_N = torch.tensor([1 / 2, 1 / 8, 1 / 2, 1 / 2], dtype=torch.float64).log()
    index = replace(pair_index(2, 2), reference_logp_sum_R=torch.tensor([1 / 4, 1 / 8], dtype=torch.float64).log())
    found = evaluate(DPO(beta=1 / 3), logp_N, index)
    assert found.loss.item() == pytest.approx(math.log(3), rel=1e-12)
    # d loss / d margin = -beta * (1 - 1/3); summed, not averaged, over an answer's tokens
    assert found.grad_N.tolist() == pytest.approx([-2 / 9, -2 / 9, 2 / 9, 2 / 9], rel=1e-12)


def test_dpo_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        evaluate(DPO(), torch.zeros(2), pair_index())


def test_simpo_by_hand() -> None:
    """Equation 6 of SimPO: 2 * (log 1/4 - log 1/2) - gamma = -log 4 - gamma; with gamma = log 2, sigmoid(-log 8) = 1/9: log 9."""
    logp_N = torch.tensor([1 / 2, 1 / 8, 1 / 2, 1 / 2], dtype=torch.float64).log()
    found = evaluate(SimPO(beta=2.0, gamma=math.log(2)), logp_N, pair_index(2, 2))
    assert found.loss.item() == pytest.approx(math.log(9), rel=1e-12)
    # -beta * (1 - 1/9) * 1/2 for each chosen token
    assert found.grad_N.tolist() == pytest.approx([-8 / 9, -8 / 9, 8 / 9, 8 / 9], rel=1e-12)


# --- log-odds --------------------------------------------------------------------------------------------------------------------------


def exact_log_odds(logp: float) -> tuple[float, float]:
    """Value and derivative with fifty digits; the derivative above the clamp is 0 by definition."""
    with mpmath.workdps(50):
        clamped = mpmath.mpf(min(logp, float(np.float32(MAX_LOGP))))
        value = clamped - mpmath.log(-mpmath.expm1(clamped))
        slope = -1 / mpmath.expm1(clamped) if logp == clamped else mpmath.mpf(0)
        return float(value), float(slope)


@given(LOGPS)
@example(0.0)
@example(-1e-12)
@example(-1e-8)
@example(-1e-10)
@example(-1e30)
def test_log_odds_and_its_slope_equal_mpmath(logp: float) -> None:
    leaf = torch.tensor(logp, dtype=torch.float32, requires_grad=True)
    value = log_odds(leaf)
    value.backward()
    expected, slope = exact_log_odds(leaf.item())
    assert value.item() == pytest.approx(expected, rel=3e-6, abs=3e-6)
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(slope, rel=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    logp = torch.tensor([-0.5, -1e-3, 0.0, -20.0], dtype=dtype)
    assert log_odds(logp).dtype == torch.float32
    torch.testing.assert_close(log_odds(logp), log_odds(logp.float()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_objective_of_half_precision_values_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Of the same values, so that the only loss of precision is that of the values themselves."""
    logp_N, index = random_tokens(3)
    logp_N = logp_N.to(dtype)
    found, expected = evaluate(ORPO(1.0), logp_N, index), evaluate(ORPO(1.0), logp_N.float(), index)
    assert found.loss.dtype == found.grad_N.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.grad_N, expected.grad_N)


def test_float64_stays_float64() -> None:
    assert log_odds(torch.tensor(-0.5, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("chosen", FAULT_VALUES)
@pytest.mark.parametrize("rejected", FAULT_VALUES)
def test_every_pair_of_fault_values_is_finite_and_equals_float64(chosen: float, rejected: float) -> None:
    found, expected = (
        evaluate(ORPO(1.0), torch.tensor([chosen, rejected], dtype=dtype), pair_index()) for dtype in (torch.float32, torch.float64)
    )
    assert torch.isfinite(found.loss)
    assert torch.isfinite(found.grad_N).all()
    assert torch.isfinite(found.sums).all()
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    # The clamp sits at float32(-1e-12) or float64(-1e-12), which differ in their eighth digit: so may the slope there.
    torch.testing.assert_close(found.grad_N.double(), expected.grad_N, rtol=1e-5, atol=1e-6)


@given(chosen=LOGPS, rejected=LOGPS, alpha=st.floats(0.0, 10.0), beta=st.floats(0.01, 10.0))
def test_loss_and_gradient_are_finite_for_every_log_probability(chosen: float, rejected: float, alpha: float, beta: float) -> None:
    logp_N = torch.tensor([chosen, rejected], dtype=torch.float32)
    for objective in (ORPO(alpha, beta), SFT(), SimPO(beta)):
        found = evaluate(objective, logp_N, pair_index())
        assert torch.isfinite(found.loss)
        assert torch.isfinite(found.grad_N).all()


@given(chosen=floats(-1e5), rejected=floats(-1e5))
def test_the_sign_of_the_preference_gradient(chosen: float, rejected: float) -> None:
    """The chosen answer is never pushed down by the term and the rejected one never up."""
    found = evaluate(ORPO(1.0), torch.tensor([chosen, rejected]), pair_index())
    assert found.grad_N[0] <= -1.0  # its NLL alone gives -1
    assert found.grad_N[1] >= 0.0


@pytest.mark.parametrize("ratio", [-1e3, 1e3])
def test_a_log_odds_ratio_of_a_thousand(ratio: float) -> None:
    chosen, rejected = (ratio, -1e-6) if ratio < 0 else (-1e-6, -ratio)
    leaf = torch.tensor([chosen, rejected], requires_grad=True)
    value = log_odds_ratio(leaf[:1], leaf[1:])
    assert abs(value.item() - ratio) < 20
    found = evaluate(ORPO(1.0), leaf, pair_index())
    assert torch.isfinite(found.loss)
    assert torch.isfinite(found.grad_N).all()
    # A hopeless pair costs its whole distance, one that is won by a thousand nats next to nothing.
    assert found.loss.item() - named(found)["nll_sum"] == pytest.approx(max(0.0, -value.item()), abs=1e-3)


def test_a_nan_log_probability_shows() -> None:
    """Nothing may be hidden either: the guard has to see it."""
    found = evaluate(ORPO(), torch.tensor([float("nan"), -1.0]), pair_index())
    assert torch.isnan(found.loss)


# --- float64 parity and derivatives ------------------------------------------------------------------------------------------------------

OBJECTIVES: tuple[Objective, ...] = (ORPO(0.7, 1.0), ORPO(1.0, 0.1), SFT(), DPO(0.2), SimPO(2.0, 0.5))


def random_tokens(seed: int, kinds: tuple[str, ...] = ("pair", "four", "sft", "partial")) -> tuple[Tensor, ResponseIndex]:
    chance = np.random.default_rng(seed)
    batch = collate(random_groups(1 + seed % 5, seed=seed, kinds=kinds))
    references = torch.from_numpy(-20 * chance.random(len(batch.index.num_tokens_R)))
    return torch.from_numpy(-5 * chance.random(len(batch.target_N))), replace(batch.index, reference_logp_sum_R=references)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@given(seed=st.integers(0, 10**6))
def test_float32_equals_float64(objective: Objective, seed: int) -> None:
    logp_N, index = random_tokens(seed)
    found, expected = evaluate(objective, logp_N.float(), index), evaluate(objective, logp_N, index)
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.grad_N.double(), expected.grad_N, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_derivative_is_that_of_the_loss(objective: Objective) -> None:
    logp_N, index = random_tokens(4)
    found = evaluate(objective, logp_N, index)
    for position in range(len(logp_N)):
        step = torch.zeros_like(logp_N)
        step[position] = 1e-6
        slope = (evaluate(objective, logp_N + step, index).loss - evaluate(objective, logp_N - step, index).loss) / 2e-6
        assert found.grad_N[position].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_evaluate_keeps_no_graph_and_leaves_its_input_alone() -> None:
    logp_N, index = random_tokens(1)
    before = logp_N.clone().requires_grad_()
    with torch.no_grad():
        found = evaluate(ORPO(), before, index)
    assert not found.loss.requires_grad
    assert not found.grad_N.requires_grad
    assert before.grad is None
    torch.testing.assert_close(before.detach(), logp_N, rtol=0, atol=0)


# --- groups, weights, fillers ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), scope=st.sampled_from(["sequence", "response"]))
def test_a_group_equals_the_list_of_its_pairs(seed: int, scope: str) -> None:
    """Loss, metrics, and the derivative added up over the copies that the list makes of a token."""
    groups = random_groups(2, seed=seed, kinds=("four", "partial"))
    pairs = [pair for item in groups for pair in as_pairs(item)]
    together, apart = collate(groups, scope), collate(pairs, scope)
    chance = np.random.default_rng(seed)
    logp_N = torch.from_numpy(-4 * chance.random(len(together.target_N)))
    copies = _copies(groups, scope)
    assert together.target_N[copies].tolist() == apart.target_N.tolist()
    found, expected = evaluate(ORPO(0.8), logp_N, together.index), evaluate(ORPO(0.8), logp_N[copies], apart.index)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.grad_N, torch.zeros_like(logp_N).index_add(0, copies, expected.grad_N))
    shared_metrics = [name for name in METRICS if not name.endswith("grad_square")]
    assert {name: named(found)[name] for name in shared_metrics} == pytest.approx({name: named(expected)[name] for name in shared_metrics})


def _copies(groups: list, scope: str) -> Tensor:
    """For every predicted token of the list of pairs, its place in the groups."""
    places, first = [], 0
    for item in groups:
        num_prompt = len(item.prompt_ids) - 1 if scope == "sequence" else 0
        starts = first + num_prompt + np.cumsum([0, *(len(ids) for ids in item.response_ids)])
        for chosen, rejected in item.pairs:
            places += range(first, first + num_prompt)
            places += range(starts[chosen], starts[chosen + 1])
            places += range(starts[rejected], starts[rejected + 1])
        first = int(starts[-1])
    return torch.tensor(places)


def test_an_answer_counts_in_the_next_token_loss_as_often_as_it_wins() -> None:
    """Four answers, a > b > c > d: a wins three times, b twice, c once, d never; the prompt is in six pairs."""
    item = group([5, 6, 7], [8, 9], [10], [11, 12, 13], [14, 15], pairs=((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)))
    index = collate([item]).index
    assert index.nll_weight_N.tolist() == [6.0, 6.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert index.num_nll_tokens == 2 * 6 + 2 * 3 + 1 * 2 + 3 * 1
    assert index.num_pairs == 6


def test_rows_with_one_answer_count_in_the_next_token_loss_alone() -> None:
    """An SFT-only row of two tokens with NLL 4 in all beside a pair with 2 chosen tokens and NLL 6: mean 10 / 4, one pair."""
    batch = collate([group([5], [6, 7]), group([5], [6, 7], [8])], "response")
    logp_N = torch.tensor([-1.0, -3.0, -2.0, -4.0, -0.5])
    found = evaluate(ORPO(orpo_alpha=2.0), logp_N, batch.index)
    ratio = log_odds_ratio(torch.tensor([-3.0]), torch.tensor([-0.5]))
    assert found.loss.item() == pytest.approx(10 / 4 + 2.0 * -torch.nn.functional.logsigmoid(ratio).item())
    assert found.grad_N[:2].tolist() == [-0.25, -0.25]


def test_a_step_of_rows_with_one_answer_has_no_preference_term() -> None:
    batch = collate([group([5], [6, 7])])
    found = evaluate(ORPO(1.0), torch.tensor([-1.0, -3.0]), batch.index)
    assert found.loss.item() == 2.0
    assert named(found)["num_pairs"] == named(found)["preference_grad_square"] == 0


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=str)
def test_a_filler_adds_nothing(objective: Objective) -> None:
    batch = without_weight(collate(random_groups(3, kinds=("pair", "four", "sft")))).with_normalisers(100, 10)
    found = evaluate(objective, -torch.rand(len(batch.target_N)), batch.index)
    assert found.loss.item() == 0.0
    assert not found.grad_N.any()
    assert not found.sums.any()


def test_the_parts_of_a_step_add_up_to_the_whole() -> None:
    groups = random_groups(7, kinds=("pair", "four", "sft", "partial"))
    whole = collate(groups)
    logp_N = -3 * torch.rand(len(whole.target_N), dtype=torch.float64)
    expected = evaluate(ORPO(0.5), logp_N, whole.index)
    loss, grads, sums, first = torch.zeros((), dtype=torch.float64), [], torch.zeros(len(METRICS), dtype=torch.float64), 0
    for rows in (groups[:2], groups[2:3], groups[3:]):
        part = collate(rows).with_normalisers(whole.index.num_nll_tokens, whole.index.num_pairs)
        found = evaluate(ORPO(0.5), logp_N[first : first + len(part.target_N)], part.index)
        loss, sums, first = loss + found.loss, sums + found.sums, first + len(part.target_N)
        grads.append(found.grad_N)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(torch.cat(grads), expected.grad_N)
    torch.testing.assert_close(sums, expected.sums)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), num_prompt=st.integers(0, 4))
def test_sums_and_means_per_response(lengths: list[int], num_prompt: int) -> None:
    response_N = [-1] * num_prompt + [index for index, length in enumerate(lengths) for _ in range(length)]
    logp_N = -torch.rand(len(response_N), dtype=torch.float64)
    nothing = torch.zeros(0, dtype=torch.long)
    index = ResponseIndex(
        torch.tensor(response_N), torch.ones(len(response_N)), torch.tensor(lengths, dtype=torch.float32), nothing, nothing, 1.0, 0.0
    )
    expected = [
        sum(value.item() for value, owner in zip(logp_N, response_N, strict=True) if owner == number) for number in range(len(lengths))
    ]
    assert sum_logp(logp_N, index).tolist() == pytest.approx(expected)
    assert mean_logp(logp_N, index).tolist() == pytest.approx([total / length for total, length in zip(expected, lengths, strict=True)])


def test_no_counted_token_is_no_loss_and_no_nan() -> None:
    index = without_weight(collate(random_groups(1))).with_normalisers(0, 0).index
    leaf = (-torch.rand(len(index.response_N))).requires_grad_()
    term = nll_term(leaf, index)
    term.backward()
    assert term.item() == 0.0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_alpha_zero_is_plain_fine_tuning() -> None:
    logp_N, index = random_tokens(3)
    found, expected = evaluate(ORPO(orpo_alpha=0.0), logp_N, index), evaluate(SFT(), logp_N, index)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.grad_N, expected.grad_N)


def test_ties_are_not_counted_as_right() -> None:
    assert named(evaluate(ORPO(), torch.tensor([-1.0, -1.0]), pair_index()))["accuracy_sum"] == 0
    assert named(evaluate(ORPO(), torch.tensor([-0.9, -1.0]), pair_index()))["accuracy_sum"] == 1


@pytest.mark.parametrize("objective", [ORPO(1.0), DPO(), SimPO()], ids=str)
def test_one_pair_on_two_ranks_weighs_what_it_weighs_on_one(objective: Objective) -> None:
    """Each rank divides by its share of the pairs, here one half, since the gradients are averaged over ranks afterwards."""
    index = replace(pair_index(), reference_logp_sum_R=torch.tensor([-2.0, -3.0]))
    logp_N = torch.tensor([-1.0, -2.0])
    alone = objective(logp_N, index)["preference"]
    share = objective(logp_N, replace(index, num_pairs=0.5))["preference"]
    assert share.item() == pytest.approx(2 * alone.item())
