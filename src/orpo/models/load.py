"""Load a causal language model and its tokenizer from wherever it is, with clear errors.

One function, `load_model`, takes a hub id, a folder (a whole model, a PEFT adapter, or the folder of a run), a GGUF file, or the alias of
the bundled model. Nothing is unpickled (safetensors alone) and no remote code runs unless it is asked for by revision.
LoRA is in `orpo.models.adapters`, devices are in `orpo.system.machine`; their public names can be had from here too.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo.errors import UserError
from orpo.models.adapters import HUB_COMMIT, about_base, adapter_base, is_adapted, load_adapter, merge, set_generation
from orpo.models.bare import bare_model, settle_buffers
from orpo.models.bundled import BUNDLED_ALIAS, BUNDLED_HUB_ID, bundled_model_folder, cache_folder, find_bundled_gguf
from orpo.models.dequantize import dequantized
from orpo.models.dtype import SPREAD_DTYPE, computing_dtype, dtype_name, parse_dtype, spread_dtype, upcast_trainable
from orpo.models.find import (
    ModelSource,
    check_config,
    check_folder,
    check_tokenizer_files,
    explain_failure,
    fetch_hub_adapter,
    find_source,
    hub_commit,
    read_config,
    refuse_random_weights,
)
from orpo.models.fingerprint import dtype_to_read, stored_dtype, weights_sha256
from orpo.models.gguf_read import load_gguf
from orpo.models.inparts import model_from_parts
from orpo.models.options import ModelOptions
from orpo.models.quantized import quantization_arguments, stored_quantization
from orpo.models.softcap import honour_soft_cap
from orpo.models.tokenizer import as_tokenizer, read_tokenizer, settle_padding
from orpo.system.machine import bf16_is_fast, choose_device, cpu_flags, hub_answers
from orpo.system.parts import has_weights_in_parts
from orpo.system.ranks import current_ranks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BUNDLED_ALIAS",
    "BUNDLED_HUB_ID",
    "LoadedModel",
    "ModelFacts",
    "ModelOptions",
    "as_tokenizer",
    "bf16_is_fast",
    "bundled_model_folder",
    "cache_folder",
    "choose_device",
    "cpu_flags",
    "find_bundled_gguf",
    "is_adapted",
    "load_gguf",
    "load_model",
    "load_tokenizer",
    "merge",
    "parse_dtype",
    "upcast_trainable",
    "weights_sha256",
]

logger = logging.getLogger(__name__)

_MOVING_REVISIONS = {"main", "master", "head"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What was loaded and what was done to it, for run.json, the terminal and the report.

    Attributes:
        name: as it was asked for.
        kind: "alias", "hub", "folder", "adapter" or "gguf".
        location: the hub id or path that the weights came from.
        architecture: the model's class.
        stored_dtype: dtype of the weights on disk; None where the files do not say.
        dtype: dtype of the weights in memory.
        quantization: "4bit", "8bit", the method of a model that is stored quantized, or None.
        notes: one sentence each on what the user might not expect.
    """

    name: str
    kind: str
    location: str
    revision: str | None
    architecture: str
    model_type: str
    num_parameters: int
    stored_dtype: str | None
    dtype: str
    device: str
    quantization: str | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LoadedModel(NamedTuple):
    """`model, tokenizer, facts = load_model(...)`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    use_bnb_nested_quant: bool = False,
    bnb_4bit_quant_storage: str | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    is_adapter_trainable: bool = False,
    adapter_base: str | None = None,
    is_dequantized: bool = False,
    is_spread: bool = False,
    is_sent: bool = False,
) -> LoadedModel:
    """Load a causal language model with its tokenizer, in eval mode, on the best device.

    Args:
        name_or_path: a hub id, a folder (model, PEFT adapter or run), a `.gguf` file, or `smollm2-135m-instruct`.
        dtype: of the weights in memory; unset means fp32, because trained weights need it (docs: precision). "auto" keeps the files' own.
        revision, trust_remote_code: commit, tag or branch of a hub id; run Python code that comes with the model of a pinned one.
        device: unset means CUDA, MPS or the CPU, whichever is there first.
        load_in_4bit, load_in_8bit: quantize with bitsandbytes while loading; only adapters can then be trained.
        model_init_kwargs: anything else for transformers' `from_pretrained`.
        is_adapter_trainable, adapter_base: of an adapter folder: go on training it; another base than it names, as in full precision.
        is_dequantized: of a model that is stored quantized: plain weights from it, which an adapter can be merged into.
        is_spread: weights stay as they are stored, pages of their files, until they are spread over processes and come to have `dtype`.
        is_sent: of several processes the first alone reads weights, on the CPU; the others have shapes until they are sent. Not quantized.

    Raises:
        UserError: nothing there, no causal language model, only pickles, damaged files, remote code without leave, no such device.

    Example:
        >>> from orpo.models.load import load_model
        >>> model, tokenizer, facts = load_model("model", device="cpu")
        >>> facts.kind, facts.dtype, model.training
        ('folder', 'float32', False)
    """
    options = _checked_options(
        ModelOptions(
            revision=revision,
            trust_remote_code=trust_remote_code,
            device=device,
            attn_implementation=attn_implementation,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            bnb_4bit_quant_type=bnb_4bit_quant_type,
            use_bnb_nested_quant=use_bnb_nested_quant,
            bnb_4bit_quant_storage=bnb_4bit_quant_storage,
            model_init_kwargs=dict(model_init_kwargs or {}),
            adapter_base=adapter_base,
            is_dequantized=is_dequantized,
            is_spread=is_spread,
            is_sent=is_sent and current_ranks().world_size > 1,
        ),
        dtype,
    )
    source = find_source(str(name_or_path))
    _check_remote_code(source, options)
    if source.kind == "hub" and (adapter := fetch_hub_adapter(source, options.revision)) is not None:
        source = replace(source, kind="adapter", location=str(adapter))
    if source.kind == "adapter":
        return _load_adapted(source, options, is_trainable=is_adapter_trainable)
    return (_load_gguf if source.kind == "gguf" else _load_plain)(source, options)


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone, from the same places as `load_model`; a padding token is set where there is none. An adapter without one has its
    base's.

    Raises:
        UserError: as of `load_model`.

    Example:
        >>> from orpo.models.load import load_tokenizer
        >>> load_tokenizer("model").pad_token
        '<|im_end|>'
    """
    source = find_source(str(name_or_path))
    _check_remote_code(source, ModelOptions(revision=revision, trust_remote_code=trust_remote_code))
    if source.kind == "adapter" and not _has_own_tokenizer(source):
        base, base_revision = adapter_base(source)
        with about_base(source):
            return load_tokenizer(base, revision=base_revision, trust_remote_code=trust_remote_code)
    if source.kind == "gguf":
        return load_gguf(Path(source.location))[1]
    return _tokenizer_of(source, revision, trust_remote_code)[0]


