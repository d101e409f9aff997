"""The output head against dense logits and autograd in float64: values, all gradients, every budget, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from orpo.engine import head
from orpo.engine.head import HeadJob, LogitRule, head_loss, plain_linear
from orpo.engine.layout import PreferenceBatch, collate
from orpo.objective import DPO, ORPO, Objective, evaluate
from randomgroups import random_groups

WIDTH, VOCABULARY = 16, 128
RULES = [
    LogitRule(),
    LogitRule(scale=0.25),
    LogitRule(softcap=3.0),
    LogitRule(scale=4.0, softcap=2.0),
]
BUDGET_ROWS = [1, 5, 40, 10_000]
"""Rows of logits that the budget holds: one; less than a group; a few groups; everything."""


@pytest.fixture(scope="module")
def batch() -> PreferenceBatch:
    return collate(random_groups(6, kinds=("pair", "four", "sft", "partial")))


def linear(*, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    nn.init.normal_(layer.weight)
    return layer


def hidden_states(batch: PreferenceBatch, seed: int = 1) -> Tensor:
    return torch.randn(batch.num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def dense(
    hidden_TD: Tensor, layer: Callable[[Tensor], Tensor], batch: PreferenceBatch, rule: LogitRule, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss with a graph, logp_N) the plain way: all logits at once, autograd from end to end."""
    logits = layer(hidden_TD[batch.source_N]) * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logp_N = torch.log_softmax(logits, -1)[torch.arange(len(batch.target_N)), batch.target_N]
    return torch.stack(list(objective(logp_N, batch.index).values())).sum(), logp_N


