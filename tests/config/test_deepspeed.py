"""Every way to ask for DeepSpeed's ZeRO means it, and what would be another run than the options say is refused with a mend."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import orpo
from orpo.config.parallelism import parallelism_of, sharding_problems

LAUNCH = Path(orpo.__file__).parent / "recipes" / "launch"
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
OWN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 1.0}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DeepSpeed were there; nothing here imports it."""
    monkeypatch.setattr("orpo.config.deepspeed.find_spec", lambda name: ModuleSpec(name, None))


@pytest.mark.parametrize(
    ("values", "environ", "kind"),
    [
        ({"parallelism": "zero2"}, {}, "zero2"),
        ({"parallelism": "zero3"}, {}, "zero3"),
        ({"deepspeed": str(LAUNCH / "zero2.json")}, {}, "zero2"),
        ({"deepspeed": str(LAUNCH / "zero3.json"), "parallelism": "zero3"}, {}, "zero3"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}, "optimizer": "auto", "zero_allow_untested_optimizer": True}}, {}, "zero3"),
        ({"deepspeed": '{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "gradient_accumulation_steps": 4}'}, {}, "zero2"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(LAUNCH / "zero3.json")}, "zero3"),
    ],
)
def test_every_way_to_ask_for_zero_means_it(values: dict[str, Any], environ: dict[str, str], kind: str) -> None:
    values, environ = {**OWN, **values}, {**TWO, **environ}
    assert sharding_problems(values, environ) == []
    found = parallelism_of(values, environ)
    assert (found.kind, found.zero["zero_optimization"]["stage"]) == (kind, int(kind[-1]))
    alone = sharding_problems(values, {name: value for name, value in environ.items() if name not in TWO})
    assert "there is one process" in str(alone[0])


def test_accelerates_offload_is_passed_on() -> None:
    names = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert parallelism_of({}, {**TWO, **names}).zero["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, and gradient_accumulation_steps is 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, and max_grad_norm is 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "a second optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "a second schedule"),
        ({"fp16": {"enabled": True}}, "scaler"),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1"),
        ({"zero_optimization": {"stage": 0}}, "parallelism: ddp"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
    ],
)
def test_a_configuration_that_says_another_run_is_refused(given: dict[str, Any], told: str) -> None:
    deepspeed = json.dumps({"zero_optimization": {"stage": 2}, **given})
    problems = sharding_problems({**OWN, "deepspeed": deepspeed}, TWO)
    assert len(problems) == 1
    assert told in str(problems[0])
    assert problems[0].where == "deepspeed"
    assert problems[0].mend


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"deepspeed": "nowhere.json"}, "deepspeed"),
        ({"deepspeed": "{"}, "deepspeed"),
        ({"parallelism": "zero3", "fp16": True}, "fp16"),
        ({"parallelism": "zero3", "torch_compile": True}, "torch_compile"),
        ({"parallelism": "zero3", "optim": "adafactor"}, "optim"),
        ({"parallelism": "zero3", "fsdp": True}, "parallelism"),
        ({"parallelism": "zero2", "deepspeed": {"zero_optimization": {"stage": 3}}}, "parallelism"),
        ({"parallelism": "ddp", "deepspeed": {"zero_optimization": {"stage": 3}}}, "parallelism"),
    ],
)
def test_what_does_not_go_with_zero_is_refused(values: dict[str, Any], where: str) -> None:
    assert [problem.where for problem in sharding_problems(values, TWO)] == [where]


def test_without_deepspeed_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo.config.deepspeed.find_spec", lambda name: None)
    (problem,) = sharding_problems({"parallelism": "zero3"}, TWO)
    assert "deepspeed" in str(problem)
    assert "pip install" in str(problem.mend)
    assert "deepspeed" not in sys.modules
