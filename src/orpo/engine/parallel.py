"""A model's weights spread over the ranks of a run: torch's FSDP2 around each decoder layer and around the whole.

One way on every device: `torch.distributed.fsdp.fully_shard` itself. (accelerate applies it on accelerators alone, and on a CPU trains DDP
without a word.) Gradients are plain sums over ranks: what each rank adds to the loss is already divided by the whole step's counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from orpo.engine.precision import total_norm
from orpo.engine.sending import Sender, class_of
from orpo.engine.shared import unwrap
from orpo.engine.zero import Zero, is_under_zero, own_row, whole_weight
from orpo.errors import UserError
from orpo.system.group import on_all
from orpo.system.ranks import all_reduce_sum, current_ranks


def shard(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[str] = (),
    reshards: bool = True,
    offloads: bool = False,
    per_replica: int = 0,
) -> None:
    """Spread the weights over all ranks, in place; every rank calls it, before the optimizer is made.

    A layer at a time comes from rank 0 onto the device, in the dtype that it is trained in, and is cut into parts before the next: no rank
    has room for more than its parts and one layer, but for what rank 0 has in host memory and has not sent.

    Args:
        model: the same on every rank in shape; rank 0's values are what is spread, the others' weights may be on the meta device.
        device: what is computed on.
        dtype: of the gathered weights and what is computed with them; gradients are summed in float32.
        layers: class names of the modules that are gathered one at a time; by default the model's own decoder layers.
        reshards: give a layer's gathered weights back between its forward and its backward pass.
        offloads: keep shards, gradients and the optimizer's state in host memory.
        per_replica: ranks that share one copy of the model, where there are several copies (hybrid sharding); 0: all of them.

    Raises:
        UserError: no module has a name in `layers`, or weights that cannot be spread.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    units = on_all(lambda: _units(model, layers, per_replica, dtype, device))
    sender = Sender(model, device)
    options: dict[str, Any] = {
        "mesh": _mesh(device.type, per_replica),
        "reshard_after_forward": reshards,
        # Not autocast: the casts of all layers would be kept for the backward pass, a whole model in 16 bits on every rank.
        "mp_policy": MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32),
        "offload_policy": CPUOffloadPolicy() if offloads and device.type != "cpu" else OffloadPolicy(),  # there they are on a CPU
    }
    for unit in units:
        sender.bring(unit)
        fully_shard(unit, **options)
    sender.bring(model)
    # What is left (embeddings, last norm, head) is needed again at once by the backward pass: it stays gathered in between.
    fully_shard(model, **{**options, "reshard_after_forward": False})
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled reduction
    require_sharded(model)


