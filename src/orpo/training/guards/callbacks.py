"""The guards as callbacks of transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo.checkpoint.retain import checkpoint_name
from orpo.training.guards.divergence import DivergenceGuard
from orpo.training.guards.learning import ProofOfLearning
from orpo.training.guards.signals import SignalGuard


class SignalCallback(TrainerCallback):
    """After each optimizer step: if any rank was told to stop, save once (through the Trainer's own save) and leave right after it.

    Signals during an evaluation are seen between its batches: the weights are those of the step before it, so `save_now` (if given) is
    called and `SignalStop` raised from there. It gets the step and returns the folder. Several ranks agree on a signal in the step itself,
    where they ask each other anyway, and `agreed` tells what they found; where it tells nothing they are asked at the step's end.

    Attributes:
        is_evaluation_due: the step had an evaluation coming, which was put off to leave sooner; a resumed run has to make up for it.
    """

    def __init__(self, guard: SignalGuard, save_now: Any = None, agreed: Callable[[], int | None] = lambda: None) -> None:
        self.guard, self.save_now, self.agreed = guard, save_now, agreed
        self.is_evaluation_due = False
        self._signum = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        signum = None if self.guard.is_alone else self.agreed()  # alone it costs nothing to look once more
        self._signum = self.guard.agreed() if signum is None else signum
        if self._signum:
            self.is_evaluation_due = control.should_evaluate
            control.should_save, control.should_evaluate = True, False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if self._signum:
            self.guard.stop(self._signum, Path(args.output_dir or ".") / checkpoint_name(state.global_step))
        return control

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if signum := self.guard.agreed():
            self.guard.stop(signum, self.save_now(state.global_step) if self.save_now is not None else None)
        return control


class LearningCallback(TrainerCallback):
    """Feeds `ProofOfLearning` from the Trainer's events; `grad_norm` gives the norm of the step that has just been done."""

    def __init__(self, proof: ProofOfLearning, grad_norm: Callable[[], float | None] = lambda: None) -> None:
        self.proof, self.grad_norm = proof, grad_norm
        self._learning_rate = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        self.proof.begin(model)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any) -> None:
        self._learning_rate = max(float(group["lr"]) for group in optimizer.param_groups)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        norm = self.grad_norm()
        if norm is None or math.isfinite(norm):  # a step that was left out proves nothing
            self.proof.end_step(state.global_step, model, learning_rate=self._learning_rate, grad_norm=norm)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        self.proof.observe(state.global_step, logs or {})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        self.proof.close_window(state.global_step, model)


class DivergenceCallback(TrainerCallback):
    """Feeds `DivergenceGuard`; `nll` gives the mean next-token loss of the step that has just been done."""

    def __init__(self, guard: DivergenceGuard, nll: Callable[[], float | None]) -> None:
        self.guard, self.nll = guard, nll

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.guard.end_step(state.global_step, self.nll(), is_last=state.global_step >= state.max_steps)
