"""The bar of a training run: loss parts, pair accuracy, margin, speed and time left; plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

from orpo.cli.console import human_seconds, say

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerControl, TrainerState, TrainingArguments

# (logged name, name on screen, format)
_SHOWN = (
    ("loss", "loss", ".3f"),
    ("nll_loss", "nll", ".3f"),
    ("odds_ratio_loss", "odds", ".3f"),
    ("rewards/accuracies", "acc", ".0%"),
    ("rewards/margins", "margin", "+.3f"),
    ("tokens_per_second", "tok/s", ",.0f"),
)


def describe_log(logs: dict[str, Any], prefix: str = "") -> str:
    """`loss 2.105  nll 1.981  odds 0.124  acc 62%  margin +0.021  tok/s 1,204` from a logged object.

    The odds-ratio part is the logged mean of log sigma(log OR), with its sign turned: what λ multiplies in the loss.
    """
    values = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    if "log_odds_ratio" in values:
        values["odds_ratio_loss"] = -values["log_odds_ratio"]
    parts = []
    for name, label, style in _SHOWN:
        value = values.get(name)
        if isinstance(value, (int, float)):
            # NaN has no percent; it is shown as it is, since hiding it is how runs die unseen.
            parts.append(f"{label} {format(value, style) if math.isfinite(value) else value}")
    return "  ".join(parts)


class ProgressReport(TrainerCallback):
    """Replaces transformers' bar. On the first process alone."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started_s = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._started_s, self._first_step = time.monotonic(), state.global_step
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[shown]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=False)
            self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, left="", shown="")
            self._progress.start()

    def time_left(self, state: TrainerState) -> str:
        """`3 min 20 s left`, from the speed since this process began; empty before its first step."""
        done = state.global_step - self._first_step
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self._started_s) / done * (state.max_steps - state.global_step)
        return f"{human_seconds(seconds)} left"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, left=self.time_left(state))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            self._say(f"step {state.global_step}  evaluation: {describe_log(logs, 'eval_')}")
            return
        shown = describe_log(logs)
        if not shown or "train_runtime" in logs:
            return
        if self._progress is not None:
            self._progress.update(self._task, shown=shown, left=self.time_left(state))
        else:
            self._say(f"step {state.global_step}/{state.max_steps}  {shown}  {self.time_left(state)}".rstrip())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._say(f"step {state.global_step}  checkpoint saved")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down; also called where training ended by an error, which fires no event."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        say(self._progress.console if self._progress is not None else self.console, line)
