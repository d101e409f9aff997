"""Process 0's weights brought to every process, a layer at a time: what a model is spread from, held whole by nobody but process 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orpo.models.dtype import dtype_in_training, spread_dtype
from orpo.system.group import on_all
from orpo.system.ranks import current_ranks


@dataclass(slots=True)
class _Place:
    """A weight or buffer, the modules that have it (more than one where it is tied), and what it is to be."""

    tensor: Tensor
    owners: list[tuple[nn.Module, str]]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    is_trained: bool = False


class Sender:
    """Brings parts of a model from process 0 to all, in the dtype that they are trained in. All ranks call every method, in step.

    On the other ranks weights may be on the meta device; whatever they are, rank 0's come in their place. Weights that are shared by
    several modules stay shared.

    Args:
        model: of the same modules on every rank. Its buffers are brought at once: they are few, and none of them is in a part alone.
        device: where they are brought.

    Raises:
        RuntimeError: the ranks' models are not the same.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = torch.device("cpu") if device.type == "cpu" else device  # `cpu:0` is another one, to which all would be copied
        wanted = spread_dtype(model)
        weights, buffers = (dict(_places(model, kind)) for kind in ("_parameters", "_buffers"))
        own = [
            (name, tuple(place.tensor.shape), dtype_in_training(place.tensor, wanted), place.tensor.requires_grad)
            for name, place in weights.items()
        ] + [(name, tuple(place.tensor.shape), place.tensor.dtype, False) for name, place in buffers.items()]
        first = current_ranks().from_first(own)
        on_all(lambda: _require_same([item[0] for item in own], [item[0] for item in first]))
        for place, (_, shape, dtype, is_trained) in zip((*weights.values(), *buffers.values()), first, strict=True):
            place.shape, place.dtype, place.is_trained = shape, dtype, is_trained
        self._left = {id(place.tensor): place for place in weights.values()}
        for place in buffers.values():
            self._send(place)

    def bring(self, module: nn.Module) -> None:
        """All weights of a module that have not been brought yet."""
        for weight in list(module.parameters()):
            if (place := self._left.pop(id(weight), None)) is not None:
                self._send(place)

    def _send(self, place: _Place) -> None:
        import torch.distributed as dist

        if current_ranks().is_first:
            values = place.tensor.detach()
            if (values.device, values.dtype) != (self._device, place.dtype):  # packed weights would take it for more than a move
                values = values.to(device=self._device, dtype=place.dtype)
            values = values.contiguous()
        else:
            values = torch.empty(place.shape, dtype=place.dtype, device=self._device)
        if dist.is_initialized() and values.numel():
            dist.broadcast(values, 0)
        if place.tensor.is_meta:  # which cannot be given values
            filled: Any = nn.Parameter(values, requires_grad=place.is_trained) if isinstance(place.tensor, nn.Parameter) else values
            for owner, name in place.owners:
                (owner._parameters if isinstance(filled, nn.Parameter) else owner._buffers)[name] = filled
        elif values.data_ptr() != place.tensor.data_ptr():
            place.tensor.data = values


def _places(model: nn.Module, kind: str) -> Iterator[tuple[str, _Place]]:
    """The model's weights or buffers by their first name, each once."""
    found: dict[int, tuple[str, _Place]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                found.setdefault(id(tensor), (f"{prefix}.{name}", _Place(tensor, [])))[1].owners.append((module, name))
    yield from found.values()


def _require_same(own: list[str], first: list[str]) -> None:
    if own != first:
        odd = sorted(set(own) ^ set(first)) or ["their order"]
        raise RuntimeError(f"this process and the first have built different models: {', '.join(odd[:3])}")


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was written: `fully_shard` makes one of its own in front of it."""
    from torch.distributed.fsdp import FSDPModule

    kind = type(module)
    return kind.__bases__[-1] if isinstance(module, FSDPModule) else kind
