"""Weights and optimizer state of a run whose ranks hold parts of them: every rank writes its own parts, any number of ranks reads them.

Tensors go into one safetensors file per rank, in the form of torch's distributed checkpoints (`HuggingFaceStorageWriter`), so that torch's
reader and its tools read them. They are written here, for that writer pickles what it sends between ranks, and a rank that fails in it
leaves the others waiting. What is not a tensor in parts (param groups, step counts) goes into JSON. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.checkpoint.state import OPTIMIZER, load_state, save_state, unwrapped
from orpo.errors import CheckpointError
from orpo.system.parts import FOLDER, WEIGHTS, read_parts

if TYPE_CHECKING:
    import torch

MOMENTS = "moments"


def save_parts(tensors: Mapping[str, torch.Tensor], folder: Path, name: str, *, rank: int, writes_whole: bool | None = None) -> None:
    """Write what this rank holds of some tensors.

    Args:
        tensors: by name.
        folder: the checkpoint.
        name: of the set of tensors.
        rank: this process's.
        writes_whole: whether tensors that are whole here are this rank's to write; by default they are rank 0's.

    Raises:
        CheckpointError: the file cannot be read again as it was written.
    """
    from safetensors.torch import save_file

    parts, offsets = {}, {}
    for key, tensor in tensors.items():
        found = _own_part(tensor, writes_whole=rank == 0 if writes_whole is None else writes_whole)
        if found is not None:
            parts[key], offsets[key] = found[0].detach().cpu().contiguous(), {"saved_offsets": found[1]}
    target = folder / FOLDER / name
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    save_file(parts, path, metadata={"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)})
    _require_readable(path, parts)


def _own_part(tensor: torch.Tensor, *, writes_whole: bool) -> tuple[torch.Tensor, list[int]] | None:
    """(part, where it begins in the whole), or None where another rank writes it or there is nothing of it here."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return (tensor, [0] * tensor.dim()) if writes_whole else None
    position = tensor.device_mesh.get_coordinate()
    copies = zip(tensor.placements, position or (), strict=True)
    # Of a mesh with copies the first one writes; and a small tensor may leave the last ranks with nothing.
    if any(place.is_replicate() and index for place, index in copies) or not tensor.to_local().numel():
        return None
    return tensor.to_local(), list(tensor.__create_chunk_list__()[0].offsets)


