"""Training state on disk without pickle: structure as JSON, tensors as safetensors, every bit and dtype kept.

`torch.save` pickles, and loading a pickle runs what is in it. Here a state (optimizer, scheduler, random numbers, scaler) is a tree of
plain values; whatever is not one of the few kinds below is refused at save time, with its place in the tree.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
OPTIMIZER = "optimizer"
SCHEDULER = "scheduler"
SCALER = "scaler"

_TAG = "$"
"""Key that marks a value JSON has no word for; a dict that has this key itself is written as a list of items."""

Tree = Any


def save_state(state: Tree, folder: Path | str, name: str) -> None:
    """Write a tree of None, bool, int, float, str, bytes, list, tuple, dict, numpy arrays and tensors as `<name>.json` and
    `<name>.safetensors`.

    Tensors keep dtype, shape and bits, and are read back on the CPU; the same tensor in two places is written once and read back as one.
    Floats keep their value exactly, infinities and NaN included.

    Raises:
        TypeError: the tree holds something else (a function, an object); the message names the place.
    """
    from safetensors.torch import save_file

    packer = _Packer()
    text = json.dumps(packer.pack(state, name), allow_nan=False)
    folder = Path(folder)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if packer.tensors:
        save_file(packer.tensors, folder / f"{name}.safetensors")


def load_state(folder: Path | str, name: str) -> Tree:
    """Read what `save_state` wrote. Nothing is unpickled or executed.

    Raises:
        CheckpointError: a file is missing or is not what `save_state` writes.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    path, tensor_path = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tensors = {}
        if tensor_path.exists():
            with safe_open(tensor_path, framework="pt") as file:
                # Cloned, because the reader maps the file into memory and a pruned checkpoint must not stay open.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return _unpack(tree, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the state {name!r} cannot be read ({type(error).__name__}: {error})"[:400], where=str(folder)) from None


