"""Leaner forms of two modules that every layer has, used only where they are proven equal on the module itself.

Written out, a layer's RMS norms and its gated MLP keep three to five intermediate tensors each for the backward pass and visit memory
once per elementary operation. As one autograd function each they keep their inputs and nothing else. A module is recognised by what it
has, not by its name's origin, and then compared with its own forward, values and gradients; where they differ (Gemma's norm multiplies
by 1 + weight) it stays as it is.

CPU only: on a GPU nothing of this has been measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference from the module's own forward and gradients, relative to their norm, in float32."""


@contextmanager
def fused_modules(model: nn.Module) -> Iterator[int]:
    """The model's norms and gated MLPs in their lean form while the context lasts; gives the number of modules replaced."""
    changed = []
    proven: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        for matches, forward in ((_is_rms_norm, _rms_norm_forward), (_is_gated_mlp, _gated_mlp_forward)):
            if not matches(module) or "forward" in module.__dict__:
                continue
            kind = (type(module), forward, _settings(module), tuple(parameter.shape for parameter in module.parameters()))
            if kind not in proven:
                proven[kind] = _is_equal(module, forward)
            if proven[kind]:
                module.forward = MethodType(forward, module)  # bound, so that a deep copy of the model binds to the copy
                changed.append(module)
    logger.debug("%d norms and MLPs run in their lean form", len(changed))
    try:
        yield len(changed)
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What may make two modules of one class compute differently."""
    values = ((name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
    return tuple(sorted(item for item in values if item[0] != "training"))


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _is_gated_mlp(module: nn.Module) -> bool:
    has_parts = all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))
    return has_parts and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _rms_norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, module.weight, _epsilon(module))


def _gated_mlp_forward(module: Any, hidden_states: Tensor) -> Tensor:
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    if all(map(_is_bare_linear, layers)) and not torch.is_autocast_enabled("cpu"):
        return _GatedMLP.apply(hidden_states, *(layer.weight for layer in layers))
    return module.down_proj(_SiLUGate.apply(module.gate_proj(hidden_states), module.up_proj(hidden_states)))


def _is_bare_linear(layer: Any) -> bool:
    """A linear layer with a weight and nothing else: no bias, no adapter around it, nobody who wants to be told of its calls."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and getattr(layer, "bias", None) is None and type(layer.weight) is nn.Parameter and not any(hooks)


def _is_equal(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether the lean form gives the module's own values and gradients on random input."""
    weight = next(module.parameters())
    width = weight.shape[-1] if weight.dim() == 1 else getattr(module.gate_proj, "in_features", 0)
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not width:
        return False
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        with torch.enable_grad():
            results = [function(x) for function in (module.forward, lambda value: forward(module, value))]
            # A direction of its own per output: along the outputs themselves, those of a fresh norm have no gradient to compare.
            direction = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1))
            gradients = [torch.autograd.grad(result, [x, *trained], direction) for result in results]
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    pairs = [tuple(result.detach() for result in results), *zip(*gradients, strict=True)]
    return all(float((a - b).norm()) <= TOLERANCE * float(a.norm()) + 1e-12 for a, b in pairs)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, rms in float32; keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse_rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed, grad = x.float() * inverse_rms, grads[0].float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        inner = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(x.shape[-1])
        return grad.addcmul_(normed, inner, value=-1).mul_(inverse_rms).to(x.dtype), d_weight, None


class _SiLUGate(torch.autograd.Function):
    """silu(gate) * up; keeps its two inputs and computes silu again in the backward pass. For layers with adapters or hooks."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class _GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)); keeps x, gate and up, not the product that goes into `down`: a sixth of what a layer keeps in all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        return F.linear(F.silu(gate).mul_(up), down_weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        wants_x, *wants_weights = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        x, gate, up = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, gate, up))
        silu = F.silu(gate)
        d_down = grad.t() @ (silu * up) if wants_weights[2] else None
        d_product = grad @ down_weight
        d_up = silu.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(up), gate)
        d_x = torch.addmm(d_gate @ gate_weight, d_up, up_weight).view(*grads[0].shape[:-1], -1) if wants_x else None
        d_weights = [part.t() @ x if wanted else None for part, wanted in zip((d_gate, d_up), wants_weights, strict=False)]
        return d_x, *d_weights, d_down
