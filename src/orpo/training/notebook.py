"""A run in a notebook: curves and newest values that grow in the cell while it trains, and the trainer as its cell shows it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.utils import is_in_notebook

from orpo.report.facts import Logs
from orpo.report.inline_run import run_cell
from orpo.system.console import human_seconds

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

SECONDS_BETWEEN = 2.0
"""Between two steps that are shown; a log is always shown."""


def logs_of(state: TrainerState) -> Logs:
    """What a trainer has logged so far."""
    logs = Logs()
    for record in state.log_history:
        logs.add(record)
    return logs


def cell_of(trainer: Any) -> str:
    """A trainer as HTML: what it trains, how far it is, its curves and newest values."""
    state = trainer.state
    name = type(getattr(trainer, "model", None)).__name__
    return run_cell(logs_of(state), f"{name} on {len(trainer.known_rows)} rows, step {state.global_step} of {state.max_steps or '?'}")


class LiveTable(TrainerCallback):
    """In place of transformers' table, which has no column for what a preference run is watched by. Shows on the first process alone."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._started_s = self._shown_s = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        from IPython.display import HTML, display  # a notebook has it

        if state.is_world_process_zero:
            self._started_s, self._first_step = time.monotonic(), state.global_step
            self._handle = display(HTML(self.html(state)), display_id=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() - self._shown_s >= SECONDS_BETWEEN:
            self._show(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        from IPython.display import HTML

        if self._handle is not None:
            self._shown_s = time.monotonic()
            self._handle.update(HTML(self.html(state)))

    def html(self, state: TrainerState) -> str:
        """What the cell shows now."""
        done, rest = state.global_step - self._first_step, state.max_steps - state.global_step
        took_s = time.monotonic() - self._started_s
        left = ""
        if rest <= 0:
            left = f", {human_seconds(took_s)}"
        elif done > 0:
            left = f", {human_seconds(took_s / done * rest)} left"
        return run_cell(logs_of(state), f"step {state.global_step} of {state.max_steps}{left}")


class NotebookMixin:
    """What a notebook asks of `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    def use_live_table(self) -> None:
        """In a notebook, replace transformers' table; call it once, after its own constructor. `disable_tqdm` turns both off."""
        if is_in_notebook():
            from transformers.utils.notebook import NotebookProgressCallback

            if self.pop_callback(NotebookProgressCallback) is not None:  # type: ignore[attr-defined]
                self.add_callback(LiveTable())  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return cell_of(self)
