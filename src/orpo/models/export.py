"""Write what was trained in the forms that other programs read: an adapter, a merged model, a GGUF file.

Everything is written beside its place and renamed into it, so that a broken export is never taken for a whole one.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orpo.errors import UserError
from orpo.models.adapters import is_adapted, merge, pin_base
from orpo.models.verify import Probe, check_adapter, check_converted, check_gguf, check_merge, check_merged, check_state
from orpo.system.replace import recover_folder, replaced_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"

_OURS = ("config.json", "adapter_config.json")


def export_adapter(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    stop_token_ids: Sequence[int] = (),
    is_overwriting: bool = False,
) -> Path:
    """The adapter alone (safetensors), its configuration, the tokenizer with its chat template, and where generation ends.

    The embeddings go with it where they were changed too: trained, or grown by new tokens whose rows the adapter does not hold by itself.

    Args:
        stop_token_ids: as in `export_merged`.

    Raises:
        UserError: the model has no adapter, the folder cannot be (over)written, or what was written is not what the model computes.
    """
    if not is_adapted(model):
        raise UserError("the model has no adapter", where=str(folder), mend="export the whole model instead (merged)")
    pin_base(model)
    with _staged_folder(Path(folder), is_overwriting=is_overwriting) as staging:
        model.save_pretrained(staging, safe_serialization=True, save_embedding_layers=_has_own_embeddings(model))
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's card is a form to fill in; the run's own card stands in the run's folder
        tokenizer.save_pretrained(staging)
        _save_generation(model.get_base_model(), staging, stop_token_ids)
        _write_resize_note(model, staging)
        check_adapter(model, staging)
    return Path(folder)


def export_merged(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: str | None = None,
    stop_token_ids: Sequence[int] = (),
    max_shard_size: str = MAX_SHARD_SIZE,
    is_in_place: bool = False,
    is_overwriting: bool = False,
) -> Path:
    """A plain model that needs nothing else: safetensors, configuration, tokenizer and chat template. The model in memory stays as it is.

    Args:
        dtype: of the weights on disk ("bfloat16" halves the size); by default as in memory.
        stop_token_ids: ids at which generation ends, beside the model's own: the end of a turn is not always `eos_token`.
        max_shard_size: most bytes of a file, as "5GB"; a larger model is cut into several with an index.
        is_in_place: the model may be changed: it is merged where it is, without a second one in memory.

    Raises:
        UserError: an unknown dtype, an adapter on quantized weights, a folder that cannot be (over)written, or what was written is not what
            the model computes.
    """
    from orpo.models.load import parse_dtype

    wanted = parse_dtype(dtype)
    plain = merge_checked(model, is_in_place=is_in_place)  # compared before it is brought into another dtype: what that rounds is asked for
    if wanted is not None and plain.dtype != wanted:
        plain = (plain if plain is not model or is_in_place else copy.deepcopy(plain)).to(wanted)
    with _staged_folder(Path(folder), is_overwriting=is_overwriting) as staging:
        plain.save_pretrained(staging, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(staging)
        if stop_token_ids:
            _add_stop_ids(plain, staging / "generation_config.json", stop_token_ids)
        check_merged(plain, staging)
    return Path(folder)


def export_whole_state(
    model: Any, state: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, stop_token_ids: Sequence[int] = ()
) -> Path:
    """`model/` or `adapter/` from weights that were brought together from the ranks of a run; what is there is replaced.

    Args:
        model: the model whose own weights are in parts, for its configuration.
        state: its whole weights, of an adapter those that belong to it, on the CPU.

    Raises:
        UserError: as `export_merged` and `export_adapter`; what was written is compared with `state` by its tensors.
    """
    adapted = is_adapted(model)
    with _staged_folder(Path(folder), is_overwriting=True) as staging:
        keywords = {"save_embedding_layers": _has_own_embeddings(model)} if adapted else {}
        if adapted:
            pin_base(model)
        model.save_pretrained(staging, state_dict=dict(state), **keywords)
        tokenizer.save_pretrained(staging)
        base = model.get_base_model() if adapted else model
        if adapted:
            (staging / "README.md").unlink(missing_ok=True)
            _save_generation(base, staging, stop_token_ids)
            _write_resize_note(model, staging)
        else:
            _write_dtype(state, staging / "config.json")
            if stop_token_ids:
                _add_stop_ids(base, staging / "generation_config.json", stop_token_ids)
        check_state(model, state, staging)
    return Path(folder)


def export_gguf(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    dtype: str = "float16",
    quantize: str | None = None,
    converter: str | Path | None = None,
    name: str | None = None,
    stop_token_ids: Sequence[int] = (),
    is_in_place: bool = False,
    is_overwriting: bool = False,
) -> Path:
    """One GGUF file for llama.cpp, Ollama, LM Studio and their like: weights, tokenizer and chat template.

    Llama and Mistral without rope scaling are written here, tensor by tensor; every other family by llama.cpp's own converter. A model with
    an adapter is merged first.

    Args:
        dtype: "float16" (as these programs expect), "bfloat16" or "float32"; norms are always float32.
        quantize: "q8_0", which the converter writes, or a type of llama.cpp's llama-quantize ("q4_k_m"), made from `dtype`.
        converter: llama.cpp's convert_hf_to_gguf.py or its folder; unset, it is looked for where it is needed.
        name: what the file calls the model; by default the last part of the name it was loaded by.
        is_in_place: as in `export_merged`.
        stop_token_ids: as in `export_merged`; GGUF has room for one beside the tokenizer's own, the end of a turn.

    Raises:
        UserError: an architecture or a tokenizer that GGUF cannot express, a missing program, a weight beyond float16, a file in the
            way, or what was written is not what the model computes.
    """
    path = Path(path)
    require_file(path, is_overwriting=is_overwriting)
    write = _gguf_writer(model, tokenizer, dtype=dtype, quantized=quantize, converter=converter)
    plain = merge_checked(model, is_in_place=is_in_place)
    stops = [*stop_token_ids, *_as_ids(getattr(plain.generation_config, "eos_token_id", None))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place: a rename onto another file system would be a copy, which can be cut short.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
            draft = Path(staging) / path.name
            write(plain, tokenizer, draft, name=name or Path(plain.name_or_path or "model").name, stop_token_ids=stops)
            _sync(draft)
            os.replace(draft, path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def require_file(path: Path, *, is_overwriting: bool) -> None:
    """Stop where no GGUF file can be written; a command asks before it loads a model for nothing.

    Raises:
        UserError: another ending, or something is there.
    """
    if path.suffix != ".gguf":
        raise UserError("a GGUF file's name ends in .gguf", where=str(path), mend=f"name it {path.name}.gguf")
    if path.exists() and not (is_overwriting and path.is_file()):
        raise UserError(
            "something of this name is there already", where=str(path), mend="choose another name, or allow overwriting (--overwrite)"
        )


def require_folder(target: Path, *, is_overwriting: bool) -> None:
    """Stop where an export would take the place of something else; a command asks before it loads a model for nothing.

    Raises:
        UserError: the place is taken.
    """
    is_taken = target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir())))
    if is_taken and not (is_overwriting and target.is_dir() and not target.is_symlink() and _is_export(target)):
        raise UserError(
            "this place is taken" if not is_overwriting else "what is here is no exported model; it is not overwritten",
            where=str(target),
            mend="choose another folder, or allow overwriting (--overwrite)" if not is_overwriting else "choose another folder",
        )


def merge_checked(model: Any, *, is_in_place: bool) -> PreTrainedModel:
    """The plain model, compared with the one that had the adapter; a model without one as it is.

    Raises:
        UserError: as `merge`, or it computes something else.
    """
    if not is_adapted(model):
        return cast("PreTrainedModel", model)
    before = Probe.of(model)
    plain = merge(model, is_in_place=is_in_place)
    check_merge(before, plain)
    return plain


def _gguf_writer(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, dtype: str, quantized: str | None, converter: str | Path | None
) -> Callable[..., None]:
    """What writes a model as a GGUF file and compares it. What is missing for it is told here, before anything is computed."""
    from orpo.models.gguf_convert import convert, find_converter, find_quantizer, quantize
    from orpo.models.gguf_write import why_not_here, write_gguf

    if dtype not in ("float16", "bfloat16", "float32"):
        raise UserError(f"{dtype!r} is not a dtype of GGUF export", where="dtype", expected="bfloat16, float16 or float32")
    program = None if quantized is None else find_quantizer(quantized)
    is_converted = quantized is not None and program is None
    base = model.get_base_model() if is_adapted(model) else model
    reason = why_not_here(base, tokenizer, dtype=dtype)
    if converter is None and not is_converted and reason is None:

        def write(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft: Path, **facts: Any) -> None:
            write_gguf(plain, tokenizer, draft, dtype=dtype, **facts)
            check_gguf(plain, draft)
            if quantized is not None and program is not None:
                quantize(program, draft, quantized)

        return write
    if reason is not None:
        logger.info("%s: llama.cpp's converter writes it", reason)
    script = find_converter(converter)
    kind = quantized if quantized is not None and is_converted else dtype

    def write_converted(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft: Path, **facts: Any) -> None:
        convert(plain, tokenizer, draft, dtype=kind, converter=script, **facts)
        check_converted(plain, draft, kind, num_tokens=len(tokenizer))
        if quantized is not None and program is not None:
            quantize(program, draft, quantized)

    return write_converted


@contextmanager
def _staged_folder(target: Path, *, is_overwriting: bool) -> Iterator[Path]:
    """A folder to write into, which takes the target's place once the block is through, and leaves nothing behind where it is not."""
    recover_folder(target)
    require_folder(target, is_overwriting=is_overwriting)
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
    settings = model.peft_config[model.active_adapter]
    if rows := getattr(settings, "trainable_token_indices", None):
        trained = set().union(*rows.values()) if isinstance(rows, dict) else set(rows)
        base_rows = _rows_of_base(model)
        num_rows = model.get_input_embeddings().weight.shape[0]
        return base_rows is not None and not set(range(base_rows, num_rows)) <= trained
    if model.get_input_embeddings().weight.requires_grad:
        return True
    return _grown_rows(model) is not None


