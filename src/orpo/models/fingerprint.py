"""Facts about weights: their fingerprint and the dtype they are stored in."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.models.find import ModelSource, weight_files
from orpo.models.options import ModelOptions

if TYPE_CHECKING:
    import torch

_FILE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def weights_sha256(model_or_folder: torch.nn.Module | str | Path, *, dtype: torch.dtype | None = None) -> str:
    """Fingerprint of a model's weights: the same for a model and for the folder it was saved to, whatever the sharding.

    sha256 over name, dtype, shape and bytes of every tensor in order of name; a tensor tied to another counts once. Other dtypes are
    other weights. With a `dtype` a model's weights count as if its floating-point weights had it.

    Raises:
        UserError: the folder holds no safetensors.
    """
    readers = _folder_readers(Path(model_or_folder)) if isinstance(model_or_folder, str | Path) else _model_readers(model_or_folder, dtype)
    total = hashlib.sha256()
    names = sorted(readers)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets other threads run
        for name, digest in zip(names, pool.map(lambda name: _tensor_digest(readers[name]()), names), strict=True):
            total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    import torch

    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\0".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _model_readers(model: torch.nn.Module, dtype: torch.dtype | None) -> dict[str, Callable[[], torch.Tensor]]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: partial(_itself, tensor, dtype) for name, tensor in model.state_dict().items() if name not in tied}


def _itself(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _folder_readers(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    return {name: partial(_read, path, name) for path in _weight_files(folder) for name in _names(path)}


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("there are no weights in this folder", where=str(folder), expected="*.safetensors")
    return files


def _names(path: Path) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield from file.keys()


def _read(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The float dtype of most of a folder's weights; None where they are of another kind (quantized)."""
    import torch
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    with safe_open(_weight_files(folder)[0], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            counts[file.get_slice(name).get_dtype()] += 1
    common = _FILE_DTYPES.get(counts.most_common(1)[0][0]) if counts else None
    return getattr(torch, common) if common else None


def only_dtype(files: Iterable[Path]) -> torch.dtype | None:
    """The float dtype of all weights in these files; None where they differ, or are of another kind."""
    import torch
    from safetensors import safe_open

    found: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - not a dict
    return getattr(torch, _FILE_DTYPES[next(iter(found))]) if len(found) == 1 and found <= _FILE_DTYPES.keys() else None


def dtype_to_read(source: ModelSource, options: ModelOptions, hub: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that weights are read in: as they are stored where they will be spread, if all of them are stored alike.

    Args:
        hub: as of `weight_files`.
    """
    import torch

    if not options.is_spread or options.dtype != torch.float32:  # some models keep some weights in float32 where 16 bits are asked for
        return options.dtype
    return only_dtype(weight_files(source, hub)) or options.dtype


def content_key(**parts: Any) -> str:
    """sha256 over the parts as canonical JSON: equal exactly where all of them are."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
