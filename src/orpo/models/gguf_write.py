"""GGUF files of the Llama family, written with the `gguf` package; transformers reads the format but does not write it.

The layout is that of llama.cpp's own converter, convert_hf_to_gguf.py: https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.errors import UserError
from orpo.system.installing import pip_line

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONVERTER = "save the merged model and use llama.cpp's convert_hf_to_gguf.py"

_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

# Llama 3's rule for splitting text, as its tokenizer.json spells it.
_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
"""Qwen's: as Llama 3's, with single digits."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's token types."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A tokenizer in GGUF's terms: `model` is "gpt2" (byte-level BPE, with merges) or "llama" (SentencePiece BPE, with scores)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    has_space_prefix: bool


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, dtype: str, name: str, stop_token_ids: Sequence[int] = ()
) -> None:
    """Write a model of the Llama family with its tokenizer; see `orpo.models.export.export_gguf`."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UserError("writing GGUF files needs the package gguf", where=str(path), mend=pip_line("gguf")) from error

    if dtype not in ("float16", "float32"):
        raise UserError(f"{dtype!r} is not a dtype of GGUF export", where="dtype", expected="float16 or float32")
    _check_architecture(model)
    matrix_dtype = np.dtype(dtype)
    vocabulary = _describe_tokenizer(tokenizer, num_rows=model.get_input_embeddings().weight.shape[0])
    writer = GGUFWriter(path, "llama")
    try:
        _add_configuration(writer, model.config, name=name, is_half=dtype == "float16")
        _add_tokenizer(writer, tokenizer, vocabulary)
        _add_end_of_turn(writer, tokenizer, stop_token_ids)
        # Twice over the tensors: the header, which names the place of every one, stands before the first value.
        for gguf_name, tensor in tensors_of(model):
            kind = _file_dtype(tensor, matrix_dtype)
            writer.add_tensor_info(gguf_name, tuple(tensor.shape), kind, tensor.numel() * kind.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for gguf_name, tensor in tensors_of(model):  # one at a time: the whole model in another dtype would need its memory again
            writer.write_tensor_data(_values(gguf_name, tensor, model.config, _file_dtype(tensor, matrix_dtype)))
    finally:
        writer.close()


def why_not_here(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dtype: str) -> str | None:
    """Why `write_gguf` does not write this model; None where it does."""
    if dtype not in ("float16", "float32"):
        return f"{dtype} is not written here"
    try:
        _check_architecture(model)
        _describe_tokenizer(tokenizer, num_rows=max(len(tokenizer), model.get_input_embeddings().weight.shape[0]))
    except UserError as error:
        return str(error).splitlines()[0]
    return None


def _check_architecture(model: PreTrainedModel) -> None:
    config = model.config
    problem = None
    if config.model_type not in ("llama", "mistral"):
        problem = f"GGUF export is written for Llama and Mistral, not for {config.model_type!r}"
    elif _rope(config).get("rope_type", "default") != "default":
        problem = f"GGUF export does not write rope scaling ({_rope(config)['rope_type']!r})"
    elif config.hidden_act != "silu":
        problem = f"GGUF's llama architecture has silu, not {config.hidden_act!r}"
    else:
        unknown = [name for name in model.state_dict() if _gguf_name(name) is None]
        if unknown:
            problem = f"GGUF export knows no place for the tensor {unknown[0]!r}"
    if problem:
        raise UserError(problem, where=model.name_or_path or type(model).__name__, mend=_CONVERTER)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        logger.warning("GGUF's llama architecture has no sliding window: the file states %d tokens of context, the window's length", window)


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_configuration(writer: GGUFWriter, config: Any, *, name: str, is_half: bool) -> None:
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(1 if is_half else 0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor once under GGUF's name; a tied output head is left out, as readers expect."""
    is_tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        gguf_name = _gguf_name(name)
        if gguf_name is not None and not (is_tied and name == "lm_head.weight"):
            yield gguf_name, tensor


def _gguf_name(name: str) -> str | None:
    if name in _TENSORS:
        return _TENSORS[name]
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in _LAYER_TENSORS:
        return None
    return f"blk.{layer[1]}.{_LAYER_TENSORS[layer[2]]}"


def _file_dtype(tensor: torch.Tensor, matrix_dtype: np.dtype[Any]) -> np.dtype[Any]:
    # Norms and biases stay float32, as llama.cpp's own converter writes them and its kernels expect.
    return matrix_dtype if tensor.ndim > 1 else np.dtype(np.float32)


