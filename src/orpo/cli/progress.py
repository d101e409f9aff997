"""The bar of a training run: loss parts, pair accuracy, margin, speed and time left; plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text
from transformers import TrainerCallback

from orpo.system.console import human_seconds, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from transformers import TrainerControl, TrainerState, TrainingArguments

# (value, name on screen, format)
_SHOWN = (
    ("loss", "loss", ".3f"),
    ("nll_loss", "nll", ".3f"),
    ("odds_ratio_loss", "odds", ".3f"),
    ("rewards/accuracies", "acc", ".0%"),
    ("margin", "margin", "+.3f"),
    ("tokens_per_second", "tok/s", ",.0f"),
)
_IN_BAR = ("loss", "acc", "margin", "tok/s")
_BAR_CELLS = (10, 24)
"""Fewest and most cells of the bar itself."""
QUIET_S = 30.0
"""Without a terminal a step that logs nothing is told of where nothing was said for so long."""


def describe_log(logs: dict[str, Any], prefix: str = "") -> str:
    """`loss 2.105  nll 1.981  odds 0.124  acc 62%  margin +0.021  tok/s 1,204` from a logged object.

    The odds-ratio part is the logged mean of log sigma(log OR), with its sign turned: what lambda multiplies in the loss. The margin is
    the chosen answers' mean log-probability minus the rejected ones', nats per token, as everywhere; the logged `rewards/margins` is that
    times `orpo_alpha`.
    """
    return "  ".join(_named_values(logs, prefix).values())


def _named_values(logs: dict[str, Any], prefix: str = "") -> dict[str, str]:
    values = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    if "log_odds_ratio" in values:
        values["odds_ratio_loss"] = -values["log_odds_ratio"]
    if "logps/chosen" in values and "logps/rejected" in values:
        values["margin"] = values["logps/chosen"] - values["logps/rejected"]
    parts = {}
    for name, label, style in _SHOWN:
        value = values.get(name)
        if isinstance(value, (int, float)):
            # NaN has no percent; it is shown as it is, since hiding it is how runs die unseen.
            parts[label] = f"{label} {format(value, style) if math.isfinite(value) else value}"
    return parts


class _Line(ProgressColumn):
    """Step, bar, time left and as many of the newest values as the terminal is wide enough for, in this order of importance."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        total = max(int(task.total or 0), 1)
        fewest, most = _BAR_CELLS
        head = f"step {task.completed:.0f}/{total}  "
        room = self.console.width - len(head) - fewest
        tail = ""
        for part in (task.fields["left"], *task.fields["values"]):
            if part and len(tail) + 2 + len(part) <= room:
                tail += f"  {part}"
        cells = max(min(most, fewest + room - len(tail)), 0)
        done = round(cells * min(task.completed / total, 1))
        is_plain = self.console.color_system is None
        sign = "-" if self.console.options.ascii_only else "━"
        rest = (" " if is_plain else sign) * (cells - done)
        return Text.assemble(head, (sign * done, "bar.complete"), (rest, "bar.back"), tail, no_wrap=True)


class ProgressReport(TrainerCallback):
    """Replaces transformers' bar. On the first process alone.

    Args:
        console: where to.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._told_s = 0.0
        self._num_evaluated = 0
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started_s = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._started_s = self._told_s = self.clock()
        self._first_step = state.global_step
        if self.console.is_terminal:
            self._progress = Progress(_Line(self.console), console=self.console, transient=False)
            self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, left="", values=())
            self._progress.start()

    def time_left(self, state: TrainerState) -> str:
        """`3 min 20 s left`, from the speed since this process began; empty before its first step and after the last."""
        done = state.global_step - self._first_step
        if done <= 0 or state.global_step >= state.max_steps:
            return ""
        seconds = (self.clock() - self._started_s) / done * (state.max_steps - state.global_step)
        return f"{human_seconds(seconds)} left"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, left=self.time_left(state))
        elif state.is_world_process_zero and not control.should_log and (state.global_step == self._first_step + 1 or self._is_quiet):
            # The next values may be long in coming: that it moves, and how fast, is worth a line in a log.
            self._say(f"step {state.global_step}/{state.max_steps}  {self.time_left(state)}".rstrip())

    @property
    def _is_quiet(self) -> bool:
        return self.clock() - self._told_s >= QUIET_S

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A micro-batch of an evaluation, of which there is no bar."""
        self._num_evaluated += 1
        if state.is_world_process_zero and self._is_quiet:
            self._say(f"step {state.global_step}  evaluating, {self._num_evaluated} micro-batches done")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._num_evaluated = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            self._say(f"step {state.global_step}  evaluation: {describe_log(logs, 'eval_')}")
            return
        values = _named_values(logs)
        if not values or "train_runtime" in logs:
            return
        line = f"step {state.global_step}/{state.max_steps}  {'  '.join(values.values())}"
        if self._progress is not None:
            self._progress.update(self._task, left=self.time_left(state), values=[values[name] for name in _IN_BAR if name in values])
            self._say(line)  # above the bar, where it stays
        else:
            self._say(f"{line}  {self.time_left(state)}".rstrip())

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
        self._told_s = self.clock()
        say(self._progress.console if self._progress is not None else self.console, line)
