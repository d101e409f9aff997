"""What `ORPOTrainer` is given, brought into the one form it works on: token groups, a model ready to train, an objective."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from orpo.config.checks import best_metric_problems
from orpo.config.objectives import find
from orpo.config.options import ORPOConfig
from orpo.data.stored.measures import measures_of
from orpo.data.types import TokenGroup
from orpo.engine.kernels import resolve
from orpo.errors import UserError, UserErrors
from orpo.models.adapters import put_adapter
from orpo.models.bare import grow_embeddings
from orpo.models.dtype import settle_dtype, spread_dtype
from orpo.models.newtokens import positions_of, require_rows, with_new_tokens
from orpo.objective import Objective, kind_of
from orpo.system.group import on_all

if TYPE_CHECKING:
    from orpo.data.template import TemplateEncoder
    from orpo.engine.router import Router

logger = logging.getLogger(__name__)


_OBJECTIVE = (
    "the loss of a step comes from the engine and the objective",
    "give objective=, a function (logp_N, index) -> {'nll': …, 'preference': …} of the tokens' log-probabilities (orpo.objective), "
    "or override training_step",
)
_ROWS = (
    "rows are read and tokenised by orpo.data",
    "prepare the rows before (column_map, chat_template and truncation say how they are read), or give token groups as train_dataset",
)
_ORDER = ("which rows a step holds, and in which order, is orpo.steps' part", "give the rows in another order, or data_seed")
_BATCHES = ("batches are packed by the engine and moved by the step", "override training_step, which gets one whole optimizer step")
_EVALUATION = ("evaluation goes through evaluation_loop alone", "override evaluation_loop or evaluate, or use orpo.evaluate")
_STATE = ("checkpoints are written and pruned by orpo.checkpoint", "a callback with on_save sees every checkpoint; save_total_limit prunes")
_UNUSED_HOOKS = {
    **dict.fromkeys(
        (
            *("compute_loss", "get_batch_loss_metrics", "odds_ratio_loss", "concatenated_forward", "get_batch_logps"),
            *("compute_loss_context_manager", "autocast_smart_context_manager"),
        ),
        _OBJECTIVE,
    ),
    **dict.fromkeys(("tokenize_row", "build_tokenized_answer", "concatenated_inputs", "_prepare_dataset"), _ROWS),
    **dict.fromkeys(("_get_train_sampler", "_get_eval_sampler"), _ORDER),
    **dict.fromkeys(
        ("_prepare_inputs", "_prepare_input", "_get_collator_with_removed_columns", "_remove_unused_columns", "_get_num_items_in_batch"),
        _BATCHES,
    ),
    **dict.fromkeys(("prediction_step", "prediction_loop", "generate_from_model"), _EVALUATION),
    "store_metrics": ("metrics are exact sums over all rows", "add to what `log` is given, or use a callback's on_log"),
    **dict.fromkeys(("_save_rng_state", "_save_optimizer_and_scheduler", "_rotate_checkpoints"), _STATE),
}
"""Methods of transformers' or TRL's trainers that nothing calls here -> (why, what to do instead)."""


def refuse_overrides(trainer: Any, base: type) -> None:
    """Refuse a subclass, or an instance, with a method of its own that would never be called: it would train something else in silence.

    One that also has its own `training_step` or `evaluation_loop` may well call them from there.

    Raises:
        UserErrors: all of them, each with what to do instead.
    """
    own: dict[str, str] = {}
    for cls in type(trainer).__mro__:
        if cls not in base.__mro__:
            own = {**dict.fromkeys(vars(cls), cls.__name__), **own}
    own = {**own, **dict.fromkeys(vars(trainer), "the trainer")}
    allowed = {_OBJECTIVE, _BATCHES} if "training_step" in own else set()
    allowed |= {_OBJECTIVE, _BATCHES, _EVALUATION} if "evaluation_loop" in own else set()
    problems = [
        UserError(f"is overridden by {own[name]}, and nothing calls it: {reason[0]}", where=name, mend=reason[1])
        for name, reason in _UNUSED_HOOKS.items()
        if name in own and reason not in allowed
    ]
    if problems:
        raise UserErrors(problems, title=f"{type(trainer).__name__} overrides what has no effect:")


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


def require_kernel(args: ORPOConfig) -> None:
    """The attention kernel that was asked for can train on this device, in this precision.

    Raises:
        UserError: it cannot.
    """
    resolve(args.attention_kernel, args.device, getattr(torch, args.compute_dtype))


def use_one_gpu(args: ORPOConfig) -> None:
    """One process computes on one GPU, however many it sees."""
    if args.n_gpu > 1:
        # Or transformers would wrap the model in DataParallel, which cuts along a batch dimension that packed rows do not have.
        logger.warning("%d GPUs are visible, and one process uses one; to use all: torchrun --nproc_per_node %d …", args.n_gpu, args.n_gpu)
        args._n_gpu = 1


def check_best_metric(trainer: Any, args: ORPOConfig, eval_dataset: Any) -> None:
    """The metric that chooses the best model is one that the evaluation will report; the trainer knows its objective already.

    Raises:
        UserError: it is not. An evaluation of a subclass's own may report anything, and is not looked at.
    """
    from transformers import Trainer

    if eval_dataset is None or type(trainer).evaluate is not Trainer.evaluate:
        return
    has_reward = kind_of(trainer.training_objective).reward is not None
    sets = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    for problem in best_metric_problems(args.metric_for_best_model, has_reward=has_reward, sets=sets):
        raise problem


def resolve_objective(args: ORPOConfig) -> Objective:
    """The objective that the options name."""
    kind = find(args.objective)
    return kind.build({option.key: getattr(args, option.key) for option in kind.options})


def require_reference(objective: Objective, *sets: Any) -> None:
    """Every pair has what the objective compares it with.

    Args:
        sets: token groups, a dict of lists of them, or None.

    Raises:
        UserError: the objective needs log-probabilities under a reference, and a pair has none.
    """
    kind = kind_of(objective)
    if not kind.needs_reference:
        return
    for group in chain.from_iterable(_all_sets(*sets)):
        if group.pairs and group.reference_logp_sums is None:
            raise UserError(
                f"{kind.label} needs the log-probability of every answer under a frozen reference",
                where=str(group.where),
                expected="token groups with reference_logp_sums",
                mend="score them once with orpo.inference.scores.score_tokens under the weights to start from, or use `orpo compare`",
            )


def require_router_gradient(args: ORPOConfig, router: Router | None) -> None:
    """The router's loss reaches the model: reentrant checkpointing computes a layer without a graph, and logits that leave it beside its
    output would have no gradient.

    Raises:
        UserError: it would not.
    """
    if (
        router is not None
        and router.coef
        and args.gradient_checkpointing
        and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    ):
        raise UserError(
            "reentrant checkpointing loses the gradient of the router's auxiliary loss",
            where="gradient_checkpointing_kwargs",
            expected="use_reentrant: false, which is the default",
            mend="leave it out, or router_aux_loss_coef: 0",
        )


def resolve_model(model: Any, args: ORPOConfig, processing_class: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(model, tokenizer), loaded where they are given by name.

    Raises:
        UserError: the model cannot be loaded; two different tokenizers were given, or none can be found.
    """
    loaded, own_tokenizer = _loaded(model, args)
    return loaded, _resolve_tokenizer(processing_class, tokenizer, own_tokenizer, loaded)


