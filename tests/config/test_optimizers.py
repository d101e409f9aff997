"""Every optimizer that transformers names is made and steps, or is refused with what to do, before any model is loaded."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from orpo import ORPOConfig
from orpo.config.optimizers import ARGUMENTS, explain_optimizer, optimizer_notes
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


def test_every_argument_that_transformers_reads_is_known() -> None:
    source = inspect.getsource(sys.modules[Trainer.get_optimizer_cls_and_kwargs.__module__])
    with contextlib.suppress(ImportError):  # where the versions before it have them inside of trainer.py
        from transformers import trainer_optimizer

        source += inspect.getsource(trainer_optimizer)
    read = set(re.findall(r"""optim_args(?:\.get|\.pop)?[(\[]"(\w+)\"""", source))
    read |= set(re.findall(r"""if "(\w+)" in ctx.optim_args""", source))
    for keys in re.findall(r"""for key in \(([^)]*)\):\n\s+if key in \w*\.?optim_args""", source):
        read |= set(re.findall(r"\w+", keys))
    assert read
    assert read <= set(ARGUMENTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if refusal_of(name) is None])
def test_every_argument_reaches_the_optimizer_or_is_refused_by_its_name(name: str) -> None:
    def options(arguments: str | None) -> Any:
        made = Trainer.get_optimizer_cls_and_kwargs(ORPOConfig(optim=name, optim_args=arguments, use_cpu=True), torch.nn.Linear(2, 2))[1]
        return {key: value for key, value in made.items() if key != "model"}

    usual = options(None)
    for key in (*ARGUMENTS, "nothing", "lr", "betas"):
        taken = []
        for value in ("0.375", "true", "7"):
            refused = ""
            try:
                taken.append(options(f"{key}={value}") != usual)
            except UserErrors as error:
                refused = str(error)
            assert not refused or f"'{key}' is read by nothing" in refused or f"{key}={value}" in refused
        assert not taken or any(taken), f"{key} is taken and changes nothing"


@pytest.mark.parametrize(
    ("given", "mend"),
    [("momntum=0.9", "did you mean 'momentum'?"), ("lr=1", "give it as the option learning_rate"), ("eps=1e-6", "the option adam_epsilon")],
)
def test_an_argument_that_nothing_reads_has_a_mend(given: str, mend: str) -> None:
    with pytest.raises(UserErrors) as caught:
        ORPOConfig(optim="sgd", optim_args=f"nesterov=true,momentum=0.9,{given}", use_cpu=True)
    assert mend in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "given", "notes"),
    [
        ("adamw_torch", {"adam_beta1", "adam_beta2", "adam_epsilon"}, []),
        ("sgd", {"adam_beta1", "adam_epsilon"}, ["adam_beta1, adam_epsilon have no effect with optim: sgd"]),
        ("adafactor", {"adam_beta2", "learning_rate"}, ["adam_beta2 has no effect with optim: adafactor"]),
        ("sgd", {"learning_rate", "weight_decay"}, []),
        ("sgd", {"optim_target_modules"}, ["optim_target_modules has no effect with optim: sgd; galore and apollo read it"]),
    ],
)
def test_options_that_the_optimizer_does_not_look_at_are_told(name: str, given: set[str], notes: list[str]) -> None:
    assert (
        optimizer_notes({"optim": name, "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}, given) == notes
    )


def test_a_package_is_named_as_it_is_installed() -> None:
    shown = str(explain_optimizer(ImportError("You need `x`. Install it with `pip install -U git+https://host/x`"), "x_adamw"))
    assert "pip install git+https://host/x; or optim: adamw_torch" in shown
