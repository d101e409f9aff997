"""Write what was trained in the forms that other programs read: an adapter, a merged model, a GGUF file.

Everything is written beside its place and renamed into it, so that a broken export is never taken for a whole one.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.adapters import is_adapted, merge
from orpo.checkpoint.replace import recover_folder, replaced_folder
from orpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OURS = ("config.json", "adapter_config.json")


def export_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, is_overwriting: bool = False) -> Path:
    """The adapter alone (safetensors), its configuration, and the tokenizer with its chat template.

    The embeddings go with it where they were changed too: trained, or grown by new tokens.

    Raises:
        UserError: the model has no adapter, or the folder cannot be (over)written.
    """
    if not is_adapted(model):
        raise UserError("the model has no adapter", where=str(folder), mend="export the whole model instead (merged)")
    with _staged_folder(Path(folder), is_overwriting=is_overwriting) as staging:
        model.save_pretrained(staging, safe_serialization=True, save_embedding_layers=_has_own_embeddings(model))
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's card is a form to fill in; the run's own card stands in the run's folder
        tokenizer.save_pretrained(staging)
    return Path(folder)


def export_merged(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: str | None = None,
    stop_token_ids: Sequence[int] = (),
    is_overwriting: bool = False,
) -> Path:
    """A plain model that needs nothing else: safetensors, configuration, tokenizer and chat template. The model in memory stays as it is.

    Args:
        dtype: of the weights on disk ("bfloat16" halves the size); by default as in memory.
        stop_token_ids: ids at which generation ends, beside the model's own: the end of a turn is not always `eos_token`.

    Raises:
        UserError: an unknown dtype, an adapter on quantized weights, or a folder that cannot be (over)written.
    """
    from orpo.models import parse_dtype

    wanted = parse_dtype(dtype)
    plain = merge(model)
    if wanted is not None and plain.dtype != wanted:
        plain = (plain if plain is not model else copy.deepcopy(plain)).to(wanted)
    with _staged_folder(Path(folder), is_overwriting=is_overwriting) as staging:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if stop_token_ids:
            _add_stop_ids(plain, staging / "generation_config.json", stop_token_ids)
    return Path(folder)


def export_gguf(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    dtype: str = "float16",
    name: str | None = None,
    is_overwriting: bool = False,
) -> Path:
    """One GGUF file for llama.cpp, Ollama, LM Studio and their like: weights, tokenizer and chat template.

    Written for the Llama family (Llama, SmolLM2, Mistral), whose tensors correspond one to one. A model with an adapter is merged first.

    Args:
        dtype: "float16" (as these programs expect) or "float32"; norms are always float32. llama.cpp's own tool quantizes such a file.
        name: what the file calls the model; by default the last part of the name it was loaded by.

    Raises:
        UserError: another architecture or a tokenizer that GGUF cannot express exactly, a weight beyond float16, a file in the way.
    """
    from orpo.ggufwriter import write_gguf

    path = Path(path)
    if path.suffix != ".gguf":
        raise UserError("a GGUF file's name ends in .gguf", where=str(path), mend=f"name it {path.name}.gguf")
    if path.exists() and not (is_overwriting and path.is_file()):
        raise UserError("something of this name is there already", where=str(path), mend="choose another name, or allow overwriting")
    plain = merge(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
            draft = Path(staging) / path.name
            write_gguf(plain, tokenizer, draft, dtype=dtype, name=name or Path(plain.name_or_path or "model").name)
            _sync(draft)
            os.replace(draft, path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


@contextmanager
def _staged_folder(target: Path, *, is_overwriting: bool) -> Iterator[Path]:
    """A folder to write into, which takes the target's place once the block is through, and leaves nothing behind where it is not."""
    recover_folder(target)
    is_taken = target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir())))
    if is_taken and not (is_overwriting and target.is_dir() and not target.is_symlink() and _is_export(target)):
        raise UserError(
            "this place is taken" if not is_overwriting else "what is here is no exported model; it is not overwritten",
            where=str(target),
            mend="choose another folder, or allow overwriting" if not is_overwriting else "choose another folder",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(target) as staging:
            yield staging
    except OSError as error:
        raise _unwritable(target, error) from error


def _is_export(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OURS)


def _sync(path: Path) -> None:
    """Make a file's content or a folder's entries durable, or a power cut could leave a whole run with empty weights."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot be written: {error.strerror or error}", where=str(path), mend="check the free space and the permissions")


def _has_own_embeddings(model: Any) -> bool:
    """Whether the embeddings differ from those of the base on disk, so that the adapter without them would be useless.

    PEFT's own answer ("auto") asks the hub; this one looks only at what is here.
    """
    from transformers import AutoConfig

    from orpo.sources import find_source

    embeddings = model.get_input_embeddings().weight
    if embeddings.requires_grad:
        return True
    base_name = model.peft_config[model.active_adapter].base_model_name_or_path
    try:
        base = AutoConfig.from_pretrained(find_source(base_name).location, local_files_only=True)
        return int(base.vocab_size) != embeddings.shape[0]
    except (OSError, ValueError, TypeError, AttributeError, UserError):  # built in memory, or of another making: nothing to compare with
        return False


def _add_stop_ids(model: PreTrainedModel, path: Path, stop_token_ids: Sequence[int]) -> None:
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = settings.get("eos_token_id", getattr(model.config, "eos_token_id", None))
    own_ids = [] if own is None else own if isinstance(own, list) else [own]
    ids = list(dict.fromkeys([*own_ids, *(int(token) for token in stop_token_ids)]))
    settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
