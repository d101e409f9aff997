"""Every log of a trainer into the run's `metrics.jsonl`. Apart from `orpo.runfolder`, so that readers of it need no transformers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from orpo.runfolder import MetricsLog


class MetricsCallback(TrainerCallback):
    """Appends every log of a trainer to `metrics.jsonl`, on the first process alone."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            self.log.append({"step": state.global_step, "time_unix_s": round(time.time(), 3), **logs})
