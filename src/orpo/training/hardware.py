"""What a run needs of each process on hardware that is not here, for every way to spread it: memory by part, time, what it has to send.

Sums of what is known (weights, gradients, optimizer state, saved activations, what is gathered at once), no simulation. Speeds are the
makers' figures for dense products in bf16 and for links, times a stated share.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orpo.config.options import default_logits_bytes
from orpo.errors import UserError
from orpo.training.planning import ModelShape, Plan, copy_bytes, frozen_bytes

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig
    from orpo.run.config import RunConfig

GIB = 2**30
MATMUL_SHARE = 0.4
"""Of the peak of products that a training step reaches on a GPU; reports of well-tuned runs are between 0.35 and 0.5."""
LINK_SHARE = 0.7
"""Of a link's bandwidth that large collectives reach."""
RUNTIME_BYTES = {"cuda": round(1.2 * GIB), "cpu": 525 * 2**20}
"""A CUDA context with its libraries and the workspaces of products; Python and the libraries in a process on a CPU (measured)."""
FIRST_EXCHANGE_BYTES = 250 * 2**20
"""Copies of weights, frozen ones too, that DDP makes to send rank 0's to all."""
FREED_SHARE = 0.25
"""Of one micro-batch's activations and logits, on a CPU: freed blocks that the C library keeps and the next micro-batch does not fit into.
Fitted to the runs of `tests/training/test_hardware_plan.py`. Where anything is in parts blocks are given back (`map_large_blocks`)."""
ZERO3_LIVE_PARAMETERS = 10**9
"""DeepSpeed's own `stage3_max_live_parameters`: so many it keeps gathered before it lets one go."""
KINDS = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator: memory, products per second in bf16, bytes per second to others in its machine and from it to other machines."""

    memory_bytes: int
    flops: float
    link_bytes_s: float
    network_bytes_s: float


DEVICES = {
    "A100": Device(80 * GIB, 312e12, 300e9, 25e9),
    "A100-40": Device(40 * GIB, 312e12, 300e9, 25e9),
    "H100": Device(80 * GIB, 989e12, 450e9, 50e9),
    "H200": Device(141 * GIB, 989e12, 450e9, 50e9),
    "B200": Device(180 * GIB, 2250e12, 900e9, 50e9),
    "L4": Device(24 * GIB, 121e12, 16e9, 6e9),
    "L40S": Device(48 * GIB, 362e12, 16e9, 12e9),
    "A10G": Device(24 * GIB, 70e12, 16e9, 6e9),
    "RTX4090": Device(24 * GIB, 165e12, 16e9, 3e9),
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """Machines of one kind.

    Attributes:
        name: as the user wrote it.
        num_machines, per_machine: machines, and processes on each.
        device: None for CPUs, whose speed and memory are those of this machine.
    """

    name: str
    num_machines: int
    per_machine: int
    device: Device | None

    @property
    def num_ranks(self) -> int:
        return self.num_machines * self.per_machine


def _logits_budget(args: ORPOConfig, hardware: Hardware) -> int:
    """As on a device of that kind."""
    if args.logits_budget_mb is not None:
        return args.logits_budget_mb * 2**20
    return default_logits_bytes(0 if hardware.device is None else hardware.device.memory_bytes)


def parse_hardware(text: str) -> Hardware:
    """`8xH100`, `2x8xA100` (machines x devices), `L4`, `cpu` or `4xcpu` (processes).

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z][\w-]*)\s*", text)
    known = {name.upper(): name for name in DEVICES}
    if match is None or (match[3].upper() not in known and match[3].lower() != "cpu"):
        names = ", ".join([*DEVICES, "cpu"])
        raise UserError(
            f"found {text!r}", where="--hardware", expected=f"such as 8xH100, 2x8xA100 (machines x devices), cpu; known: {names}"
        )
    numbers = [int(number) for number in (match[1], match[2]) if number]
    if 0 in numbers:
        raise UserError(f"found {text!r}", where="--hardware", expected="at least one device")
    machines, devices = (numbers if len(numbers) == 2 else [1, *(numbers or [1])])[:2]
    return Hardware(text.strip(), machines, devices, None if match[3].lower() == "cpu" else DEVICES[known[match[3].upper()]])


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one process needs; bytes, seconds. Parts that a way of spreading does not have are 0.

    Attributes:
        gathered_bytes: weights of other processes' parts that are here at once, and whole gradients on their way, as far as they need more
            than the logits, which are gone by then.
        freed_bytes: what the C library keeps of freed blocks.
        apart_bytes: of the sum of the parts, what is never held at the same moment.
        loading_bytes: host memory while the model is loaded.
        sent_bytes: by one process in a step.
        seconds_per_step: None where nobody says how fast the machine is; the longer of computing and sending, which overlap.
    """

    kind: str
    num_ranks: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activations_bytes: int
    logits_bytes: int
    freed_bytes: int
    apart_bytes: int
    runtime_bytes: int
    loading_bytes: int
    sent_bytes: int
    seconds_per_step: float | None

    @property
    def memory_bytes(self) -> int:
        """Peak of a process while it trains."""
        model = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.gathered_bytes
        return model + self.activations_bytes + self.logits_bytes + self.freed_bytes + self.runtime_bytes - self.apart_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def plan_ranks(
    plan: Plan, shape: ModelShape, config: RunConfig, args: ORPOConfig, hardware: Hardware, *, dtype: str, flops: float | None = None
) -> list[RankPlan]:
    """One process's needs for each way of spreading; DDP alone for a single process.

    Args:
        plan: of the same run, for its tokens, optimizer and activations.
        shape: of its model in `dtype`.
        dtype: of compute there.
        flops: speed of products of this machine, where `hardware` is CPUs.
    """
    kinds = KINDS if hardware.num_ranks > 1 else KINDS[:1]
    return [_plan_rank(plan, shape, config, args, hardware, dtype, flops, kind) for kind in kinds]


def _plan_rank(
    plan: Plan, shape: ModelShape, config: RunConfig, args: ORPOConfig, hardware: Hardware, dtype: str, flops: float | None, kind: str
) -> RankPlan:
    ranks, width = hardware.num_ranks, 4 if dtype == "float32" else 2
    trained, total = shape.num_trainable, shape.num_parameters
    is_adapter = bool(config["use_peft"])
    stored = trained * 4 + (frozen_bytes(config, shape) if is_adapter else 0)
    parts = {"ddp": (1, 1, 1), "zero2": (1, ranks, ranks), "fsdp2": (ranks, ranks, ranks), "zero3": (ranks, ranks, ranks)}[kind]
    whole_weights = parts[0] == 1
    # A whole copy in 16 bits is kept by autocast until the backward pass is done.
    copies = 0.0
    if width == 2 and whole_weights:
        copies = trained * width + (copy_bytes(config, shape, width) if is_adapter else 0)
    microbatches = max(1, round(plan.tokens_per_step / max(plan.tokens_per_microbatch, 1)))
    share = (ranks - 1) / ranks
    weights = stored / parts[0] + copies
    if kind.startswith("zero"):
        weights += trained * 4 / ranks  # DeepSpeed trains a float32 copy of its part, of float32 weights too
    logits = min(_logits_budget(args, hardware), plan.tokens_per_microbatch * shape.vocab_size * width)
    gradients, gathered = trained * 4 / parts[1], _gathered(shape, trained, total, width, kind, ranks, logits)
    sent = 2 * share * trained * 4
    if not whole_weights:
        sent = microbatches * share * (2 * total * width + trained * 4)
    elif kind == "zero2":
        sent = share * (microbatches * trained * 4 + trained * width)
    return RankPlan(
        kind=kind,
        num_ranks=ranks,
        weights_bytes=round(weights),
        gradients_bytes=round(gradients),
        optimizer_bytes=round(plan.optimizer_bytes / parts[2]),
        gathered_bytes=round(gathered),
        activations_bytes=plan.activations_bytes,
        logits_bytes=logits,
        freed_bytes=round(FREED_SHARE * (plan.whole_activations_bytes + logits)) if hardware.device is None and kind == "ddp" else 0,
        apart_bytes=round(min(_after_activations(kind, gradients, gathered, microbatches), plan.activations_bytes + logits)),
        runtime_bytes=RUNTIME_BYTES["cpu" if hardware.device is None else "cuda"],
        loading_bytes=round(stored),
        sent_bytes=round(sent),
        seconds_per_step=_seconds(plan, shape, config, args, hardware, flops, sent),
    )


def _after_activations(kind: str, gradients: float, gathered: float, microbatches: int) -> float:
    """What comes only while activations and logits go: in a step of one micro-batch all gradients, but for those that DeepSpeed keeps
    room for; ZeRO-2's buckets in any step."""
    if kind == "zero2":
        return gradients + gathered if microbatches == 1 else gathered
    return gradients if microbatches == 1 and kind != "zero3" else 0.0


