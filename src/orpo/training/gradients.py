"""The part of the trainer between the backward pass and the optimizer: norm, guard, clip, and the one question to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orpo.engine.parallel import forget_gradients, norm_of, own_part
from orpo.engine.precision import MasterAdamW, WorkingWeights
from orpo.system.ranks import Ranks, all_reduce_max
from orpo.training.guards import NonFiniteGuard
from orpo.training.metrics import MetricSums, response_sums
from orpo.training.scaling import ScalingMixin
from orpo.training.steps import StepBatch


@dataclass(frozen=True, slots=True)
class StepTold:
    """What the host asks of a step, all in one go: waiting for the device once costs as much as waiting for the whole step.

    Attributes:
        loss: this rank's.
        grad_norm: of all gradients of the whole model.
        has_bad_loss: whether the loss of any rank is not finite.
        signum: a signal that any rank has received, or 0.
        nll: mean next-token loss in nats, the lowest of the ranks that had one; None where none had.
    """

    loss: float
    grad_norm: float
    has_bad_loss: bool
    signum: int
    nll: float | None


def ask(loss: Tensor, grad_norm: Tensor, nll: Tensor, *, signum: int, ranks: Ranks) -> StepTold:
    """Bring a step's numbers to the host: one reduction where there are several ranks, and one synchronisation."""
    # One maximum serves all three: a signal that reached one rank must stop every rank after the same step, and the lowest loss is the
    # highest of the negated ones.
    highest = torch.stack(
        [
            (~torch.isfinite(loss)).double(),
            torch.full((), float(signum), dtype=torch.float64, device=loss.device),
            -torch.where(torch.isfinite(nll), nll, torch.inf),
        ]
    )
    if ranks.world_size > 1:
        highest = all_reduce_max(highest)
    own_loss, norm, has_bad_loss, signal, lowest = torch.cat([torch.stack([loss.double(), grad_norm.double()]), highest]).tolist()
    return StepTold(own_loss, norm, bool(has_bad_loss), int(signal), None if lowest == -torch.inf else -lowest)


class GradientMixin(ScalingMixin):
    """A step's gradients for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    ranks: Ranks
    nonfinite: NonFiniteGuard
    sums: MetricSums
    told: StepTold | None = None
    """Of the newest step; None before the first, and where a subclass makes its steps itself."""
    _signals: Any = None
    _grad_norm: float | None = None
    _working: WorkingWeights | None
    zero: Any

    @contextmanager
    def whole_or_nothing(self, model: nn.Module) -> Iterator[None]:
        """A step that an exception ends (no memory for a long row, Ctrl-C in a notebook) leaves nothing behind: what comes next is what it
        would have been without it, and the memory is free."""
        try:
            yield
        except BaseException:
            self.forget_step(model)
            raise

    def forget_step(self, model: nn.Module) -> None:
        """Forget gradients, wherever they lie, and what has been done to them. The sums forget with their next `start`."""
        forget_gradients(model, self.zero)
        if self._working is not None:
            self._working.drop()
        self.forget_scaled()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, MasterAdamW):
            optimizer.gradient_scale = 1.0

    def _release_gradients(self) -> None:
        """Hand the step's gradients over; an optimizer that does not know low-precision ones gets float32."""
        self._working.release()  # type: ignore[union-attr]
        if not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), MasterAdamW):
            for parameter in self.model.parameters():
                if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                    parameter.grad = parameter.grad.to(parameter.dtype)

    def _finish_gradients(self, model: nn.Module, loss: Tensor, inputs: StepBatch, logps: list[Tensor]) -> None:
        """Total norm, clip, and the guard before any weight is touched."""
        self.unscale_gradients()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        signum = 0 if self._signals is None else self._signals.guard.pending
        # ZeRO keeps gradients in buffers of its own; the parameters have none.
        norm = norm_of(gradients) if self.zero is None else torch.tensor(self.zero.norm(), dtype=torch.float64)
        self.told = told = ask(loss, norm.to(loss.device), self.sums.newest_nll(), signum=signum, ranks=self.ranks)
        self._grad_norm = told.grad_norm
        is_overflow = self.is_overflow(told.grad_norm)
        if self.accelerator.scaler is not None:
            self.sums.add_skipped(is_overflow)
        is_fine = self.nonfinite.check(
            step=self.state.global_step + 1,
            loss=told.loss,
            grad_norm=0.0 if is_overflow else told.grad_norm,  # an overflow in fp16 is the scaler's to mend, and no fault of the rows
            groups=inputs.groups,
            logp_sums=response_sums(inputs, logps),
            is_bad_elsewhere=told.has_bad_loss,
        )
        if not is_fine:
            model.zero_grad(set_to_none=True)
            if self.zero is not None:
                self.zero.drop()
        elif self.zero is None and not is_overflow and 0 < self.args.max_grad_norm < told.grad_norm:
            # The 1e-6 is torch's own (`clip_grad_norm_`), so that a clipped step equals transformers'.
            self._scale_gradients(gradients, self.args.max_grad_norm / (told.grad_norm + 1e-6))

    def _scale_gradients(self, gradients: list[Tensor], scale: float) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, MasterAdamW):
            optimizer.gradient_scale = scale  # in the same visit as the update
        else:
            torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Already done in the step; transformers would read and write every gradient once more."""
        return super()._clip_grad_norm(model) if self._grad_norm is None else self._grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm) if self._grad_norm is None else self._grad_norm
