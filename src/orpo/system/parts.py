"""Tensors that several processes have written, each its own parts, as safetensors in the form of torch's distributed checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FOLDER, WEIGHTS = "sharded", "weights"
"""Where in a checkpoint's folder they are: `sharded/weights`, and beside it the optimizer's."""


def has_weights_in_parts(folder: Path | str) -> bool:
    """Whether the weights in a checkpoint are in parts."""
    return (Path(folder) / FOLDER / WEIGHTS).is_dir()


def shapes_of_parts(folder: Path | str) -> dict[str, list[int]]:
    """Shapes of the whole weights of such a checkpoint, by name."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.HuggingFaceStorageReader(str(Path(folder) / FOLDER / WEIGHTS)).read_metadata()
    return {key: list(item.size) for key, item in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def read_parts(tensors: dict[str, torch.Tensor], folder: Path | str, name: str = WEIGHTS, *, is_all: bool = True) -> None:
    """Fill tensors, whole or in parts, from what any number of processes has written. No process waits for another.

    Args:
        tensors: by name; filled in place.
        folder: the checkpoint.
        name: of the set of tensors.
        is_all: whether there must be no others.

    Raises:
        CheckpointError: something is missing, of another shape, or unreadable.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError

    source = Path(folder) / FOLDER / name
    try:
        reader = dcp.HuggingFaceStorageReader(str(source))
        sizes = {key: list(item.size) for key, item in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
        differing = [key for key, tensor in tensors.items() if sizes.get(key) != list(tensor.shape)]
        differing += sorted(sizes.keys() - tensors.keys()) if is_all else []
        if differing:
            raise CheckpointError(
                f"holds another model: {len(differing)} tensors differ in name or shape, {differing[0]} among them", where=str(source)
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is meant
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:  # a BaseException, which nothing above would tell the user of
        raise CheckpointError(f"cannot be read ({error})"[:400], where=str(source)) from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__}: {error})"[:400], where=str(source)) from None
