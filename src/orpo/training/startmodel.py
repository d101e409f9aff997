"""The model that a run starts from, as its configuration names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orpo.config.options import ORPOConfig
from orpo.run.config import RunConfig
from orpo.run.data import RunData

if TYPE_CHECKING:
    from orpo.models.load import LoadedModel


def load_run_model(config: RunConfig, args: ORPOConfig, data: RunData) -> LoadedModel:
    """The model of a run, with room for the tokens that the chat template has added to the vocabulary."""
    from transformers import set_seed

    from orpo.models.load import load_model

    set_seed(args.seed)  # new embeddings and adapters are drawn before the trainer sets its seed
    extra = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    extra.pop("trust_remote_code", None)
    is_as_stored = _is_read_as_stored(config, args, extra)
    loaded = load_model(
        config["model_name_or_path"],
        revision=config["model_revision"] or extra.pop("revision", None),
        dtype="auto" if is_as_stored else config["dtype"],
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        load_in_4bit=config["load_in_4bit"],
        load_in_8bit=config["load_in_8bit"],
        bnb_4bit_quant_type=config["bnb_4bit_quant_type"],
        use_bnb_nested_quant=config["use_bnb_nested_quant"],
        bnb_4bit_quant_storage=config["bnb_4bit_quant_storage"],
        model_init_kwargs=extra,
        is_adapter_trainable=not config["use_peft"],
    )
    if data.encoder.new_tokens and len(data.tokenizer) > loaded.model.get_input_embeddings().weight.shape[0]:
        loaded.model.resize_token_embeddings(len(data.tokenizer))
    return loaded._replace(facts=dataclasses.replace(loaded.facts, dtype="float32")) if is_as_stored else loaded


def _is_read_as_stored(config: RunConfig, args: ORPOConfig, model_init_kwargs: Mapping[str, Any]) -> bool:
    """Whether weights are read in the dtype they are stored in, though they are trained in float32.

    FSDP2 makes them float32 as it spreads them. Until then they are pages of their file, which the processes of a machine share. Not with
    an adapter, whose first weights are rounded as its base is.
    """
    from orpo.models.find import find_source

    is_whole = not config["use_peft"] and find_source(config["model_name_or_path"]).kind in ("folder", "hub")
    return args.spread.kind == "fsdp2" and is_whole and config["dtype"] is None and not {"dtype", "torch_dtype"} & model_init_kwargs.keys()
