"""fp16 with loss scaling, on a CPU's own scaler: exact gradients, steps left out, the schedule, and resume."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo.engine import attention, padded, shared
from orpo.engine.choose import attention_implementation
from orpo.engine.layout import collate
from orpo.errors import GuardStop
from orpo.objective import ORPO
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import logged, make_trainer, weights

GROUPS = random_groups(16, kinds=("pair", "pair", "sft"))
HALF: dict[str, Any] = {"bf16": None, "fp16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def set_scale(trainer: Any, scale: float, **options: Any) -> None:
    """A scaler that begins elsewhere than at 65,536, which is too much for the wide weights of a tiny model."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)


def gradients(engine: str, scale: float, num_tokens: float) -> dict[str, Tensor]:
    """Of one micro-batch under fp16 autocast, the loss multiplied by `scale` for the backward pass, the gradients divided by it."""
    model = build_tiny_model("llama", num_layers=2)
    batch = collate(GROUPS[:4]).with_normalisers(num_tokens, num_tokens)
    attention.register()
    factor = torch.tensor(scale)
    with torch.autocast("cpu", torch.float16), attention_implementation(model, attention.NAME if engine == "shared" else "sdpa"):
        step = functools.partial(shared.step, gradient_scale=factor) if engine == "shared" else padded.step
        result = step(model, batch, ORPO())
    (result.loss * factor).backward()
    return {name: parameter.grad / scale for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_small_gradients_survive_16_bits(engine: str) -> None:
    """Of a step of 40,000 tokens: most of the head's are below what fp16 can hold, unless they are made at the loss's scale."""
    model = build_tiny_model("llama", num_layers=2)
    exact = padded.step(model, collate(GROUPS[:4]).with_normalisers(4e7, 4e7), ORPO())
    exact.loss.backward()
    scaled, plain = gradients(engine, 2.0**22, 4e7), gradients(engine, 1.0, 4e7)
    errors = {}
    for name, parameter in model.named_parameters():
        norm = parameter.grad.norm()
        errors[name] = [float((found[name] - parameter.grad).norm() / norm) for found in (scaled, plain)]
    assert max(error for error, _ in errors.values()) < 0.02, errors
    assert max(error for _, error in errors.values()) > 0.2, errors


@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_a_run_follows_the_float32_one(engine: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "half", GROUPS, engine=engine, max_steps=12, **HALF)
    exact = make_trainer(tmp_path / "whole", GROUPS, engine=engine, max_steps=12)
    assert isinstance(trainer.accelerator.scaler, torch.amp.GradScaler)
    set_scale(trainer, 1024.0)
    for run in (trainer, exact):
        run.train()
    assert logged(trainer) == pytest.approx(logged(exact), rel=5e-3)
    assert logged(trainer, "grad_norm") == pytest.approx(logged(exact, "grad_norm"), rel=2e-2)
    assert logged(trainer, "skipped_steps") == [0.0] * 12
    assert logged(trainer, "loss_scale") == [1024.0] * 12
    assert logged(exact, "skipped_steps") == logged(exact, "loss_scale") == []


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_whose_gradients_do_not_fit_are_left_out_and_counted(optim: str, tmp_path: Path) -> None:
    """Neither weights nor optimizer nor schedule move in them."""
    trainer = make_trainer(tmp_path, GROUPS, max_steps=8, optim=optim, lr_scheduler_type="linear", **HALF)
    set_scale(trainer, 2.0**20)
    before = [weights(trainer.model)]
    moved: list[bool] = []
    log = trainer.log

    def watch(logs: dict[str, float], *rest: Any) -> None:
        log(logs, *rest)
        if "skipped_steps" in logs:
            now = weights(trainer.model)
            moved.append(any(not torch.equal(weight, before[-1][name]) for name, weight in now.items()))
            before.append(now)

    trainer.log = watch
    trainer.train()
    skipped = logged(trainer, "skipped_steps")
    assert skipped[0] == 1.0
    assert 0.0 in skipped
    assert moved == [not is_skipped for is_skipped in skipped]
    # As transformers logs the rate: the one of the step, before the schedule moves.
    expected = [1e-3 * (8 - sum(not is_skipped for is_skipped in skipped[:step])) / 8 for step in range(8)]
    assert logged(trainer, "learning_rate") == pytest.approx(expected)
    assert trainer.state.global_step == 8
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (20 - sum(skipped))
    assert {float(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {8.0 - sum(skipped)}
    assert all(math.isfinite(value) for value in logged(trainer))


def test_gradients_that_are_infinite_at_any_scale_stop_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, max_steps=40, **HALF)
    set_scale(trainer, 8.0)
    weight = next(parameter for name, parameter in trainer.model.named_parameters() if "norm" in name)
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(GuardStop, match="step 4: the gradient norm is"):
        trainer.train()


def test_a_loss_that_is_no_number_stops_at_once(tmp_path: Path) -> None:
    model = build_tiny_model("llama", num_layers=2)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)  # beyond the largest number of fp16
    trainer = make_trainer(tmp_path, GROUPS, model=model, engine="padded", max_steps=4, **HALF)
    with pytest.raises(GuardStop, match="step 1: the loss is nan"):
        trainer.train()


def test_a_resumed_run_is_the_uninterrupted_one_scaler_and_counts_included(tmp_path: Path) -> None:
    def run(folder: Path, *, scale: float, resume: bool = False, **options: Any) -> Any:
        trainer = make_trainer(folder, GROUPS, save_strategy="steps", save_steps=3, logging_steps=2, **{**HALF, "max_steps": 8, **options})
        set_scale(trainer, scale, growth_interval=2)
        trainer.train(resume_from_checkpoint=True if resume else None)
        return trainer

    whole = run(tmp_path / "whole", scale=2.0**18)

    def lines(folder: Path) -> list[dict[str, Any]]:
        clocks = ("time_unix_s", "tokens_per_second", "pairs_per_second")
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in clocks and not key.startswith("train_")} for line in found]

    parts = tmp_path / "parts"
    interrupted = make_trainer(parts, GROUPS, save_strategy="steps", save_steps=3, logging_steps=2, **{**HALF, "max_steps": 8})
    set_scale(interrupted, 2.0**18, growth_interval=2)

    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        if interrupted.state.global_step == 5:
            raise Stop

    interrupted.callback_handler.callbacks[0].on_step_begin = stop
    with pytest.raises(Stop):
        interrupted.train()
    resumed = run(parts, scale=2.0**16, resume=True)
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert any(line.get("skipped_steps") for line in lines(tmp_path / "whole"))
    assert lines(parts) == lines(tmp_path / "whole")
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(resumed.model)[name]), name