class _Packer:
    """Turns a tree into JSON values and a flat dict of tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._sources: list[torch.Tensor] = []
        self._storages: set[int] = set()

    def pack(self, value: Tree, place: str) -> Any:
        import numpy as np
        import torch

        # `type`, not `isinstance`: numpy's float64 is a float and an enum may be a str, and each has to come back as what it was.
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}  # JSON has no word for NaN
        if isinstance(value, torch.Tensor):
            return {_TAG: "tensor", "name": self._tensor(value, place)}
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
            array = np.asarray(value)
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return {_TAG: kind, "dtype": array.dtype.str, "shape": list(array.shape), "base64": _to_base64(array.tobytes())}
        if isinstance(value, bytes):
            return {_TAG: "bytes", "base64": _to_base64(value)}
        if isinstance(value, torch.dtype):
            return {_TAG: "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            items = [self.pack(item, f"{place}[{index}]") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
        if isinstance(value, dict):
            return self._dict(value, place)
        raise TypeError(f"{place}: a {type(value).__name__} cannot be saved without pickle")

    def _dict(self, value: dict[Any, Any], place: str) -> Any:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: self.pack(item, f"{place}.{key}") for key, item in value.items()}
        # An optimizer's state is keyed by numbers, which JSON's keys would turn into texts.
        items = [[self.pack(key, f"{place} key"), self.pack(item, f"{place}.{key}")] for key, item in value.items()]
        return {_TAG: "dict", "items": items}

    def _tensor(self, tensor: torch.Tensor, place: str) -> str:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        if tensor.layout is not _strided():
            raise TypeError(f"{place}: a tensor of layout {tensor.layout} cannot be saved")
        plain = tensor.detach().to("cpu").contiguous()
        pointer = plain.untyped_storage().data_ptr()
        if pointer in self._storages or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()  # safetensors refuses tensors that share memory
            pointer = plain.untyped_storage().data_ptr()
        self._storages.add(pointer)
        name = f"{len(self.tensors):05d}"
        self.tensors[name] = plain
        self._names[id(tensor)] = name
        self._sources.append(tensor)  # keeps its id from being given to another
        return name


def _strided() -> torch.layout:
    import torch

    return torch.strided


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _unpack(item, tensors) for key, item in value.items()}
    kind = value[_TAG]
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in value["items"])
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["items"]}
    return _unpack_leaf(kind, value)


def _unpack_leaf(kind: str, value: dict[str, Any]) -> Any:
    import numpy as np
    import torch

    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value["value"]]
    if kind == "bytes":
        return base64.b64decode(value["base64"], validate=True)
    if kind in ("array", "scalar"):
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"array of dtype {dtype}")
        array = np.frombuffer(base64.b64decode(value["base64"], validate=True), dtype=dtype).reshape(value["shape"])
        # A copy, because what lies over the bytes of the file is read-only.
        return array.copy() if kind == "array" else array.reshape(()).item() if dtype.kind == "b" else array.reshape(())[()]
    if kind == "dtype":
        dtype_found = getattr(torch, value["value"])
        if not isinstance(dtype_found, torch.dtype):
            raise ValueError(f"{value['value']!r} is not a dtype")
        return dtype_found
    raise ValueError(f"unknown kind {kind!r}")


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path | str) -> None:
    """Write any torch optimizer's `state_dict()` as optimizer.json and optimizer.safetensors.

    The shape of every parameter is written too, so that a changed model is told as such.
    """
    save_state({"state": optimizer.state_dict(), "shapes": _shapes(optimizer)}, folder, OPTIMIZER)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path | str) -> None:
    """Restore what `save_optimizer` wrote, with each tensor's dtype and bits as they were.

    `Optimizer.load_state_dict` casts floating-point state to its parameter's dtype (fp32 moments of bf16 weights would lose bits), so the
    tensors are put in place again after it, on the device that it chose.

    Raises:
        CheckpointError: unreadable, or of parameters with other shapes.
    """
    saved = load_state(folder, OPTIMIZER)
    if saved["shapes"] != _shapes(optimizer):
        raise CheckpointError(
            "the optimizer state belongs to a model with other trainable parameters",
            where=str(folder),
            expected=f"{sum(map(len, _shapes(optimizer)))} tensors of the same shapes, found {sum(map(len, saved['shapes']))}",
            mend="resume with the model and adapter settings of the run, or start in a new folder",
        )
    optimizer.load_state_dict(saved["state"])
    inner = unwrapped(optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    indices = [index for group in saved["state"]["param_groups"] for index in group["params"]]
    by_index = saved["state"]["state"]
    for index, parameter in zip(indices, parameters, strict=True):
        if index in by_index and parameter in inner.state:
            inner.state[parameter] = _exact(inner.state[parameter], by_index[index])


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _exact(loaded: Any, saved: Any) -> Any:
    """The loaded state with the saved tensors in it, on the loaded ones' devices."""
    import torch

    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return saved if loaded.dtype == saved.dtype and loaded.device == saved.device else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _exact(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    return loaded


def save_scheduler(scheduler: Any, folder: Path | str) -> None:
    """Write a learning-rate scheduler's `state_dict()`."""
    save_state(scheduler.state_dict(), folder, SCHEDULER)


def load_scheduler(scheduler: Any, folder: Path | str) -> None:
    """Restore what `save_scheduler` wrote. Raises CheckpointError if it cannot be read."""
    scheduler.load_state_dict(load_state(folder, SCHEDULER))


def save_scaler(scaler: Any, folder: Path | str) -> None:
    """Write a gradient scaler's `state_dict()` (fp16)."""
    save_state(scaler.state_dict(), folder, SCALER)


def load_scaler(scaler: Any, folder: Path | str) -> None:
    """Restore what `save_scaler` wrote. Raises CheckpointError if it cannot be read."""
    scaler.load_state_dict(load_state(folder, SCALER))


def rng_name(rank: int) -> str:
    """File name, without ending, of a rank's random-number state."""
    return f"rng-{rank}"


def save_rng(folder: Path | str, *, rank: int = 0) -> None:
    """Write this process's random-number states: python, numpy, torch, and the current accelerator's."""
    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available() and module.is_initialized():
            state[kind] = module.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    save_state(state, folder, rng_name(rank))


def load_rng(folder: Path | str, *, rank: int = 0) -> bool:
    """Restore what `save_rng` wrote for this rank; False, with a warning, if the checkpoint has none (it was written by fewer ranks).

    Raises:
        CheckpointError: it is there but cannot be read.
    """
    import numpy as np
    import torch

    if not (Path(folder) / f"{rng_name(rank)}.json").exists():
        logger.warning(
            "the checkpoint has no random-number state for rank %d; it was written by fewer processes, so this rank starts from the seed",
            rank,
        )
        return False
    state = load_state(folder, rng_name(rank))
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            if kind in state and module.is_available():
                module.set_rng_state(state[kind])
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random-number state cannot be restored ({error})", where=str(folder)) from None
    return True
