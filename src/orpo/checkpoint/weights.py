"""Before transformers or PEFT load weights from a checkpoint: that what they would open is what its manifest names, and is no pickle."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from orpo.checkpoint import _fs
from orpo.checkpoint.manifest import MANIFEST_NAME, read_manifest
from orpo.errors import CheckpointError

_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin", "model*.bin", "pytorch_model*.index.json")
_READ_BY_LOADERS = (
    *_PICKLED_WEIGHTS, "model*.safetensors", "adapter_model*.safetensors", "*.index.json", "config.json", "adapter_config.json",
    "trainer_state.json",
)  # fmt: skip
"""Names that the loaders look for by themselves, some of them before the weights that were saved."""


def require_safe_weights(folder: Path | str) -> None:
    """Refuse a folder in which the loaders would open a pickle, or a file that the manifest does not name.

    Args:
        folder: a verified checkpoint of a model that is not sharded.

    Raises:
        CheckpointError: it holds such a file.
    """
    folder = Path(folder)
    owned = {MANIFEST_NAME, *read_manifest(folder).files}
    for path in sorted(_fs.walk_files(folder)):
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(path.name, pattern) for pattern in _PICKLED_WEIGHTS):
            problem = "weights as a pickle, which is never opened"
        elif name not in owned and any(fnmatchcase(path.name, pattern) for pattern in _READ_BY_LOADERS):
            problem = "a file that its manifest does not name and that would be loaded"
        else:
            continue
        raise CheckpointError(
            f"the checkpoint holds {problem}", where=str(path), mend="remove that file, or resume from another checkpoint"
        )
