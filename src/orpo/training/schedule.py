"""Whether a run may go on to another number of steps than it was started for: only where the steps that are done stay what they were."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import get_scheduler

from orpo.errors import CheckpointError
from orpo.run.folder import final_weights

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig

logger = logging.getLogger(__name__)


def require_same_rates(args: ORPOConfig, checkpoint: Path, *, step: int, old_steps: int, new_steps: int) -> None:
    """Let a run go on to `new_steps` if its learning rates so far, and the one to come, would have been the same.

    Args:
        args: options of now.
        checkpoint: what the run goes on from.
        step: steps that are done.
        old_steps, new_steps: steps of the whole run, then and now.

    Raises:
        CheckpointError: they would have been others, or more steps are done than are wanted; `allow_changed_resume` makes it a warning.
    """
    if old_steps == new_steps:
        return
    if step > new_steps:
        what = f"{step} steps are done, and {new_steps} are wanted"
        mend = "raise max_steps or num_train_epochs, or choose another output_dir"
    elif _rates(args, old_steps, step) == _rates(args, new_steps, step):
        logger.info("the run was started for %d steps and goes on to %d", old_steps, new_steps)
        return
    else:
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        share = f", warmup_steps: {args.warmup_steps:g} of all steps" if 0 < args.warmup_steps < 1 else ""
        what = (
            f"the run was started for {old_steps} steps, and {new_steps} are wanted now; its learning rate goes by that number "
            f"(lr_scheduler_type: {kind}{share}), so the {step} steps that are done would have been others"
        )
        weights = final_weights(checkpoint.parent) or checkpoint
        mend = f"start a second run from its weights: model_name_or_path: {weights}, and another output_dir"
    if not args.allow_changed_resume:
        raise CheckpointError(what, where=str(checkpoint), mend=f"{mend}; or resume anyway with allow_changed_resume: true")
    logger.warning("resuming although %s", what)


def _rates(args: ORPOConfig, num_steps: int, step: int) -> list[float] | None:
    """Learning rates of the steps up to the one after `step`, peak 1; None where they do not go by the number of the step alone."""
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
    factors = getattr(scheduler, "lr_lambdas", None)
    return None if factors is None else [factors[0](number) for number in range(step + 1)]