def _loaded(model: Any, args: ORPOConfig) -> tuple[Any, Any]:
    """(model, its own tokenizer if it was loaded here by name)."""
    if not isinstance(model, str):
        if args.model_init_kwargs:
            raise UserError("the model is loaded already", where="model_init_kwargs", mend="give the model by name, or leave them out")
        return model, None
    from orpo.models.load import load_model

    given = args.model_init_kwargs
    kwargs = dict(given) if isinstance(given, dict) else {}
    revision = kwargs.pop("revision", args.model_revision)
    kwargs.pop("trust_remote_code", None)
    dtype = kwargs.pop("dtype", None)

    loaded = load_model(
        model,
        revision=revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=dtype,
        model_init_kwargs=kwargs,
        is_spread=args.spread.spreads_weights,
        is_sent=args.spread.spreads_weights,
    )
    return loaded.model, loaded.tokenizer


def _resolve_tokenizer(processing_class: Any, tokenizer: Any, own: Any, model: Any) -> Any:
    from orpo.models.load import as_tokenizer, load_tokenizer

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
    if not adapters:
        _require_weights_that_move(model)
    if encoder is not None and encoder.new_tokens:
        _grow_embeddings(model, tokenizer)
        if peft_config is not None:
            peft_config = with_new_tokens(peft_config, model, tokenizer.convert_tokens_to_ids(list(encoder.new_tokens)))
    if peft_config is not None:
        model = put_adapter(model, peft_config, use_gradient_checkpointing=args.gradient_checkpointing is True)
    elif args.gradient_checkpointing is True and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout(model)
        if rate := getattr(peft_config, "lora_dropout", 0.0):
            logger.warning("lora_dropout of %g is off, as all dropout is; disable_dropout: false turns it on", rate)
    else:
        logger.warning("dropout is on: how a step is cut into micro-batches then changes its update, and the engines cannot be compared")
    from orpo.models.load import upcast_trainable

    if not args.spread.spreads_weights and (note := upcast_trainable(model)):  # or it is done as they are spread
        logger.warning("%s", note)
    return model


