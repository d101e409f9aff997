"""Dtypes of weights: by name, for computing, and float32 for what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from orpo.errors import UserError
from orpo.system.machine import bf16_is_fast

if TYPE_CHECKING:
    import torch

SPREAD_DTYPE = "spread_dtype"
"""Attribute of a model that was read as it is stored, to be spread over processes: the dtype that its weights come to have then."""

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


def parse_dtype(value: str | torch.dtype | None, *, where: str = "dtype") -> torch.dtype | None:
    """A dtype from its name ("bfloat16", "bf16", "torch.float32"); None for None and "auto"."""
    import torch

    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return value if isinstance(value, torch.dtype) else None
    name = _DTYPES.get(str(value).removeprefix("torch."))
    if name is None:
        raise UserError(f"{value!r} is not a dtype for weights", where=where, expected="float32, bfloat16, float16 or auto")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def upcast_trainable(model: torch.nn.Module) -> str | None:
    """Bring trainable weights that are coarser than fp32 to fp32, in place; says what was done, or None.

    Small steps vanish in bf16: an update of 8e-6 to a weight of 0.05 is below half the spacing of bf16 numbers there.
    """
    import torch

    coarse = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not coarse:
        return None
    names = "/".join(sorted({dtype_name(p.dtype) for p in coarse}))
    for parameter in coarse:
        parameter.data = parameter.data.to(torch.float32)
    return f"{sum(p.numel() for p in coarse):,} trainable weights were in {names} and are trained in float32"


def settle_dtype(weights: Iterable[torch.nn.Parameter], wanted: torch.dtype | None) -> None:
    """Bring weights into the dtype that they are trained in, in place."""
    for weight in weights:
        if (dtype := dtype_in_training(weight, wanted)) != weight.dtype:
            weight.data = weight.data.to(dtype)


def dtype_in_training(weight: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """What a weight is trained in: `wanted`, where it is given, and float32 if it is trained itself."""
    import torch

    dtype = weight.dtype if wanted is None or not weight.is_floating_point() else wanted
    return torch.float32 if weight.requires_grad and dtype in (torch.bfloat16, torch.float16) else dtype


def spread_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """What the weights of a model that was read as it is stored come to be when they are spread; None for every other model."""
    found: torch.dtype | None = getattr(model, SPREAD_DTYPE, None)
    return found


def computing_dtype(device: str | torch.device | None) -> torch.dtype:
    """Of products with weights that are stored quantized: bfloat16 where the device is fast at it, else float32."""
    import torch

    return torch.bfloat16 if bf16_is_fast(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")
