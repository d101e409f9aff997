"""What `ORPOTrainer` is given, brought into the one form it works on: token groups, a model ready to train, an objective."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from orpo.adapters import text_layers_only
from orpo.config import ORPOConfig
from orpo.data.types import Preference, TokenGroup
from orpo.errors import UserError
from orpo.newtokens import num_positions, with_new_tokens
from orpo.objective import DPO, ORPO, SFT, Objective, SimPO

if TYPE_CHECKING:
    from orpo.data.collate import DataReport
    from orpo.data.template import TemplateEncoder

logger = logging.getLogger(__name__)


def refuse_arguments(**given: Any) -> None:
    """Arguments of TRL's trainer that have no meaning here."""
    reasons = {
        "data_collator": "rows are packed by the engine",
        "compute_metrics": "it would need the logits of every position, which are never made; the metrics of the log are exact",
        "preprocess_logits_for_metrics": "the logits are never made",
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} is not supported: {reasons[name]}", where="ORPOTrainer", mend="leave it out")


def resolve_objective(args: ORPOConfig) -> Objective:
    """The objective that the options name."""
    objectives: dict[str, Objective] = {"orpo": ORPO(args.orpo_alpha, args.orpo_beta), "sft": SFT(), "dpo": DPO(), "simpo": SimPO()}
    return objectives[args.objective]


def resolve_model(model: Any, args: ORPOConfig) -> tuple[Any, Any]:
    """(model, its own tokenizer if it was loaded here by name)."""
    if not isinstance(model, str):
        if args.model_init_kwargs:
            raise UserError("the model is loaded already", where="model_init_kwargs", mend="give the model by name, or leave them out")
        return model, None
    from orpo.models import load_model

    given = args.model_init_kwargs
    kwargs = dict(given) if isinstance(given, dict) else {}
    revision = kwargs.pop("revision", args.model_revision)
    kwargs.pop("trust_remote_code", None)
    loaded = load_model(
        model,
        revision=revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=kwargs.pop("dtype", None),
        model_init_kwargs=kwargs,
    )
    return loaded.model, loaded.tokenizer


def resolve_tokenizer(processing_class: Any, tokenizer: Any, own: Any, model: Any) -> Any:
    """The one tokenizer of the run.

    Raises:
        UserError: two different ones were given, or none can be found.
    """
    from orpo.models import as_tokenizer, load_tokenizer

    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise UserError("tokenizer and processing_class are two different tokenizers", where="ORPOTrainer", mend="give one of them")
    given = processing_class if processing_class is not None else tokenizer
    if given is not None:
        return as_tokenizer(given)
    if own is not None:
        return own
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise UserError("no tokenizer is given and the model does not say where its own is", where="processing_class")
    return load_tokenizer(name)


def as_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, *, encoder: TemplateEncoder | None = None, is_training: bool = False, model: Any = None
) -> tuple[list[TokenGroup], DataReport | None, TemplateEncoder | None]:
    """Token groups from whatever the rows are; (groups, report, encoder), the last two None where groups were given as such.

    Raises:
        UserError: nothing usable in the data, or less than one optimizer step of training rows where that was asked for.
    """
    if _is_groups(rows):
        return list(rows), None, encoder
    from orpo.data.collate import prepare_groups
    from orpo.data.formats import load_preferences

    if encoder is None:
        encoder = make_encoder(tokenizer, args, model_config=getattr(model, "config", None))
    if isinstance(rows, Sequence) and not isinstance(rows, str) and rows and isinstance(rows[0], Preference):
        items: list[Any] = list(rows)
    else:
        column_map = args.column_map if isinstance(args.column_map, dict) else None
        preferences, dropped, shape = load_preferences(
            rows, column_map=column_map, pairs=args.pairs, sft_rows=args.sft_rows, strict=args.strict_data
        )
        logger.info("%s", shape)
        items = [*preferences, *dropped]
    groups, report = prepare_groups(items, encoder, strict=args.strict_data)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    report.check(rows_per_step if is_training else 1)
    for line in report.lines():
        (logger.info if is_training else logger.debug)("%s", line)
    return groups, report, encoder