def _checked_options(options: ModelOptions, dtype: str | torch.dtype | None) -> ModelOptions:
    """Lift what `model_init_kwargs` says about the same things, and refuse what must not be said there."""
    import torch

    extra = dict(options.model_init_kwargs)
    if "use_safetensors" in extra and not extra.pop("use_safetensors"):
        raise UserError("weights are never unpickled", where="model_init_kwargs.use_safetensors", expected="true, or nothing")
    if options.load_in_4bit and options.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit exclude each other", expected="one of them")
    for old in ("torch_dtype", "dtype"):
        dtype = extra.pop(old, None) if dtype is None else dtype
        extra.pop(old, None)
    revision = options.revision or extra.pop("revision", None)
    trust = options.trust_remote_code or bool(extra.pop("trust_remote_code", False))
    attention = options.attn_implementation or extra.pop("attn_implementation", None)
    for lifted in ("revision", "trust_remote_code", "attn_implementation"):
        extra.pop(lifted, None)
    wanted = parse_dtype(dtype)
    if wanted is None and dtype is None:
        wanted = computing_dtype(options.device) if options.load_in_4bit or options.load_in_8bit else torch.float32
    return replace(
        options, revision=revision, trust_remote_code=trust, attn_implementation=attention, dtype=wanted, model_init_kwargs=extra
    )


def _check_remote_code(source: ModelSource, options: ModelOptions) -> None:
    """Remote code is refused unless it is named by a revision that does not move."""
    if not options.trust_remote_code or source.kind in ("alias", "gguf"):
        return
    if source.kind == "hub" and (not options.revision or options.revision.lower() in _MOVING_REVISIONS):
        raise UserError(
            f"trust_remote_code would run whatever code {source.location} holds today",
            where="trust_remote_code",
            expected="a pinned revision beside it, best the full commit hash that you have read",
            mend="set model_revision to that commit, or leave trust_remote_code off",
        )
    if source.kind == "folder":
        foreign = [str(name) for name in (read_config(source).get("auto_map") or {}).values() if "--" in str(name)]
        if foreign and not options.revision:
            raise UserError(
                f"the model's code is not in the folder; its config.json fetches {foreign[0]!r}",
                where="trust_remote_code",
                expected="a pinned revision of that code",
                mend="set model_revision to a commit of it",
            )


