"""The kernels for attention over a packed row: what each can do, what is known of it, and which one a run takes.

`attention_kernel` of the configuration names one; `auto` takes what was measured to be the fastest on such a device, and where nothing was,
`sdpa`. One that was asked for where it cannot train is refused at the start, never replaced in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orpo.engine import flex, varlen
from orpo.engine.layout import PackedLayout
from orpo.engine.rule import AttentionRule
from orpo.engine.sending import class_of
from orpo.errors import UserError

KEY = "attention_kernel"
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a kernel can do.

    Attributes:
        trains_on: device types with forward and backward pass; None: all.
        dtypes: of the computation; None: all.
        has_softcap, has_sinks: whether it knows soft caps on the scores (Gemma 2) and learned sinks (gpt-oss).
        proved: against attention written out in float64.
    """

    trains_on: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    has_softcap: bool
    has_sinks: bool
    proved: str


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(None, None, True, True, "forward and backward on a CPU; the only one that has trained a model"),
    "flex": Kernel(("cuda",), None, True, True, "on a CPU, backward by the operator's arithmetic; compiled for an H100, not run on one"),
    "varlen": Kernel(("cuda",), HALF, False, False, "what is handed to the kernel, on a CPU; the kernel itself was not run"),
}
MEASURED: dict[str, str] = {}
"""Part of a GPU's name -> the kernel that was the fastest there, in `benchmarks/gpu.py`, and passed `make test-cuda`. Nothing was yet."""


def resolve(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel of a run that computes in `dtype` on `device`.

    Raises:
        UserError: the one that was asked for cannot train there.
    """
    if requested != "auto":
        _require(requested, device, dtype)
        return requested
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((name for part, name in MEASURED.items() if part in card and _problem(name, device, dtype) is None), "sdpa")


def suited(requested: str, name: str, model: nn.Module) -> str:
    """The kernel for a model: `auto` steps back to `sdpa` from one that lacks what the model's attention has.

    Raises:
        UserError: the one that was asked for lacks it.
    """
    kernel = KERNELS[name]
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    lacks = []
    if not kernel.has_softcap and getattr(text, "attn_logit_softcapping", None) is not None:
        lacks.append("a soft cap on its attention scores")
    if not kernel.has_sinks and any(hasattr(module, "sinks") for module in model.modules()):
        lacks.append("attention sinks")
    if not lacks:
        return name
    if requested == "auto":
        return "sdpa"
    raise _cannot(name, f"has not what {class_of(model).__name__} needs: {' and '.join(lacks)}")


def _require(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if (problem := _problem(name, device, dtype)) is not None:
        raise _cannot(name, problem)


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    kernel = KERNELS[name]
    if kernel.trains_on is not None and device.type not in kernel.trains_on:
        return f"trains on {' and '.join(kernel.trains_on)} alone, and this run is on {device.type}"
    if kernel.dtypes is not None and dtype not in kernel.dtypes:
        names = " or ".join(_name_of(kind) for kind in kernel.dtypes)
        return f"computes in {names} alone, and this run is in {_name_of(dtype)}"
    return None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cannot(name: str, why: str) -> UserError:
    return UserError(f"{name!r} {why}", where=KEY, mend=f"{KEY}: auto, which takes sdpa wherever no other was measured to be faster")


def run_kernel(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule) -> Tensor:
    """Attention of a packed row by the kernel that its layout names: query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E).

    Raises:
        UserError: the kernel lacks what this call needs, which the model's configuration did not tell.
    """
    kernel = KERNELS[layout.kernel]
    if (rule.softcap is not None and not kernel.has_softcap) or (rule.sinks_H is not None and not kernel.has_sinks):
        raise _cannot(layout.kernel, "has neither soft caps nor sinks, and this model's attention asks for them")
    attend = flex.attend if layout.kernel == "flex" else varlen.attend
    return attend(query, key, value, layout, rule).transpose(1, 2).contiguous()


def num_compiled_graphs() -> int:
    """Graphs that torch has compiled in this process so far; 0 where nothing asked it to."""
    import sys

    dynamo = sys.modules.get("torch._dynamo.utils")  # not loaded for this: it takes a second
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
