"""What a stage of training costs: passes, tokens, floating-point operations, time, memory, all counted where they happen."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from orpo.training.steps import StepBatch
from orpo.training.trainer import ORPOTrainer


@dataclass
class Cost:
    """Sums over a stage.

    Attributes:
        num_steps, num_pairs: optimizer steps and pairs seen (rows, for SFT).
        forward_tokens, backward_tokens: tokens computed by the trained model; a prompt counts once per visit.
        reference_tokens: tokens computed once beforehand under frozen weights (DPO).
        forward_passes, backward_passes: answers computed; two per pair for ORPO, and two more under the reference for DPO.
        flops: of matrix products, forward and backward, counted operator by operator; the reference's included.
        train_s: time in optimizer steps, without evaluation and saving.
        reference_s: time for the reference's log-probabilities.
        peak_bytes: highest memory of the process (CUDA: of tensors) while the stage trained.
        is_partial: the stage was killed just after a checkpoint, and what was spent before is not known.
        tokens_at_step: `forward_tokens` after each step.
    """

    num_steps: int = 0
    num_pairs: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    reference_tokens: int = 0
    forward_passes: int = 0
    backward_passes: int = 0
    flops: int = 0
    train_s: float = 0.0
    reference_s: float = 0.0
    peak_bytes: int = 0
    is_partial: bool = False
    tokens_at_step: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def cost_of_all(costs: list[Cost]) -> Cost:
    """What the processes that trained a stage together have spent: sums, the time of the slowest, the highest of the peaks."""
    longest = ("num_steps", "train_s", "reference_s", "peak_bytes", "is_partial")
    values = {item.name: [getattr(cost, item.name) for cost in costs] for item in fields(Cost) if item.name != "tokens_at_step"}
    found = {name: max(several) if name in longest else sum(several) for name, several in values.items()}
    return Cost(**found, tokens_at_step=[sum(step) for step in zip(*(cost.tokens_at_step for cost in costs), strict=True)])


def total_cost(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Costs of several stages one after the other: sums, and the highest of the peaks."""
    sums = [item.name for item in fields(Cost) if item.name not in ("tokens_at_step", "peak_bytes", "is_partial")]
    return {
        **{name: sum(stage[name] for stage in stages) for name in sums},
        "peak_bytes": max(stage["peak_bytes"] for stage in stages),
        "is_partial": any(stage["is_partial"] for stage in stages),
    }


class FlopCounter(TorchDispatchMode):
    """Adds up floating-point operations of matrix products and attention as they run, forward and backward.

    PyTorch's own `FlopCounterMode` also hooks every module to attribute them, which a training step pays for; the formulas are its.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = flop_registry.get(packet) or flop_registry.get(_OUT_OF_PLACE.get(packet))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


_OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""The registry knows the forms that make a new tensor."""


class MeasuredTrainer(ORPOTrainer):
    """A trainer that keeps account of what its steps cost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cost = Cost()

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None) -> Tensor:
        """As ever, counted."""
        with FlopCounter() as counter:
            loss = super().training_step(model, inputs, num_items_in_batch)
        count_step(self.cost, inputs, counter.total)
        return loss


def count_step(cost: Cost, inputs: StepBatch, flops: int) -> None:
    """Add one optimizer step."""
    num_tokens = sum(batch.num_tokens for batch in inputs.microbatches)
    num_answers = sum(len(group.response_ids) for group in inputs.groups)
    cost.num_steps += 1
    seen = [batch for batch in inputs.microbatches if batch.token_weight]  # a filler is computed, but nothing is learned from it
    cost.num_pairs += sum(max(len(group.pairs), 1) for batch in seen for group in batch.groups)
    cost.forward_tokens += num_tokens
    cost.backward_tokens += num_tokens
    cost.forward_passes += num_answers
    cost.backward_passes += num_answers
    cost.flops += flops
    cost.tokens_at_step.append(cost.forward_tokens)


class StepClock:
    """Time from the beginning of a step to its end, the optimizer's part included."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self._started_s = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started_s = time.perf_counter()

    def stop(self) -> None:
        """A step has ended, on the device too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.cost.train_s += time.perf_counter() - self._started_s


def reset_peak() -> None:
    """Start counting the highest memory anew, where the system can (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
