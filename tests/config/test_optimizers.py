"""Every optimizer that transformers names is made and steps, or is refused with what to do, before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.training_args import OptimizerNames

from orpo import ORPOConfig
from orpo.config.optimizers import explain_optimizer
from orpo.errors import UserErrors
from randomgroups import random_groups
from trainerruns import make_trainer

NAMES = [str(kind.value) for kind in OptimizerNames]


def refusal_of(name: str) -> str | None:
    try:
        ORPOConfig(optim=name, use_cpu=True)
    except UserErrors as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_what_passes_trains_and_what_is_refused_says_why(name: str, tmp_path: Path) -> None:
    if (refusal := refusal_of(name)) is not None:
        is_told = any(words in refusal for words in (f"{name} needs the package", f"{name} needs optim_target_modules"))
        assert is_told or "changes weights during the backward pass" in refusal
        assert "to mend it: " in refusal
        return
    trainer = make_trainer(tmp_path / "run", random_groups(4, seed=0), optim=name, max_steps=1)
    trainer.train()


@pytest.mark.parametrize(("given", "what"), [("momentum", "found 'momentum'"), ("momentum=0.9,x", "found 'x'"), ("momentum=much", "much")])
def test_arguments_that_cannot_be_read(given: str, what: str) -> None:
    with pytest.raises(UserErrors, match=what):
        ORPOConfig(optim="sgd", optim_args=given, use_cpu=True)


def test_arguments_that_can() -> None:
    assert ORPOConfig(optim="sgd", optim_args="momentum=0.9, nesterov=true", use_cpu=True).optim_args == "momentum=0.9, nesterov=true"


def test_a_package_is_named_as_it_is_installed() -> None:
    shown = str(explain_optimizer(ImportError("You need `x`. Install it with `pip install -U git+https://host/x`"), "x_adamw"))
    assert "pip install git+https://host/x; or optim: adamw_torch" in shown
