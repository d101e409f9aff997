"""The model that a run starts from, as its configuration names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orpo.config.options import ORPOConfig
from orpo.errors import UserError
from orpo.run.config import RunConfig
from orpo.run.data import RunData
from orpo.system.allocator import map_large_blocks

if TYPE_CHECKING:
    from orpo.models.load import LoadedModel


def require_spreadable(config: RunConfig, args: ORPOConfig) -> None:
    """A model can be spread as it was asked for, before rows and weights are read.

    Raises:
        UserError: it has no layer of a name that FSDP is to gather, or weights that are packed in a way that cannot be in parts.
    """
    if args.spread.is_sharded and (config["load_in_4bit"] or config["load_in_8bit"]):
        _require_packed_parts(config, args)
    if not args.spread.layers:
        return
    import torch

    from orpo.engine.parallel import decoder_layers
    from orpo.run.config import read_model_config
    from orpo.training.metamodel import meta_model

    decoder_layers(meta_model(read_model_config(config), torch.float32), args.spread.layers)


def _require_packed_parts(config: RunConfig, args: ORPOConfig) -> None:
    way = "parallelism: ddp, where every process has the packed weights"
    if args.spread.kind != "fsdp2" or config["load_in_8bit"]:
        key, what = ("load_in_8bit", "eight-bit") if config["load_in_8bit"] else ("load_in_4bit", "four-bit")
        raise UserError(f"{what} weights cannot be spread by {args.spread.kind}", where=key, mend=way)
    if args.device.type == "cpu":
        raise UserError(
            "bitsandbytes packs four-bit weights anew on a CPU, which their parts do not survive", where="load_in_4bit", mend=way
        )
    if config["bnb_4bit_quant_storage"] is None:
        raise UserError(
            "four-bit weights are spread by the floating-point numbers that they are packed into, and they would be stored as bytes",
            where="bnb_4bit_quant_storage",
            mend=f"bnb_4bit_quant_storage: {args.compute_dtype}, or {way}",
        )


def load_run_model(config: RunConfig, args: ORPOConfig, data: RunData) -> LoadedModel:
    """The model of a run, with room for the tokens that the chat template has added to the vocabulary."""
    from transformers import set_seed

    from orpo.models.bare import grow_embeddings
    from orpo.models.dtype import settle_dtype, spread_dtype
    from orpo.models.load import load_model

    if args.spread.spreads_weights:
        map_large_blocks()  # those of the process that has read the weights are given back layer by layer
    set_seed(args.seed)  # new embeddings and adapters are drawn before the trainer sets its seed
    extra = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    extra.pop("trust_remote_code", None)
    loaded = load_model(
        config["model_name_or_path"],
        revision=config["model_revision"] or extra.pop("revision", None),
        dtype=config["dtype"],
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        load_in_4bit=config["load_in_4bit"],
        load_in_8bit=config["load_in_8bit"],
        bnb_4bit_quant_type=config["bnb_4bit_quant_type"],
        use_bnb_nested_quant=config["use_bnb_nested_quant"],
        bnb_4bit_quant_storage=config["bnb_4bit_quant_storage"],
        model_init_kwargs=extra,
        is_adapter_trainable=not config["use_peft"],
        is_spread=args.spread.spreads_weights,
        is_sent=args.spread.spreads_weights,
    )
    if data.encoder.new_tokens and len(data.tokenizer) > loaded.model.get_input_embeddings().weight.shape[0]:
        settle_dtype(loaded.model.parameters(), spread_dtype(loaded.model))  # or the new rows would be rounded
        grow_embeddings(loaded.model, len(data.tokenizer))
    return loaded