def _require_weights_that_move(model: Any) -> None:
    from orpo.models.quantized import stored_quantization

    quantizer = getattr(model, "hf_quantizer", None)
    if not getattr(model, "is_quantized", False) or getattr(quantizer, "is_qat_trainable", False):
        return
    raise UserError(
        f"the model's weights are quantized ({stored_quantization(model)}): they cannot be trained themselves",
        where="peft_config",
        expected="an adapter on a quantized model",
        mend="train an adapter with peft_config, or name the model in full precision",
    )


def _grow_embeddings(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        settle_dtype(model.parameters(), spread_dtype(model))  # or the new rows would be rounded
        grow_embeddings(model, len(tokenizer))
        logger.info("the vocabulary has grown from %d to %d for the chat template's tokens", rows, len(tokenizer))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: modules, and the rates that layers keep as a number (`attention_dropout`, OPT's `dropout`)."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop")):
                setattr(module, name, 0.0)


def check_rows(model: nn.Module, tokenizer: Any, *sets: Any) -> None:
    """Every token of the rows has a row of the embeddings, and no row is longer than the model's positions. All ranks call it.

    Args:
        sets: token groups, a dict of lists of them, or None.

    Raises:
        UserError: a token beyond the embeddings, or a row beyond the positions of a model without rope scaling.
    """
    if getattr(model, "get_input_embeddings", lambda: None)() is None:
        return
    on_all(lambda: check_known_rows(model, tokenizer, *_all_sets(*sets)))


def check_known_rows(model: Any, tokenizer: Any, *sets: Sequence[TokenGroup]) -> None:
    """The same of rows that are known to be the same on every rank, without a word between them: a stream's, while a step computes."""
    for groups in sets:
        found = measures_of(groups)
        if len(found):
            row = int(found.largest_id.argmax())
            require_rows(model, [int(found.largest_id[row])], where=str(groups[row].where), tokenizer=tokenizer)
            _check_positions(model, groups[int(found.longest_tokens.argmax())])


def _all_sets(*sets: Any) -> list[Sequence[TokenGroup]]:
    """The sets themselves, of dicts those in them, and nothing of None."""
    return [inner for one in sets if one for inner in (one.values() if isinstance(one, dict) else [one])]


def _check_positions(model: Any, longest: TokenGroup) -> None:
    limit = positions_of(model.config)
    if limit is None or longest.longest_tokens <= limit:
        return
    what = f"a row has {longest.longest_tokens} tokens, the model has {limit} positions"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(value["rope_type"]) for value in (rope, *rope.values()) if isinstance(value, dict) and value.get("rope_type")} - {
        "default"
    }
    if kinds:
        logger.warning("%s (%s); its rope scaling (%s) may reach further", what, longest.where, ", ".join(sorted(kinds)))
        return
    raise UserError(what, where=str(longest.where), expected=f"at most {limit}", mend=f"max_length: {limit}")