def _gathered(shape: ModelShape, trained: int, total: int, width: int, kind: str, ranks: int, logits: float) -> float:
    """DDP's buckets hold every gradient once more. Sharded: two layers (one computes, the next comes) and what is outside of the layers,
    more with ZeRO-3; the whole gradients of one layer and of the outside in `width`, and in float32 on their way, where `logits` were."""
    if ranks == 1:
        return 0.0
    if kind in ("ddp", "zero2"):
        return max(trained * 4.0, min(FIRST_EXCHANGE_BYTES, total * 4.0))
    layer, outside = shape.layer_parameters, shape.num_parameters - shape.num_layers * shape.layer_parameters
    gradients = trained / max(total, 1)  # with an adapter next to nothing
    weights = 2 * layer + outside
    if kind == "zero3":
        weights = max(weights, min(total, ZERO3_LIVE_PARAMETERS))
    return width * weights + max(gradients * (width + 4) * max(layer, outside) - logits, 0.0)


def _seconds(
    plan: Plan, shape: ModelShape, config: RunConfig, args: ORPOConfig, hardware: Hardware, flops: float | None, sent: float
) -> float | None:
    peak = flops if hardware.device is None else hardware.device.flops * MATMUL_SHARE / 0.5  # the plan's own share is 0.5
    if peak is None:
        return None
    from orpo.training.planning import flops_per_weight

    per_weight = flops_per_weight(config, args) + 2 * plan.recomputed_layers / max(plan.num_layers, 1)
    compute = plan.tokens_per_step * per_weight * shape.num_matmul / (peak * 0.5)
    if hardware.device is None:
        return compute
    link = hardware.device.link_bytes_s if hardware.num_machines == 1 else hardware.device.network_bytes_s
    return max(compute, sent / (link * LINK_SHARE))
