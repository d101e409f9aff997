from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.models.bare import bare_model
from orpo.models.options import ModelOptions
from orpo.system.installing import pip_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def load_gguf(
    path: Path, *, dtype: torch.dtype | None = None, name: str | None = None, is_bare: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a GGUF file, as ordinary ones that can be trained and saved.

    Weights are unpacked from their blocks to `dtype` (default fp32) as they stand: what quantisation lost stays lost.

    Args:
        is_bare: shapes without values.

    Raises:
        UserError: the `gguf` package is missing, or the file is not a GGUF file that transformers can read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise UserError("there is no such file", where=str(path))
    facts = _gguf_facts(path)
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        if is_bare:
            model = bare_model(AutoConfig.from_pretrained(str(path.parent), **place), ModelOptions(dtype=dtype))
        else:
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


def load_weights(path: Path, like: PreTrainedModel) -> PreTrainedModel:
    """A GGUF file's weights in a model of the same architecture and configuration as another, in fp32.

    Raises:
        UserError: transformers does not read this family from GGUF, or not all of it.
    """
    import torch

    config = copy.deepcopy(like.config)
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        model, report = type(like).from_pretrained(
            str(path.parent), config=config, dtype=torch.float32, output_loading_info=True, **place, **_unpack_all()
        )
    except Exception as error:  # whatever a reader raises for what it does not know
        raise UserError(f"transformers cannot read it: {str(error).strip() or type(error).__name__}", where=str(path)) from error
    if report["missing_keys"]:
        raise UserError(f"transformers does not find {sorted(report['missing_keys'])[0]} in it", where=str(path))
    return model


def _gguf_facts(path: Path) -> dict[str, Any]:
    """What the file says about its tokenizer; None for what it leaves out."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("reading GGUF files needs the package gguf", where=str(path), mend=pip_line("gguf")) from error
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
