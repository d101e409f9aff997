"""Resuming in the middle of an epoch gives the uninterrupted run, bit for bit; what is kept of checkpoints; the best model at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from orpo import ORPOTrainer
from orpo.data.types import TokenGroup
from orpo.engine.fused import fused_modules
from orpo.errors import CheckpointError, SignalStop
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import logged, make_trainer, weights

CLOCK = ("time", "second", "runtime")
SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {"engine": "shared"},
    "padded": {"engine": "padded"},
    "bf16": {"engine": "shared", "bf16": True},
    "bf16_autocast": {"engine": "shared", "bf16": True, "bf16_weights": False},
    "checkpointing": {"engine": "shared", "gradient_checkpointing": True},
    "adafactor": {"optim": "adafactor", "bf16": True},
    "lora": {"engine": "shared", "lora": True, "learning_rate": 1e-2},
    "dropout": {"disable_dropout": False},
}


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    """15 rows in steps of 4: four steps an epoch, the last of three rows."""
    return random_groups(15, kinds=("pair", "four", "sft", "pair"), prompt=(2, 12), answer=(1, 9))


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and a busy disk takes seconds for every sync (tests/faults is where they matter)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class StopAt(TrainerCallback):
    """Ends the training after a step without changing the configuration."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step
        return control


def build(folder: Path, groups: list[TokenGroup], *, stop_at: int | None = None, lora: bool = False, **options: Any) -> ORPOTrainer:
    arguments: dict[str, Any] = {"callbacks": [StopAt(stop_at)], "eval_dataset": random_groups(4, seed=8)}
    torch.manual_seed(0)
    model = build_tiny_model("gpt2" if options.get("disable_dropout") is False else "llama", num_layers=2)
    if options.get("disable_dropout") is False:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
    if lora:
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    defaults = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 5,
        "lr_scheduler_type": "cosine", "warmup_steps": 3,
    }  # fmt: skip
    return make_trainer(folder, groups, model=model, arguments=arguments, **{**defaults, **options})


def state(trainer: ORPOTrainer) -> dict[str, torch.Tensor]:
    """Weights, and what the optimizer keeps of each."""
    found = weights(trainer.model)
    for index, values in enumerate(trainer.optimizer.state_dict()["state"].values()):
        found |= {f"{index}.{key}": value for key, value in values.items() if isinstance(value, torch.Tensor)}
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock says; the summary of the process at its end is left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(word in key for word in CLOCK)} for line in lines if "train_loss" not in line
    ]


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


QUICK = ("shared", "bf16", "lora")


@pytest.mark.parametrize("setting", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS])
def test_a_resumed_run_is_the_uninterrupted_one(setting: str, tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Stopped after 7 of 9 steps, in the second epoch and between two logs; the newest checkpoint is that of step 6.

    The uninterrupted run saves nothing, so saving is proved to change nothing as well.
    """
    options = {**SETTINGS[setting], "save_steps": 6}
    whole = build(tmp_path / "whole", groups, **{**options, "save_strategy": "no"})
    whole.train()
    run = tmp_path / "run"
    build(run, groups, stop_at=7, **options).train()
    assert metrics(run) != metrics(tmp_path / "whole")
    resumed = build(run, groups, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9
    assert_same_bits(state(resumed), state(whole))
    assert metrics(run) == metrics(tmp_path / "whole")
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [3, 6, 9]


@pytest.mark.parametrize("step", [step if step in (3, 4) else pytest.param(step, marks=pytest.mark.slow) for step in range(1, 9)])
def test_from_every_step_of_two_epochs(step: int, tmp_path: Path, groups: list[TokenGroup]) -> None:
    run = tmp_path / "run"
    options = {"max_steps": 9, "save_steps": step, "eval_strategy": "no", "logging_steps": 2}
    whole = build(tmp_path / "whole", groups, **{**options, "save_strategy": "no"})
    whole.train()
    build(run, groups, stop_at=step, **options).train()
    resumed = build(run, groups, **options)
    resumed.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    assert_same_bits(state(resumed), state(whole))
    assert metrics(run) == metrics(tmp_path / "whole")


def test_resuming_twice_in_an_epoch_trains_the_same_rows(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Resumed twice within an epoch: identical batches."""
    whole = build(tmp_path / "whole", groups, save_strategy="no")
    whole.train()
    run = tmp_path / "run"
    build(run, groups, stop_at=4).train()
    for stop_at in (5, None):
        resumed = build(run, groups, stop_at=stop_at)
        resumed.train(resume_from_checkpoint=True)
    assert_same_bits(state(resumed), state(whole))


def test_from_python_a_run_starts_anew_unless_asked(tmp_path: Path, groups: list[TokenGroup]) -> None:
    first = build(tmp_path, groups)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    second = build(tmp_path / "again", groups)
    second.train()
    assert logged(second) == logged(first)


def test_nothing_to_resume_is_an_error(tmp_path: Path, groups: list[TokenGroup]) -> None:
    for wanted in (True, str(tmp_path / "checkpoint-5")):
        with pytest.raises(CheckpointError):
            build(tmp_path, groups).train(resume_from_checkpoint=wanted)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"gradient_accumulation_steps": 4}, {"orpo_alpha": 0.5}], ids=str)