def _grown_rows(model: Any) -> int | None:
    """Rows of the embeddings, where they are not as many as the base on disk has."""
    base_rows, num_rows = _rows_of_base(model), int(model.get_input_embeddings().weight.shape[0])
    return num_rows if base_rows is not None and base_rows != num_rows else None


def _rows_of_base(model: Any) -> int | None:
    """Rows of the embeddings of the base as it is stored; None where it is nowhere to be seen (built in memory)."""
    from transformers import AutoConfig

    from orpo.models.find import find_source

    settings = model.peft_config[model.active_adapter]
    try:
        source = find_source(settings.base_model_name_or_path)
        config = AutoConfig.from_pretrained(source.location, revision=settings.revision or "main", local_files_only=True)
        return int(config.get_text_config().vocab_size)
    except (OSError, ValueError, TypeError, AttributeError, UserError):
        return None


def _add_stop_ids(model: PreTrainedModel, path: Path, stop_token_ids: Sequence[int]) -> None:
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own_ids = _as_ids(settings.get("eos_token_id", getattr(model.config, "eos_token_id", None)))
    ids = list(dict.fromkeys([*own_ids, *(int(token) for token in stop_token_ids)]))
    settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_dtype(state: Mapping[str, Any], path: Path) -> None:
    """Say in the configuration what the weights are written in. transformers says what the model holds: under ZeRO in bf16 that is what is
    computed with, and readers would round the weights."""
    dtype = next(str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point())
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {name: dtype for name in ("dtype", "torch_dtype") if name in settings}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]


def _save_generation(base: PreTrainedModel, folder: Path, stop_token_ids: Sequence[int]) -> None:
    """An adapter's folder says where an answer ends, as a merged model's does: its end of a turn may be none of its base's."""
    settings = getattr(base, "generation_config", None)
    if settings is not None:
        settings.save_pretrained(folder)
    _add_stop_ids(base, folder / "generation_config.json", stop_token_ids)


def _write_resize_note(model: Any, folder: Path) -> None:
    """Say in the adapter's folder that its base needs more rows before PEFT can load it; `load_model` adds them by itself."""
    grown = _grown_rows(model)
    if grown is None:
        return
    settings = model.peft_config[model.active_adapter]
    base = f'"{settings.base_model_name_or_path}"' + (f', revision="{settings.revision}"' if settings.revision else "")
    note = f"""# An adapter with new tokens

Its base model has no rows for them yet. Add these before you load the adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained({base})
model.resize_token_embeddings({grown})
model = PeftModel.from_pretrained(model, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # where an answer ends
```
"""
    (folder / "README.md").write_text(note, encoding="utf-8")
