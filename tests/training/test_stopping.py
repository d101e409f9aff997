"""Early stopping: when the log says so, from the command line, and over a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orpo import ORPOConfig
from orpo.errors import UserErrors
from orpo.training.stopping import has_stopped_improving
from randomgroups import random_groups
from trainerruns import logged, make_trainer


def log_of(*values: float, name: str = "eval_loss") -> list[dict[str, Any]]:
    return [record for step, value in enumerate(values, start=1) for record in ({"step": step, "loss": 1.0}, {"step": step, name: value})]


@pytest.mark.parametrize(
    ("values", "patience", "threshold", "stops"),
    [
        ((3.0, 2.0, 1.0), 1, 0.0, False),
        ((3.0, 2.0, 2.0), 1, 0.0, True),
        ((3.0, 3.1, 2.9), 2, 0.0, False),
        ((3.0, 3.1, 3.2), 2, 0.0, True),
        ((3.0, 3.1, 2.0, 2.1), 2, 0.0, False),
        ((3.0, 2.95, 2.9), 2, 0.1, True),
        ((3.0, 2.95, 2.85), 2, 0.1, False),
        ((3.0, float("nan"), float("nan")), 2, 0.0, True),
        ((), 1, 0.0, False),
    ],
)
def test_the_log_decides(values: tuple[float, ...], patience: int, threshold: float, stops: bool) -> None:
    args: Any = SimpleNamespace(
        early_stopping_patience=patience, early_stopping_threshold=threshold, metric_for_best_model="loss", greater_is_better=False
    )
    assert has_stopped_improving(log_of(*values), args) is stops
    args.metric_for_best_model, args.greater_is_better = "eval_rewards/accuracies", True
    mirrored = log_of(*(-value for value in values), name="eval_rewards/accuracies")
    assert has_stopped_improving(mirrored, args) is stops, "the same metric with its sign turned"


def test_an_evaluation_that_was_made_again_counts_once() -> None:
    args: Any = SimpleNamespace(
        early_stopping_patience=2, early_stopping_threshold=0.0, metric_for_best_model=None, greater_is_better=False
    )
    again = [*log_of(1.0, 2.0), {"step": 2, "eval_loss": 2.0}]
    assert not has_stopped_improving(again, args)


def test_it_needs_evaluations() -> None:
    with pytest.raises(UserErrors, match=r"early_stopping_patience: needs evaluations to look at(.|\n)*eval_strategy"):
        ORPOConfig(early_stopping_patience=2)
    with pytest.raises(UserErrors, match="early_stopping_patience: found 0"):
        ORPOConfig(early_stopping_patience=0, eval_strategy="steps")
    config = ORPOConfig(early_stopping_patience=2, eval_strategy="steps")
    assert (config.metric_for_best_model, config.greater_is_better) == ("loss", False)


STOPPING: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8, "early_stopping_patience": 2,
    "early_stopping_threshold": 100.0, "lr_scheduler_type": "constant",
}  # fmt: skip
"""No step gains 100 nats: the first evaluation is the best, and the third is one too many."""


def stopping_trainer(folder: Path, **options: Any) -> Any:
    groups = random_groups(8, seed=0)
    return make_trainer(folder, groups, arguments={"eval_dataset": random_groups(4, seed=1)}, **{**STOPPING, **options})


def test_a_run_stops_and_a_resumed_one_at_the_same_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = stopping_trainer(tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 3
    assert "eval_loss has not improved in 2 evaluations" in caplog.text

    cut = stopping_trainer(tmp_path / "cut", early_stopping_patience=None, max_steps=2)
    cut.train()
    changed = stopping_trainer(tmp_path / "cut", allow_changed_resume=True)
    changed.train(resume_from_checkpoint=True)
    assert changed.state.global_step == 3, "the evaluations before the resume count"
    assert logged(changed, "eval_loss")[-1] == pytest.approx(logged(whole, "eval_loss")[-1], rel=1e-6)

    again = stopping_trainer(tmp_path / "cut", allow_changed_resume=True)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3, "a run that has stopped early does no step more"
