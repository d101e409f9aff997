"""A run goes on to another number of steps exactly where the steps that are done would have had the same learning rates."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from orpo import ORPOConfig
from orpo.errors import CheckpointError
from orpo.training.schedule import require_same_rates

KEYWORDS: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
}
BY_LOSS = {"reduce_lr_on_plateau", "greedy"}
"""Schedules that know no number of steps."""


def rates(args: ORPOConfig, num_steps: int) -> list[float]:
    """What an optimizer is really given, step by step."""
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("warmup", [0, 2, 0.25])
@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_at_every_step(kind: str, warmup: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_cpu": True, "eval_strategy": "steps", "eval_steps": 1}
    args = ORPOConfig(lr_scheduler_type=kind, warmup_steps=warmup, lr_scheduler_kwargs=KEYWORDS.get(kind), **options)
    old_steps, outcomes = 8, set()
    for new_steps in (8, 12, 16):
        for step in range(1, old_steps + 1):
            is_same = kind in BY_LOSS or rates(args, old_steps)[: step + 1] == rates(args, new_steps)[: step + 1]
            outcomes.add(is_same)
            with nullcontext() if is_same else pytest.raises(CheckpointError) as caught:
                require_same_rates(args, tmp_path / f"checkpoint-{step}", step=step, old_steps=old_steps, new_steps=new_steps)
            if caught is not None:
                assert f"lr_scheduler_type: {kind}" in str(caught.value)
                assert f"model_name_or_path: {tmp_path}/checkpoint-{step}" in str(caught.value)
    assert True in outcomes


def test_fewer_steps_than_are_done(tmp_path: Path) -> None:
    args = ORPOConfig(lr_scheduler_type="constant", use_cpu=True)
    require_same_rates(args, tmp_path, step=4, old_steps=8, new_steps=4)
    with pytest.raises(CheckpointError, match="4 steps are done, and 3 are wanted"):
        require_same_rates(args, tmp_path, step=4, old_steps=8, new_steps=3)
