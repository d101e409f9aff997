"""Early stopping: a run ends once the metric of the best model has not improved for some evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from orpo.config.options import ORPOConfig

logger = logging.getLogger(__name__)


class EarlyStopping(TrainerCallback):
    """Asks the log, at every evaluation, whether it is time to stop.

    transformers' own callback counts in memory, so that a resumed run begins to count anew; the log is a part of every checkpoint.
    """

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, Any] | None = None, **_: Any) -> None:
        if best_metric(args) in (metrics or {}) and has_stopped_improving(state.log_history, args):
            control.should_training_stop = True
            logger.warning(
                "step %d: %s has not improved in %d evaluations: the run ends here (early_stopping_patience)",
                state.global_step,
                best_metric(args),
                args.early_stopping_patience,
            )


def best_metric(args: ORPOConfig) -> str:
    """The name under which an evaluation logs the metric of the best model."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def has_stopped_improving(log_history: Sequence[dict[str, Any]], args: ORPOConfig) -> bool:
    """Whether the newest `early_stopping_patience` evaluations were none of them better than all before by more than the threshold.

    Where a run was resumed in the middle of an evaluation, the step is in the log twice; its newer values count.
    """
    if args.early_stopping_patience is None:
        return False
    name = best_metric(args)
    values = {log.get("step"): float(log[name]) for log in log_history if name in log}
    sign = 1 if args.greater_is_better else -1
    best, num_since = float("-inf"), 0
    for value in values.values():
        if sign * value > best + args.early_stopping_threshold:  # NaN is no improvement
            best, num_since = sign * value, 0
        else:
            num_since += 1
    return num_since >= args.early_stopping_patience