def test_another_configuration_is_refused_with_the_difference(change: dict[str, Any], tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Changed data, configuration or batch size is refused with a diff."""
    build(tmp_path, groups, stop_at=3).train()
    with pytest.raises(CheckpointError, match=next(iter(change))):
        build(tmp_path, groups, **change).train(resume_from_checkpoint=True)
    resumed = build(tmp_path, groups, allow_changed_resume=True, **change)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9


def test_other_rows_are_refused(tmp_path: Path, groups: list[TokenGroup]) -> None:
    build(tmp_path, groups, stop_at=3).train()
    with pytest.raises(CheckpointError, match="data"):
        build(tmp_path, groups[::-1]).train(resume_from_checkpoint=True)


def kept(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize(("limit", "expected"), [(None, {2, 4, 6, 8, 9}), (3, {6, 8, 9}), (1, {8, 9})])
def test_the_newest_checkpoints_are_kept(limit: int | None, expected: set[int], tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Never fewer than two, whatever the limit."""
    build(tmp_path, groups, save_total_limit=limit).train()
    assert kept(tmp_path) == expected


def test_the_best_model_is_kept_and_loaded_at_the_end(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """A rate that ruins the model: its best evaluation is the first."""
    trainer = build(
        tmp_path, groups, load_best_model_at_end=True, eval_steps=2, metric_for_best_model="eval_loss", save_total_limit=1,
        learning_rate=0.3, warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert losses[best] < max(losses.values())
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best in kept(tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_best_adapter_is_loaded_at_the_end(bf16: bool, tmp_path: Path, groups: list[TokenGroup]) -> None:
    trainer = build(
        tmp_path, groups, lora=True, load_best_model_at_end=True, eval_steps=2, metric_for_best_model="eval_loss", bf16=bf16,
        learning_rate=1.0, warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best != 8
    with fused_modules(trainer.model):  # as while it trained: at this rate the adapter is so large that bf16's rounding is seen otherwise
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_a_checkpoint_is_a_model_folder(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Whoever loads it gets the trained model, tokenizer and template, and unpickles nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = build(tmp_path, groups)
    trainer.train()
    folder = tmp_path / "checkpoint-9"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_bits(weights(loaded), weights(trainer.model))
    assert AutoTokenizer.from_pretrained(folder).chat_template == trainer.processing_class.chat_template
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_callbacks_hear_of_a_checkpoint_that_a_signal_saves_in_an_evaluation(groups: list[TokenGroup], tmp_path: Path) -> None:
    """What they keep beside a checkpoint (`orpo compare` its cost so far) must not be missing for this one."""
    saved: list[int] = []

    class Listener(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved.append(state.global_step)

    trainer = build(tmp_path, groups, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(Listener())
    with pytest.raises(SignalStop, match="checkpoint-2"):
        trainer.train()
    assert saved == [2]
