"""Loss scaling for fp16: gradients are made large enough for 16 bits, and a step whose gradients do not fit is left out.

accelerate makes a scaler on some devices only, and wraps the model's forward with it; here torch's own is set beside it, on any device that
has one. The fused head makes its gradients in the forward pass, so it is told the scale (`Engine.step`). Scale and growth are torch's
defaults; a checkpoint keeps them. A step that is left out moves neither weights nor schedule, and counts in the number of steps, as in
transformers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

SMALLEST_SCALE = 1.0
"""Gradients that are not finite at this scale are not so for the scale."""


class ScalingMixin(_Base):
    """fp16 for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    args: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, with a scaler where fp16 is asked for."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16:
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    @property
    def loss_scale(self) -> Tensor | None:
        """What the loss is multiplied by before the backward pass; None without loss scaling. Asks the device nothing."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    def unscale_gradients(self) -> None:
        """Gradients as they are without a scale; those that did not fit are not finite, which the scaler has noted."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(getattr(self.optimizer, "optimizer", self.optimizer))

    def forget_scaled(self) -> None:
        """Forget that a step's gradients were unscaled already, which the scaler would refuse to do a second time."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler._per_optimizer_states.clear()  # `update` would move the scale

    def is_overflow(self, grad_norm: float) -> bool:
        """Whether the scaler will leave this step out and try the next with half the scale; the same on every rank, as the norm is."""
        scaler = self.accelerator.scaler
        return scaler is not None and not math.isfinite(grad_norm) and scaler.get_scale() > SMALLEST_SCALE

    def with_scale(self, logs: dict[str, float]) -> dict[str, float]:
        """A log of training with the scale, where there is one."""
        scaler = self.accelerator.scaler
        return logs if scaler is None else {**logs, "loss_scale": scaler.get_scale()}


def step_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Let the scaler decide over an optimizer's step: a fused one would be called for every step and leave it out by itself, which neither
    accelerate nor the schedule hears of."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