def _load_plain(source: ModelSource, options: ModelOptions) -> LoadedModel:
    """A whole model from a folder (the bundled one included) or the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hub, is_in_parts = _hub_arguments(source, options), source.is_local and has_weights_in_parts(source.location)
    if source.is_local:
        check_folder(source)
    try:
        config = AutoConfig.from_pretrained(source.location, **hub)
        check_config(config, source)
        is_plain = source.is_local and not is_in_parts
        stored = stored_dtype(Path(source.location)) if is_plain else getattr(config, "dtype", None)
        quantization = quantization_arguments(options)
        device = choose_device(options.device)
        tokenizer, notes = _tokenizer_of(source, options.revision, options.trust_remote_code)  # first: it is small, and may be missing
        arguments: dict[str, Any] = {**hub, **quantization, **options.model_init_kwargs}
        if options.attn_implementation:
            arguments["attn_implementation"] = options.attn_implementation
        is_quantized = "quantization_config" in arguments or getattr(config, "quantization_config", None) is not None
        if is_quantized:  # such a model is built on its device; it cannot be moved there afterwards
            arguments.setdefault("device_map", {"": device})
        is_sent = options.is_sent and not is_quantized
        loading: Mapping[str, Any] = {}
        code = {name: hub[name] for name in ("code_revision",) if name in hub}
        if is_sent and not current_ranks().is_first:
            model = bare_model(config, options, **code)
        elif is_in_parts:
            model = model_from_parts(source, config, options, is_quantized=is_quantized)
        else:
            read_as = options.dtype if is_quantized else dtype_to_read(source, options, hub)
            model, loading = AutoModelForCausalLM.from_pretrained(
                source.location, config=config, dtype=read_as or "auto", use_safetensors=True, output_loading_info=True, **arguments
            )
            if read_as != options.dtype:
                setattr(model, SPREAD_DTYPE, options.dtype)
                settle_buffers(model, bare_model(copy.deepcopy(config), options, **code))
    except Exception as error:  # transformers, safetensors and the hub raise a dozen kinds for bad input
        raise _unknown_argument(error, options) or explain_failure(error, source) from error
    refuse_random_weights(loading, source)
    if options.is_dequantized and is_quantized:
        model = dequantized(model)
        notes = (*notes, "dequantized: what quantisation lost stays lost")
    if "device_map" not in arguments and not is_sent:
        model.to(device)
    if source.kind == "alias":
        model.config._name_or_path = model.name_or_path = source.name
    if source.kind == "hub":
        setattr(model, HUB_COMMIT, hub_commit(source, options.revision))
    return _with_facts(model.eval(), tokenizer, source, options, stored, notes)


def _unknown_argument(error: Exception, options: ModelOptions) -> UserError | None:
    """That a keyword of `model_init_kwargs` is taken by neither transformers nor the model, where that is what went wrong."""
    named = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if named is None or named[2] not in options.model_init_kwargs:
        return None
    what = f"unknown argument {named[2]!r}: neither from_pretrained nor {named[1]} takes it"
    return UserError(what, where="model_init_kwargs", mend="correct its name, or leave it out")


def _hub_arguments(source: ModelSource, options: ModelOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if source.kind == "hub" and options.revision:
        arguments["revision"] = options.revision
    if options.trust_remote_code and options.revision:
        arguments["code_revision"] = options.revision
    if source.is_local or not hub_answers():
        arguments["local_files_only"] = True
    return arguments


def _load_gguf(source: ModelSource, options: ModelOptions) -> LoadedModel:
    if options.load_in_4bit or options.load_in_8bit:
        raise UserError(
            "a GGUF file is unpacked while loading; it cannot be quantized again",
            where=source.location,
            mend="leave load_in_4bit and load_in_8bit off",
        )
    is_bare = options.is_sent and not current_ranks().is_first
    model, tokenizer = load_gguf(Path(source.location), dtype=options.dtype, is_bare=is_bare)
    check_config(model.config, source)
    if options.attn_implementation:
        model.set_attn_implementation(options.attn_implementation)
    if not options.is_sent:
        model.to(choose_device(options.device))
    notes = ("unpacked from the blocks of a GGUF file: what quantisation lost stays lost", *settle_padding(tokenizer))
    return _with_facts(model.eval(), tokenizer, source, options, None, notes)


def _load_adapted(source: ModelSource, options: ModelOptions, *, is_trainable: bool) -> LoadedModel:
    """A PEFT adapter: its base model first, then the adapter onto it. A tokenizer saved with the adapter goes before the base's."""
    base_name, base_revision = (options.adapter_base, options.revision) if options.adapter_base else adapter_base(source)
    with nullcontext() if options.adapter_base else about_base(source):
        base = find_source(base_name)
        base_options = replace(options, revision=base_revision, is_spread=False)  # an adapter is loaded in its base's dtype
        _check_remote_code(base, base_options)
        loaded = _load_gguf(base, base_options) if base.kind == "gguf" else _load_plain(base, base_options)
    model = load_adapter(loaded.model, source, is_trainable=is_trainable)
    set_generation(model, Path(source.location))
    tokenizer, notes = loaded.tokenizer, loaded.facts.notes
    if _has_own_tokenizer(source):
        tokenizer, _ = _tokenizer_of(source, None, options.trust_remote_code)
    facts = replace(
        loaded.facts,
        name=source.name,
        kind="adapter",
        location=source.location,
        num_parameters=sum(p.numel() for p in model.parameters()),
        notes=(f"an adapter on {base_name}", *notes),
    )
    return LoadedModel(model.eval(), tokenizer, facts)