def _require_readable(path: Path, parts: Mapping[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"what was written cannot be read ({error})", where=str(path)) from None
    if found != {key: list(part.shape) for key, part in parts.items()}:
        raise CheckpointError("what was written is not what is in memory", where=str(path))


def saved_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What of a model a checkpoint keeps, by name: with an adapter what is trained, else all weights and lasting buffers."""
    is_adapted = getattr(model, "peft_config", None) is not None
    if is_adapted:
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    kept = model.state_dict().keys()  # of the buffers; rotary frequencies, for instance, are made anew by every model
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**{name: weight.detach() for name, weight in model.named_parameters()}, **buffers}


def save_weights(model: torch.nn.Module, folder: Path, *, rank: int) -> None:
    """Write this rank's part of the weights."""
    save_parts(saved_weights(model), folder, WEIGHTS, rank=rank)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put the weights of a sharded checkpoint into a model, whole or sharded.

    Raises:
        CheckpointError: as `read_parts`.
    """
    read_parts(saved_weights(model), folder)


def save_optimizer_parts(optimizer: Any, model: torch.nn.Module, folder: Path, *, rank: int) -> None:
    """Write this rank's part of an optimizer's state; rank 0 adds what is the same on all.

    Raises:
        TypeError: the optimizer keeps something of another shape than its weight; the message names it.
    """
    inner = unwrapped(optimizer)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, dict[str, Any]] = {}
    for parameter, state in inner.state.items():
        name = names[parameter]
        scalars[name], dtypes[name] = {}, {}
        for key, value in state.items():
            if getattr(value, "shape", None) == parameter.shape and value.dim():
                tensors[f"{name}.{key}"], dtypes[name][key] = value, value.dtype
            elif getattr(value, "dim", int)() == 0:
                scalars[name][key] = value
            else:
                raise TypeError(f"{name}.{key}: a {type(value).__name__} of another shape than its weight cannot be saved in parts")
    save_parts(tensors, folder, MOMENTS, rank=rank)
    if rank == 0:
        groups = [{**group, "params": [names[parameter] for parameter in group["params"]]} for group in inner.param_groups]
        save_optimizer_facts(groups, scalars, dtypes, folder)


def save_optimizer_facts(
    groups: list[dict[str, Any]], scalars: Mapping[str, dict[str, Any]], dtypes: Mapping[str, dict[str, torch.dtype]], folder: Path
) -> None:
    """Write what of an optimizer is the same on all ranks.

    Args:
        groups: torch's param groups, with names in place of weights.
        scalars: of each weight, what is kept once for all of it.
        dtypes: of each weight, the dtype of each tensor of its size that is kept (`MOMENTS`, as `weight.key`).
        folder: the checkpoint.
    """
    save_state({"groups": groups, "scalars": scalars, "dtypes": dtypes}, folder, OPTIMIZER)


def load_optimizer_facts(folder: Path | str, own: list[list[str]]) -> dict[str, Any]:
    """What `save_optimizer_facts` wrote, or the same of a whole optimizer's state, whose tensors are then in `whole`.

    Args:
        folder: the checkpoint.
        own: names of the weights of each param group.

    Raises:
        CheckpointError: unreadable, or of other weights.
    """
    saved = load_state(folder, OPTIMIZER)
    if "groups" not in saved:
        saved = _named(saved, own, where=str(folder))
    if [group["params"] for group in saved["groups"]] != own:
        mend = "resume with the model and adapter settings of the run, or start in a new folder"
        raise CheckpointError("the optimizer state belongs to a model with other trainable weights", where=str(folder), mend=mend)
    return saved


def load_optimizer_parts(optimizer: Any, model: torch.nn.Module, folder: Path | str) -> None:
    """Restore an optimizer, over whole weights or weights in parts, from a checkpoint of either kind.

    Raises:
        CheckpointError: unreadable, or of other weights.
    """
    import torch

    inner = unwrapped(optimizer)
    named = dict(model.named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    own = [[names[parameter] for parameter in group["params"]] for group in inner.param_groups]
    saved = load_optimizer_facts(folder, own)
    states: dict[str, dict[str, Any]] = {name: dict(scalars) for name, scalars in saved["scalars"].items()}
    parts: dict[str, torch.Tensor] = {}
    for name, kinds in saved["dtypes"].items():
        for key, dtype in kinds.items():
            parts[f"{name}.{key}"] = states[name][key] = torch.zeros_like(named[name].detach(), dtype=dtype)
    if "whole" in saved:
        for name, value in saved["whole"].items():
            parts[name].copy_(_as_parts(value, parts[name]))
    elif parts:
        read_parts(parts, Path(folder), MOMENTS)
    groups = [
        {**group, "params": current["params"]} for group, current in zip(saved["groups"], inner.state_dict()["param_groups"], strict=True)
    ]
    # The groups alone: `load_state_dict` would cast the moments to their weights' dtype.
    inner.load_state_dict({"state": {}, "param_groups": groups})
    for group in inner.param_groups:
        for parameter in group["params"]:
            if names[parameter] in states:
                inner.state[parameter] = _placed(states[names[parameter]], parameter, group)


def _named(saved: dict[str, Any], own: list[list[str]], *, where: str) -> dict[str, Any]:
    """A whole optimizer's state by the names of its weights."""
    groups, by_index = saved["state"]["param_groups"], saved["state"]["state"]
    if [len(group["params"]) for group in groups] != [len(names) for names in own]:
        raise CheckpointError("the optimizer state belongs to a model with other trainable weights", where=where)
    result: dict[str, Any] = {"groups": [], "scalars": {}, "dtypes": {}, "whole": {}}
    for group, names in zip(groups, own, strict=True):
        result["groups"].append({**group, "params": names})
        for index, name in zip(group["params"], names, strict=True):
            state = by_index.get(index)
            if state is None:
                continue
            moments = {key: value for key, value in state.items() if getattr(value, "dim", int)() > 0}
            result["scalars"][name] = {key: value for key, value in state.items() if key not in moments}
            result["dtypes"][name] = {key: value.dtype for key, value in moments.items()}
            result["whole"] |= {f"{name}.{key}": value for key, value in moments.items()}
    return result


def _as_parts(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _placed(state: dict[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Step counts where the optimizer wants them: on the device for fused and captured steps, else on the CPU."""
    import torch

    wants_device = group.get("fused") or group.get("capturable")
    return {
        key: value.to(parameter.device) if wants_device and isinstance(value, torch.Tensor) and value.dim() == 0 else value
        for key, value in state.items()
    }