def close(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    assert found is not None
    assert expected is not None
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def budget(rows: int, itemsize: int = 4) -> int:
    return rows * VOCABULARY * itemsize


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rows", BUDGET_ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_dense_float64(batch: PreferenceBatch, rule: LogitRule, rows: int, bias: bool) -> None:
    layer, hidden_TD = linear(bias=bias), hidden_states(batch)
    exact, hidden64_TD = linear(bias=bias).double(), hidden_states(batch).detach().double().requires_grad_()
    objective = ORPO(0.8)
    loss, logp_N, sums = head_loss(hidden_TD, layer, HeadJob(batch, objective, budget(rows), rule))
    expected, expected_logp_N = dense(hidden64_TD, exact, batch, rule, objective)
    torch.testing.assert_close(logp_N.double(), expected_logp_N.detach(), rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(sums, evaluate(objective, expected_logp_N, batch.index).sums, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    close(hidden_TD.grad, hidden64_TD.grad)
    close(layer.weight.grad, exact.weight.grad)
    if bias:
        close(layer.bias.grad, exact.bias.grad)


@pytest.mark.parametrize("rows", BUDGET_ROWS)
def test_the_budget_changes_nothing(batch: PreferenceBatch, rows: int) -> None:
    found = {}
    for size in (rows, 10_000):
        layer, hidden_TD = linear(), hidden_states(batch)
        loss, logp_N, _ = head_loss(hidden_TD, layer, HeadJob(batch, ORPO(1.0), budget(size)))
        loss.backward()
        found[size] = (loss.detach(), logp_N, hidden_TD.grad, layer.weight.grad)
    for one, other in zip(found[rows], found[10_000], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_other_objectives_pass_through_the_same_head() -> None:
    groups = random_groups(4)
    for item in groups:
        object.__setattr__(item, "reference_logp_sums", tuple(-3.0 * len(ids) for ids in item.response_ids))
    batch = collate(groups)
    layer, hidden_TD = linear(), hidden_states(batch)
    exact, hidden64_TD = linear().double(), hidden_states(batch).detach().double().requires_grad_()
    loss, _, _ = head_loss(hidden_TD, layer, HeadJob(batch, DPO(0.3), budget(30)))
    expected, _ = dense(hidden64_TD, exact, batch, LogitRule(), DPO(0.3))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(hidden_TD.grad, hidden64_TD.grad)


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0])
def test_an_incoming_gradient_is_passed_on(batch: PreferenceBatch, factor: float) -> None:
    gradients = []
    for scale in (1.0, factor):
        layer, hidden_TD = linear(bias=True), hidden_states(batch)
        (scale * head_loss(hidden_TD, layer, HeadJob(batch, ORPO(), budget(20)))[0]).backward()
        gradients.append((hidden_TD.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(factor * one, other)


# --- frozen parts ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def counting_products() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the results of all matrix products while the context lasts."""
    shapes: list[tuple[int, ...]] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                shapes.append(tuple(result.shape))
            return result

    with Counter():
        yield shapes


def test_a_frozen_head_gets_no_gradient_and_costs_none(batch: PreferenceBatch) -> None:
    """LoRA: one product for the logits and one for the hidden states' gradient, none for the head's."""
    layer, hidden_TD = linear().requires_grad_(False), hidden_states(batch)
    exact, hidden64_TD = linear().double(), hidden_states(batch).detach().double().requires_grad_()
    with counting_products() as shapes:
        loss, _, _ = head_loss(hidden_TD, layer, HeadJob(batch, ORPO(), budget(10_000)))
        loss.backward()
    dense(hidden64_TD, exact, batch, LogitRule(), ORPO())[0].backward()
    assert layer.weight.grad is None
    close(hidden_TD.grad, hidden64_TD.grad)
    num_predicted = len(batch.target_N)
    assert sorted(shapes) == sorted([(num_predicted, VOCABULARY), (num_predicted, WIDTH)])


def test_a_head_alone_can_be_trained(batch: PreferenceBatch) -> None:
    layer, hidden_TD = linear(), hidden_states(batch).detach()
    exact = linear().double()
    head_loss(hidden_TD, layer, HeadJob(batch, ORPO(), budget(25)))[0].backward()
    dense(hidden_TD.double(), exact, batch, LogitRule(), ORPO())[0].backward()
    close(layer.weight.grad, exact.weight.grad)


@pytest.mark.parametrize("rows", [5, 10_000])
def test_evaluation_makes_log_probabilities_and_nothing_else(batch: PreferenceBatch, rows: int) -> None:
    layer = linear()
    with torch.no_grad(), counting_products() as shapes:
        loss, logp_N, _ = head_loss(hidden_states(batch), layer, HeadJob(batch, ORPO(), budget(rows)))
    assert {shape[1] for shape in shapes} == {VOCABULARY}
    assert sum(shape[0] for shape in shapes) == len(batch.target_N)
    expected, expected_logp_N = dense(hidden_states(batch), layer, batch, LogitRule(), ORPO())
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logp_N, expected_logp_N.detach(), rtol=1e-5, atol=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", BUDGET_ROWS)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_logits_beyond_the_budget_are_ever_made(batch: PreferenceBatch, rows: int, frozen: bool) -> None:
    """Vocabulary-sized results of any operation: at most the budget's rows, but for the head's own gradient (V, D) and one group's row."""
    layer = linear().requires_grad_(not frozen)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == VOCABULARY:
                largest = max(largest, result.shape[0])
            return result

    with Watch():
        head_loss(hidden_states(batch), layer, HeadJob(batch, ORPO(), budget(rows)))[0].backward()
    # The transposed weight is a view of (D, V), no memory of its own.
    assert largest <= max(rows, WIDTH)


def test_a_group_that_fits_is_visited_once_and_one_that_does_not_twice(batch: PreferenceBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[int] = []
    original = head._HeadRun._logits

    def counted(self: head._HeadRun, rows: slice) -> Tensor:
        visited.extend(range(rows.start, rows.stop))
        return original(self, rows)

    monkeypatch.setattr(head._HeadRun, "_logits", counted)
    largest = max(span.n[1] - span.n[0] for span in batch.spans)
    head_loss(hidden_states(batch), linear(), HeadJob(batch, ORPO(), budget(largest)))
    assert sorted(visited) == list(range(len(batch.target_N)))
    visited.clear()
    head_loss(hidden_states(batch), linear(), HeadJob(batch, ORPO(), budget(1)))
    assert sorted(visited) == sorted(2 * list(range(len(batch.target_N))))


# --- precision -------------------------------------------------------------------------------------------------------------------------


def test_bf16_values_are_those_of_the_rounded_logits(batch: PreferenceBatch) -> None:
    """The product is bf16; everything behind it float32, so the only error is that of the product."""
    layer, hidden_TD = linear().bfloat16(), hidden_states(batch).detach().bfloat16().requires_grad_()
    loss, logp_N, _ = head_loss(hidden_TD, layer, HeadJob(batch, ORPO(), budget(10_000, 2)))
    logits = (hidden_TD.detach()[batch.source_N] @ layer.weight.detach().t()).float()
    expected_N = torch.log_softmax(logits, -1)[torch.arange(len(batch.target_N)), batch.target_N]
    assert logp_N.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logp_N, expected_N, rtol=1e-5, atol=1e-5)
    loss.backward()
    exact, hidden64_TD = linear().bfloat16().double(), hidden_TD.detach().double().requires_grad_()
    dense(hidden64_TD, exact, batch, LogitRule(), ORPO())[0].backward()
    close(hidden_TD.grad, hidden64_TD.grad, 2e-2)
    close(layer.weight.grad, exact.weight.grad, 2e-2)


def test_many_chunks_in_bf16_add_up_in_float32(batch: PreferenceBatch) -> None:
    """Rounding the sum to bf16 after every chunk would lose what many small chunks add."""
    errors = []
    exact, hidden64_TD = linear().bfloat16().double(), hidden_states(batch).detach().bfloat16().double().requires_grad_()
    dense(hidden64_TD, exact, batch, LogitRule(), ORPO())[0].backward()
    for rows in (1, 10_000):
        layer, hidden_TD = linear().bfloat16(), hidden_states(batch).detach().bfloat16().requires_grad_()
        head_loss(hidden_TD, layer, HeadJob(batch, ORPO(), budget(rows, 2)))[0].backward()
        assert layer.weight.grad is not None
        errors.append(float((layer.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()))
    assert errors[0] <= 1.5 * errors[1] + 1e-3


def test_autocast_computes_in_bf16_and_returns_float32_gradients(batch: PreferenceBatch) -> None:
    layer, hidden_TD = linear(bias=True), hidden_states(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logp_N, _ = head_loss(hidden_TD, layer, HeadJob(batch, ORPO(), budget(30)))
    loss.backward()
    assert logp_N.dtype == torch.float32
    exact, hidden64_TD = linear(bias=True).double(), hidden_states(batch).detach().double().requires_grad_()
    dense(hidden64_TD, exact, batch, LogitRule(), ORPO())[0].backward()
    for found, expected in ((hidden_TD, hidden64_TD), (layer.weight, exact.weight), (layer.bias, exact.bias)):
        assert found.grad is not None
        assert found.grad.dtype == torch.float32
        close(found.grad, expected.grad, 2e-2)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_of_a_thousand_stay_finite(batch: PreferenceBatch, softcap: float | None) -> None:
    """A token of probability 1 in float32, and one of probability e^-1000."""
    layer, hidden_TD = linear(), (300 * hidden_states(batch).detach()).requires_grad_()
    loss, logp_N, _ = head_loss(hidden_TD, layer, HeadJob(batch, ORPO(1.0), budget(30), LogitRule(softcap=softcap)))
    loss.backward()
    assert torch.isfinite(logp_N).all()
    assert torch.isfinite(loss)
    assert hidden_TD.grad is not None
    assert torch.isfinite(hidden_TD.grad).all()
    assert logp_N.max() <= 1e-5


def test_a_nan_in_the_hidden_states_reaches_the_loss(batch: PreferenceBatch) -> None:
    hidden_TD = hidden_states(batch).detach()
    hidden_TD[batch.source_N[0]] = float("nan")
    assert torch.isnan(head_loss(hidden_TD, linear(), HeadJob(batch, ORPO(), budget(30)))[0])


# --- output modules that are more than a linear layer -------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """As PEFT wraps a linear layer: base plus a low-rank part."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.out_features = base.requires_grad_(False), base.out_features
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, VOCABULARY, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.b(self.a(hidden))


def low_rank() -> LowRank:
    torch.manual_seed(3)
    return LowRank(linear())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rows", BUDGET_ROWS)
def test_other_output_modules_are_called_by_chunks(batch: PreferenceBatch, rule: LogitRule, rows: int) -> None:
    module, hidden_TD = low_rank(), hidden_states(batch)
    exact, hidden64_TD = low_rank().double(), hidden_states(batch).detach().double().requires_grad_()
    assert plain_linear(module) is None
    loss, logp_N, _ = head_loss(hidden_TD, module, HeadJob(batch, ORPO(), budget(rows), rule))
    expected, expected_logp_N = dense(hidden64_TD, exact, batch, rule, ORPO())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logp_N.double(), expected_logp_N.detach(), rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(hidden_TD.grad, hidden64_TD.grad)
    close(module.a.weight.grad, exact.a.weight.grad)
    close(module.b.weight.grad, exact.b.weight.grad)


def test_a_subclass_of_linear_is_not_taken_for_a_plain_one() -> None:
    class Quantized(nn.Linear):
        pass

    assert plain_linear(Quantized(2, 2)) is None
    layer = nn.Linear(2, 2)
    assert plain_linear(layer) is layer


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, LogitRule()),
        ({"logits_scaling": 4.0}, LogitRule(scale=0.25)),
        ({"logit_scale": 0.0625}, LogitRule(scale=0.0625)),
        ({"final_logit_softcapping": 30.0}, LogitRule(softcap=30.0)),
        ({"final_logit_softcapping": None, "logit_scale": None}, LogitRule()),
    ],
)
def test_the_rule_is_read_from_the_configuration(fields: dict[str, float | None], rule: LogitRule) -> None:
    config = type("Config", (), fields)()
    assert LogitRule.of(config) == rule
