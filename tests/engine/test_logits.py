"""The two functions over the logits, in both forms, against autograd in float64."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo.engine import logits
from orpo.engine.logits import LogitRule

RULES = [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=3.0), LogitRule(scale=2.0, softcap=5.0)]
FORMS = ["written", "functions", pytest.param("compiled", marks=pytest.mark.slow)]


def chunk(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of 37 tokens over 301 entries, targets, and what each log-probability weighs."""
    chance = torch.Generator().manual_seed(0)
    values = 4 * torch.randn(37, 301, generator=chance)
    return values.to(dtype), torch.randint(0, 301, (37,), generator=chance), torch.randn(37, generator=chance)


def use(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "FUSED_DEVICES", () if form == "written" else ("cpu",))
    if form == "functions":
        monkeypatch.setattr(logits, "_compiled", lambda function, rule: functools.partial(function, rule=rule))


def both(values: Tensor, target_C: Tensor, grad_C: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    left = values.clone()
    logp_C, factor_C = logits.log_softmax_in_place(left, target_C, rule)
    logits.to_gradient(left, target_C, grad_C, factor_C, rule)
    return logp_C, left


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradient_are_those_of_autograd(form: str, dtype: torch.dtype, rule: LogitRule, monkeypatch: pytest.MonkeyPatch) -> None:
    use(form, monkeypatch)
    values, target_C, grad_C = chunk(dtype)
    exact = values.double().requires_grad_()
    ruled = exact * rule.scale
    ruled = ruled if rule.softcap is None else rule.softcap * torch.tanh(ruled / rule.softcap)
    expected = torch.log_softmax(ruled, 1).gather(1, target_C[:, None])[:, 0]
    expected.backward(grad_C.double())
    logp_C, gradient = both(values, target_C, grad_C, rule)
    assert gradient.dtype == dtype
    coarse = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logp_C.double(), expected.detach(), rtol=1e-5 if form != "written" else coarse, atol=coarse)
    assert (gradient.double() - exact.grad).norm() <= coarse * exact.grad.norm()


@pytest.mark.parametrize("fails", [logits.read_logps, logits.write_gradient], ids=lambda function: function.__name__)
def test_without_a_compiler_the_passes_are_made_one_by_one(
    fails: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(function: Any, rule: LogitRule) -> Any:
        def no_compiler(*_: Any) -> None:
            raise RuntimeError("Cannot find a working triton installation")

        return no_compiler if function is fails else functools.partial(function, rule=rule)

    use("compiled", monkeypatch)
    monkeypatch.setattr(logits, "_is_fusing", True)
    monkeypatch.setattr(logits, "_compiled", compiled)
    with caplog.at_level(logging.WARNING, logger="orpo"):
        found = [both(*chunk(torch.float32), LogitRule()) for _ in range(2)]
    assert caplog.text.count("cannot be compiled (RuntimeError)") == 1
    use("written", monkeypatch)
    expected = both(*chunk(torch.float32), LogitRule())
    for logp_C, gradient in found:
        torch.testing.assert_close(logp_C, expected[0])
        torch.testing.assert_close(gradient, expected[1])


def test_memory_that_is_too_small_is_not_taken_for_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Any, rule: LogitRule) -> Any:
        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("out of memory")

        return full

    use("compiled", monkeypatch)
    monkeypatch.setattr(logits, "_compiled", compiled)
    with pytest.raises(torch.OutOfMemoryError):
        both(*chunk(torch.float32), LogitRule())
    assert logits._is_fusing
