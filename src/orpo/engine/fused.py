"""Leaner forms of modules that every layer has, used only where they are proven equal on the module itself.

Written out, a layer's RMS norms and its gated MLP keep three to five intermediate tensors each for the backward pass and visit memory
once per elementary operation. As one autograd function each they keep their inputs and nothing else. A linear layer with a LoRA adapter
adds the adapter's part inside its product, where PEFT goes over the whole output twice more, forward and backward. A module is recognised
by what it has, not by its name's origin, and then compared with its own forward, values and gradients; where they differ (Gemma's norm
multiplies by 1 + weight) it stays as it is.

CPU only: on a GPU nothing of this has been measured.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo.engine.parallel import is_in_parts, is_shard, whole_shape

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference from the module's own forward and gradients, relative to their norm, in float32."""


@contextmanager
def fused_modules(model: nn.Module) -> Iterator[int]:
    """The model's norms, gated MLPs and adapted layers in their lean form while the context lasts; gives the number of modules replaced."""
    changed = []
    is_drawn = is_in_parts(model)  # whose weights are nowhere whole
    proven: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        for matches, forward in _FORMS:
            # A forward of this instance alone is somebody's hook (accelerate puts its own there); it stays.
            if not matches(module) or "forward" in module.__dict__:
                continue
            kind = (type(module), forward, _settings(module), tuple(map(whole_shape, module.parameters())))
            if kind not in proven:
                proven[kind] = _is_equal(_with_drawn_weights(module) if is_drawn else module, forward)
            if proven[kind]:
                module.forward = MethodType(forward, module)  # bound, so that a deep copy of the model binds to the copy
                changed.append(module)
    logger.debug("%d norms, MLPs and adapted layers run in their lean form", len(changed))
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
    weight = module._parameters.get("weight")  # of this module alone: PEFT's wrapper of embeddings computes what it calls its weight
    return type(module).__name__.endswith("RMSNorm") and weight is not None and weight.dim() == 1 and _epsilon(module) is not None


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


def _adapter_of(module: Any) -> str | None:
    """The adapter of a linear layer to which PEFT adds scaling * B(A(x)) and nothing else, over a frozen weight; else None."""
    base = getattr(module, "base_layer", None)
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "active_adapters")):
        return None
    if not _is_bare_linear(base, may_have_bias=True) or any(parameter.requires_grad for parameter in base.parameters()):  # type: ignore[union-attr]
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or names[0] in module.lora_variant or module.disable_adapters or module.merged:
        return None
    dropout = module.lora_dropout[names[0]]
    drops = module.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0
    return names[0] if not drops and all(map(_is_bare_linear, (module.lora_A[names[0]], module.lora_B[names[0]]))) else None


def _is_adapted_linear(module: nn.Module) -> bool:
    return _adapter_of(module) is not None


def _adapted_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = _adapter_of(module)  # asked at each call: an adapter can be switched off for a while, or merged
    if name is not None and not args and not kwargs and not torch.is_autocast_enabled("cpu"):
        base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
        if x.dtype == base.weight.dtype == down.dtype == up.dtype:
            return _AdaptedLinear.apply(x, base.weight, base.bias, down, up, float(module.scaling[name]))
    return type(module).forward(module, x, *args, **kwargs)


_FORMS: tuple[tuple[Callable[[nn.Module], bool], Callable[..., Tensor]], ...] = (
    (_is_rms_norm, _rms_norm_forward),
    (_is_gated_mlp, _gated_mlp_forward),
    (_is_adapted_linear, _adapted_forward),
)


def _is_bare_linear(layer: Any, *, may_have_bias: bool = False) -> bool:
    """A linear layer with a weight and nothing else: no bias, no adapter around it, nobody who wants to be told of its calls."""
    # Not isinstance: bitsandbytes' quantized layers are subclasses, and compute something else.
    if type(layer) is not nn.Linear:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (may_have_bias or layer.bias is None) and (type(layer.weight) is nn.Parameter or is_shard(layer.weight)) and not any(hooks)


def _with_drawn_weights(module: nn.Module) -> nn.Module:
    """A copy with weights of its own, the same on every rank, and without anybody's hooks, which would gather the true ones."""
    generator = torch.Generator().manual_seed(3)
    drawn = {id(weight): _drawn(weight, generator) for weight in module.parameters()}
    return _copied(module, drawn)


def _copied(module: nn.Module, weights: dict[int, nn.Parameter]) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__.update({name: type(hooks)() for name, hooks in vars(module).items() if "_hooks" in name and isinstance(hooks, dict)})
    twin.__dict__["_parameters"] = {name: None if own is None else weights[id(own)] for name, own in module._parameters.items()}
    twin.__dict__["_modules"] = {name: None if child is None else _copied(child, weights) for name, child in module._modules.items()}
    return twin


def _drawn(weight: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(0.1 * torch.randn(whole_shape(weight), generator=generator), requires_grad=weight.requires_grad)


def _is_equal(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether the lean form gives the module's own values and gradients on random input."""
    weight = next(module.parameters())
    wide = getattr(module, "gate_proj", module)
    width = weight.shape[-1] if weight.dim() == 1 else getattr(wide, "in_features", 0)
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not width:
        return False
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if (name := _adapter_of(module)) is not None:
        # A new adapter's B is 0: it would add nothing, and its A would have no gradient to compare.
        module = copy.deepcopy(module)
        nn.init.normal_(module.lora_B[name].weight, generator=torch.Generator().manual_seed(2))  # type: ignore[index, union-attr]
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
        # By the norm: no copy of squares as wide as the input is written.
        inverse_rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        # Rounded before the weight, as transformers does it: in bf16 the other order gives other bits.
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
        # In place from here on, so the order matters: `silu` was needed whole above, `d_product` is until it is multiplied by `up`.
        d_up = silu.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(up), gate)
        d_x = torch.addmm(d_gate @ gate_weight, d_up, up_weight).view(*grads[0].shape[:-1], -1) if wants_x else None
        d_weights = [part.t() @ x if wanted else None for part, wanted in zip((d_gate, d_up), wants_weights, strict=False)]
        return d_x, *d_weights, d_down


class _AdaptedLinear(torch.autograd.Function):
    """x W' + b + scaling * (x A') B' over a frozen W; keeps x and the few numbers of x A'.

    The adapter's part is added inside its own product, forward and backward: no tensor as wide as the layer's output is written for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows @ down.t()
        ctx.save_for_backward(x, weight, down, up, narrow)
        ctx.scaling = scaling
        return F.linear(rows, weight, bias).addmm_(narrow, up.t(), alpha=scaling).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, narrow = ctx.saved_tensors
        wants_x, _, _, wants_down, wants_up, _ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        d_narrow = (grad @ up).mul_(ctx.scaling) if wants_x or wants_down else None
        d_up = (grad.t() @ narrow).mul_(ctx.scaling) if wants_up else None
        d_down = d_narrow.t() @ x.reshape(-1, x.shape[-1]) if wants_down else None  # type: ignore[union-attr]
        d_x = (grad @ weight).addmm_(d_narrow, down).view(x.shape) if wants_x else None
        return d_x, None, None, d_down, d_up, None