def _values(gguf_name: str, tensor: torch.Tensor, config: Any, dtype: np.dtype[Any]) -> np.ndarray:
    import torch

    values = tensor.detach().to("cpu", torch.float32).numpy()
    if gguf_name.endswith("attn_q.weight"):
        values = _interleave_rotary(values, config.num_attention_heads)
    elif gguf_name.endswith("attn_k.weight"):
        values = _interleave_rotary(values, config.num_key_value_heads)
    with np.errstate(over="ignore"):
        written = np.ascontiguousarray(values.astype(dtype))
    if not np.isfinite(written).all():
        raise UserError(f"{gguf_name} has values beyond {dtype}", expected="finite weights", mend='export with dtype "float32"')
    return written


def _interleave_rotary(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """transformers rotates the halves of a head against each other, llama.cpp neighbouring rows: (a0 a1 … b0 b1 …) to (a0 b0 a1 b1 …)."""
    rows, columns = weights.shape
    return weights.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    special = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, token_id in special.items():
        if token_id is not None:
            add(token_id)
    # Tried, not read from its flags, which say what somebody asked for and not what its post-processor does.
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(vocabulary.has_space_prefix)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_end_of_turn(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """The first id at which an answer ends and that is not the end of a text; readers then stop at both."""
    others = [token_id for token_id in dict.fromkeys(stop_token_ids) if token_id != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    if len(others) > 1:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(others[1:])))
        logger.warning("GGUF has room for one end of a turn; readers may not stop at %s", names)


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase, *, num_rows: int) -> _Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {}
    bpe = settings.get("model") or {}
    if bpe.get("type") != "BPE":
        raise UserError("GGUF export needs a BPE tokenizer", where=type(tokenizer).__name__, mend=_CONVERTER)
    if len(tokenizer) > num_rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {num_rows}", mend="use the tokenizer of this model")
    tokens, types = _tokens_and_types(tokenizer, settings, num_rows)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    if bpe.get("byte_fallback"):
        return _Vocabulary("llama", "default", tokens, types, [], _scores(tokens, pairs), has_space_prefix=_has_space_prefix(settings))
    merges = [" ".join(pair) for pair in pairs]
    return _Vocabulary("gpt2", _pre_tokenizer_name(settings), tokens, types, merges, [], has_space_prefix=False)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, *, num_rows: int) -> _Vocabulary | None:
    """A tokenizer in GGUF's terms, for llama.cpp's converter where that does not know it; `pre` is empty for a rule not known here either.

    None for one that is no BPE.
    """
    try:
        return _describe_tokenizer(tokenizer, num_rows=num_rows)
    except UserError:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = backend is not None and '"ByteLevel"' in backend.to_str()
        return _Vocabulary("gpt2", "", [], [], [], [], has_space_prefix=False) if is_byte_level else None


def _tokens_and_types(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """One token for every row of the embeddings; rows that no token uses are named, as llama.cpp's converter does."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(num_rows)]
    types = [_NORMAL if index in by_id else _UNUSED for index in range(num_rows)]
    if settings["model"].get("byte_fallback"):
        types = [_BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else kind for token, kind in zip(tokens, types, strict=True)]
    for added in settings.get("added_tokens") or ():
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if settings["model"].get("byte_fallback") and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = _UNKNOWN
    return tokens, types


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """SentencePiece merges the pair whose result has the highest score first: the later a merge was learnt, the lower its score."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        rank.setdefault("".join(pair), index)
    return [-float(rank.get(token, len(pairs))) for token in tokens]


def _pre_tokenizer_name(settings: dict[str, Any]) -> str:
    """llama.cpp's name for the rule that splits text before the merges.

    Raises:
        UserError: none of the known rules; another one would give other tokens than those of training.
    """
    outer: dict[str, Any] = settings.get("pre_tokenizer") or {}
    inner: list[dict[str, Any]] = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in inner]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    llama3, qwen2 = (
        {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False} for rule in (_LLAMA3_SPLIT, _QWEN2_SPLIT)
    )
    known = {
        "gpt-2": [byte_level],
        "smollm": [{"type": "Digits", "individual_digits": True}, byte_level],
        "llama-bpe": [llama3, {**byte_level, "use_regex": False}],
        "qwen2": [qwen2, {**byte_level, "use_regex": False}],
    }
    name = next((name for name, rule in known.items() if rule == steps), None)
    # llama.cpp composes no characters before it splits them, nor does its converter ask for it: Qwen's NFC is let pass as there.
    allowed = (None, {"type": "NFC"}) if name == "qwen2" else (None,)
    if name is None or settings.get("normalizer") not in allowed:
        raise UserError(
            "GGUF export does not know how this tokenizer splits text",
            expected="the rule of " + ", ".join(known),
            mend=_CONVERTER,
        )
    return name


def _has_space_prefix(settings: dict[str, Any]) -> bool:
    """Whether "hello" is tokenised as "▁hello"."""
    text = json.dumps([settings.get("normalizer"), settings.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