def _units(model: nn.Module, layers: Sequence[str], per_replica: int, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
    size = current_ranks().world_size
    if per_replica and size % per_replica:
        raise UserError(f"{size} processes cannot form replicas of {per_replica}", where="fsdp", mend="full_shard spreads over all of them")
    _refuse_quantized(model, dtype, device)
    return decoder_layers(model, layers)


def decoder_layers(model: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """The modules that are gathered one at a time.

    Raises:
        UserError: a name that no module's class has.
    """
    core = unwrap(model)
    known = {class_of(module).__name__ for module in core.modules()}
    if missing := [name for name in names if name not in known]:
        own = sorted(getattr(core, "_no_split_modules", None) or ())
        raise UserError(
            f"no module of {class_of(core).__name__} is a {missing[0]}",
            where="fsdp_config.transformer_layer_cls_to_wrap",
            expected=f"names of its layers: {', '.join(own) or 'classes of its modules'}",
            mend="leave it out: the model's own decoder layers are taken",
        )
    wanted = set(names or getattr(core, "_no_split_modules", None) or ())
    if found := list(_outermost(core, wanted)):
        return found
    stacks: list[nn.Module] = [module for module in core.modules() if isinstance(module, nn.ModuleList)]
    return list(max(stacks, key=_num_weights, default=nn.ModuleList()).children())


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    """Modules of these classes, but none inside another: Mamba names its blocks and their mixers, and a weight is cut once."""
    for child in module.children():
        if class_of(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def _num_weights(module: nn.Module) -> int:
    return sum(map(num_elements, module.parameters()))


def num_elements(weight: Tensor) -> int:
    """Elements of the whole weight; under ZeRO-3 a weight that is not gathered says that it has none."""
    return whole_shape(weight).numel()


def whole_shape(weight: Tensor) -> torch.Size:
    """Shape of the whole weight, also under ZeRO-3."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def _mesh(device: str, per_replica: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    size = current_ranks().world_size
    if not per_replica or per_replica == size:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (size // per_replica, per_replica), mesh_dim_names=("replicate", "shard"))


def _refuse_quantized(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    odd = next(((name, weight.dtype) for name, weight in model.named_parameters() if not weight.is_floating_point()), None)
    if odd is not None:
        raise UserError(
            f"{odd[0]} is stored as {str(odd[1]).removeprefix('torch.')}, which cannot be spread over ranks",
            where="fsdp",
            expected="weights stored as floating-point numbers",
            mend="bnb_4bit_quant_storage: bfloat16, or parallelism: ddp",
        )
    if device.type == "cpu" and any(getattr(weight, "quant_state", None) is not None for weight in model.parameters()):
        raise UserError(
            "bitsandbytes packs four-bit weights anew on a CPU, which their parts do not survive", where="fsdp", mend="parallelism: ddp"
        )
    packed = (weight.dtype for weight in model.parameters() if getattr(weight, "quant_state", None) is not None)
    if rounded := next((kind for kind in packed if dtype not in (torch.float32, kind)), None):
        given, wanted = (str(kind).removeprefix("torch.") for kind in (rounded, dtype))
        raise UserError(
            f"packed weights are stored as {given} and gathered in {wanted}, which would round their bits",
            where="bnb_4bit_quant_storage",
            mend=f"bnb_4bit_quant_storage: {wanted}",
        )


def checksum(tensor: Tensor) -> Tensor:
    """A sum of a tensor's bits, computed where it lies; int64, scalar."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().reshape(-1).view(bits).sum(dtype=torch.int64)


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def is_sharded(model: nn.Module) -> bool:
    """Whether no rank has the weights, or what trains them, alone: `shard` or ZeRO has been applied."""
    return any(True for _ in _sharded_modules(model)) or any(is_under_zero(weight) for weight in model.parameters())


def is_in_parts(model: nn.Module) -> bool:
    """Whether the weights themselves are in parts: FSDP2 or ZeRO-3 has been applied."""
    return any(is_shard(weight) or hasattr(weight, "ds_tensor") for weight in model.parameters())


def require_sharded(model: nn.Module) -> None:
    """Hold what was asked for against what is: every weight is in shards.

    Raises:
        RuntimeError: one is not.
    """
    whole = [name for name, parameter in model.named_parameters() if not is_shard(parameter)]
    if whole:
        raise RuntimeError(f"FSDP2 was asked for and not applied to {len(whole)} weights, {', '.join(whole[:3])} among them")


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only (a DTensor)."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in place; of a weight under ZeRO-3 as one row."""
    if hasattr(tensor, "ds_tensor"):
        return own_row(tensor)
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, without a graph; all ranks call it."""
    if is_under_zero(tensor):
        return whole_weight(tensor)
    tensor = tensor.detach()
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


@contextmanager
def trained_alone(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Under FSDP2 no other weight gets a gradient while the context lasts: a backward pass would make all of them, a model in float32."""
    kept = {id(weight) for weight in weights}
    others = [weight for weight in model.parameters() if weight.requires_grad and is_shard(weight) and id(weight) not in kept]
    for weight in others:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in others:
            weight.requires_grad_(True)


def gradients_of(loss: Tensor, weights: Sequence[nn.Parameter], model: nn.Module, zero: Zero | None = None) -> Sequence[Tensor | None]:
    """Gradients of some weights, of a spread model in parts; none is left behind. All ranks call it where weights are in parts.

    Args:
        weights: as they were before the forward pass, in which a spread model shows gathered ones.
        zero: what holds the model, where DeepSpeed does and its weights are in parts.
    """
    if zero is not None:
        return zero.gradients(loss, weights)
    if not any(is_shard(weight) for weight in weights):
        return list(torch.autograd.grad(loss, weights, allow_unused=True))
    loss.backward()
    found = [weight.grad for weight in weights]
    forget_gradients(model)
    return found


def forget_gradients(model: nn.Module, zero: Zero | None = None) -> None:
    """No gradients, and no gathered weights, whatever was begun."""
    model.zero_grad(set_to_none=True)  # those of weights that are gathered now
    if zero is not None:
        zero.drop()
    if callable(forget := getattr(model, "reset_iter_state", None)):  # of FSDP2, from torch 2.13 on
        forget()
    reshard(model)
    model.zero_grad(set_to_none=True)


def reshard(model: nn.Module) -> None:
    """Give gathered weights back after a forward pass that no backward pass follows."""
    for module in _sharded_modules(model):
        module.reshard()


def computing_device(model: nn.Module) -> torch.device:
    """Where a model computes: of a spread one not where its parts lie, which may be offloaded."""
    weight: Any = next(model.parameters())
    return torch.device(weight.device_mesh.device_type) if is_shard(weight) else weight.device


def norm_of(gradients: Iterable[Tensor], *, are_rows: bool = False) -> Tensor:
    """Euclidean norm of all gradients of the whole model, the same on every rank; all ranks call it where they are in parts.

    Args:
        are_rows: they are plain tensors that are parts, as `Zero.gradients` gives them.
    """
    gradients = list(gradients)
    norm = total_norm([own_part(gradient) for gradient in gradients])
    if not are_rows and not any(is_shard(gradient) for gradient in gradients):
        return norm
    return all_reduce_sum(norm.double().square() / (1 if are_rows else _num_copies(gradients[0]))).sqrt()


def _num_copies(gradient: Any) -> int:
    """Ranks that hold the very same part (hybrid sharding)."""
    mesh = gradient.device_mesh
    return int(mesh.size(0)) if mesh.ndim == 2 else 1


def synchronised(accelerator: Any, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
    """Where gradients are reduced: with the last micro-batch of a step, or with each one where a rank has no room for whole gradients."""
    return nullcontext() if is_last or is_sharded(model) else accelerator.no_sync(model)


def whole_state(model: Any, *, is_kept: bool) -> dict[str, Tensor]:
    """The whole weights of a model that is in parts, on the CPU, one gathered at a time; of an adapted model those an adapter may hold.

    Args:
        is_kept: whether this rank wants them; the others help and get an empty dict. All ranks call it.
    """
    is_adapted = getattr(model, "peft_config", None) is not None
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_adapted and name not in trained and "embed" not in name and "lm_head" not in name:
            continue
        whole = gathered(tensor)
        if is_kept:
            state[name] = whole.to("cpu", copy=True)
        del whole
    return state