def as_eval_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, train_groups: Sequence[TokenGroup], encoder: TemplateEncoder | None
) -> tuple[Any, DataReport | None]:
    """(groups of the evaluation rows, report); for a dict of sets a dict of groups, and no report.

    Raises:
        UserError: nothing usable in them, or prompts that are trained on and not allowed to.
    """
    if rows is None:
        return None, None
    if isinstance(rows, dict):
        return {name: as_eval_groups(item, tokenizer, args, train_groups, encoder)[0] for name, item in rows.items()}, None
    groups, report, _ = as_groups(rows, tokenizer, args, encoder=encoder)
    if report is not None:
        from orpo.data.collate import find_overlap

        find_overlap(train_groups, groups).check(allow=args.allow_overlap)
    return groups, report


def make_encoder(tokenizer: Any, args: ORPOConfig, *, model_config: Any = None) -> TemplateEncoder:
    """The encoder that the options describe. Without a `max_length` the smaller of the tokenizer's and the model's limit counts."""
    from orpo.data.template import TemplateEncoder

    return TemplateEncoder(
        tokenizer,
        chat_template=args.chat_template,
        max_length=args.max_length or _longest(tokenizer, model_config),
        max_prompt_length=args.max_prompt_length,
        truncation=args.truncation,
        special_tokens_in_text=args.special_tokens_in_text,
        strict=args.strict_data,
    )


def _longest(tokenizer: Any, model_config: Any) -> int:
    """What tokenizer and model take, as far as they say it; tokenizers that do not know say 1e30."""
    limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
    limits = [limit if 0 < limit < 10**7 else 10**7, num_positions(model_config) if model_config is not None else None]
    return min(limit for limit in limits if limit is not None)


def _is_groups(rows: Any) -> bool:
    return isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and isinstance(rows[0], TokenGroup)


def prepared_model(model: Any, args: ORPOConfig, peft_config: Any, tokenizer: Any, encoder: TemplateEncoder | None) -> Any:
    """The model ready to train: embeddings for new tokens, adapter, no dropout, trainable weights in float32.

    Raises:
        UserError: an encoder-decoder model, an adapter on an adapter, or weights that cannot be trained as they are.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder model", where="model", expected="a causal language model (decoder only)"
        )
    adapters = getattr(model, "peft_config", {}).values() if peft_config is None else [peft_config]
    if kinds := [type(item).__name__ for item in adapters if getattr(item, "is_prompt_learning", False)]:
        raise UserError(
            f"{kinds[0]} puts virtual tokens before the prompt, which would shift what every position predicts",
            where="peft_config",
            expected="an adapter of weights, such as LoRA",
        )
    if encoder is not None and encoder.new_tokens:
        _grow_embeddings(model, tokenizer)
        if peft_config is not None:
            peft_config = with_new_tokens(peft_config, model, tokenizer.convert_tokens_to_ids(list(encoder.new_tokens)))
    if peft_config is not None:
        model = _with_adapter(model, args, peft_config)
    elif args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout(model)
        if rate := getattr(peft_config, "lora_dropout", 0.0):
            logger.warning("lora_dropout of %g is off, as all dropout is; disable_dropout: false turns it on", rate)
    else:
        logger.warning("dropout is on: how a step is cut into micro-batches then changes its update, and the engines cannot be compared")
    from orpo.models import upcast_trainable

    if note := upcast_trainable(model):
        logger.warning("%s", note)
    return model


def _with_adapter(model: Any, args: ORPOConfig, peft_config: Any) -> Any:
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if isinstance(model, PeftModel):
        raise UserError("the model has an adapter already", where="peft_config", mend="merge it first, or leave peft_config out")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    elif args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return get_peft_model(model, text_layers_only(peft_config, model))


def _grow_embeddings(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        logger.info("the vocabulary has grown from %d to %d for the chat template's tokens", rows, len(tokenizer))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: modules, and the rates that layers keep as a number (`attention_dropout`, OPT's `dropout`)."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop")):
                setattr(module, name, 0.0)