def _has_own_tokenizer(adapter: ModelSource) -> bool:
    return (Path(adapter.location) / "tokenizer_config.json").is_file()


def _tokenizer_of(source: ModelSource, revision: str | None, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    from transformers import PreTrainedTokenizerFast

    options = ModelOptions(revision=revision, trust_remote_code=trust_remote_code)
    if source.is_local:
        check_tokenizer_files(source)
    try:
        arguments = _hub_arguments(source, options)
        found, notes = read_tokenizer(source.location, **arguments)
        tokenizer = as_tokenizer(found)
        is_mistral_common = type(tokenizer).__name__ == "MistralCommonBackend"
        if is_mistral_common:
            # Taken by AutoTokenizer where mistral-common is installed; it has no chat template, and renders by rules of its own.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source.location, **arguments)
    except Exception as error:  # as in _load_plain
        raise explain_failure(error, source, part="tokenizer") from error
    if is_mistral_common and tokenizer.eos_token is None:  # made from tekken.json, which names no special tokens
        raise UserError(
            f"{source.location} has a tokenizer of mistral-common (tekken.json) and no other",
            where="model_name_or_path",
            expected="a tokenizer.json, with its tokenizer_config.json and chat template",
            mend="take these files from a repository of the same model that has them, and put them into the model's folder",
        )
    return tokenizer, (*notes, *settle_padding(tokenizer))


def _with_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    options: ModelOptions,
    stored_dtype: torch.dtype | None,
    notes: tuple[str, ...],
) -> LoadedModel:
    honour_soft_cap(model)
    in_memory = dtype_name(spread_dtype(model) or model.dtype)
    stored = dtype_name(stored_dtype) if stored_dtype is not None else None
    quantization = "4bit" if options.load_in_4bit else "8bit" if options.load_in_8bit else stored_quantization(model)
    collected = list(notes)
    if source.kind == "alias":
        collected.append("4-bit weights (Q4_1), unpacked; the full-precision ones are " + BUNDLED_HUB_ID)
    elif stored and stored != in_memory and not quantization:
        collected.append(f"weights stored in {stored} were loaded as {in_memory}")
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        collected.append(f"the tokenizer knows {len(tokenizer)} tokens, the model {num_embeddings}: text with the rest of them will fail")
    if quantization:
        collected.append(f"quantized ({quantization}): only an adapter can be trained")
    facts = ModelFacts(
        name=source.name,
        kind=source.kind,
        location=source.location,
        revision=options.revision if source.kind == "hub" else None,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        num_parameters=model.num_parameters(),
        stored_dtype=stored,
        dtype=in_memory,
        device=str(choose_device(options.device) if options.is_sent else model.device),
        quantization=quantization,
        notes=tuple(collected),
    )
    return LoadedModel(model, tokenizer, facts)
