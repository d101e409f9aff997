"""Tokens that are new to a model: whether its embeddings have a row for each, and how an adapter trains those rows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


def with_new_tokens(peft_config: PeftConfig, model: PreTrainedModel, token_ids: Sequence[int]) -> PeftConfig:
    """The adapter's configuration with the rows of new tokens trained and saved, or as it is where there is nothing to add.

    A frozen row at the mean of all others would leave a new end of turn beyond what any update of the layers can reach. With an untied
    head its rows are named too, under the model's own names; a tied head shares them.
    """
    if not token_ids or getattr(peft_config, "trainable_token_indices", None):
        return peft_config
    if not hasattr(peft_config, "trainable_token_indices"):
        logger.warning("a %s cannot train the rows of the %d new tokens; they stay as they are", type(peft_config).__name__, len(token_ids))
        return peft_config
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    wanted = copy.copy(peft_config)
    name_of = _name_in(model)
    if is_tied and _is_named(name_of(head), wanted):
        logger.warning("the tied output head is adapted by name; the input rows of the %d new tokens stay as they are", len(token_ids))
        return peft_config
    modules = [embeddings] if head is None or is_tied else [embeddings, head]
    names = [name for name in map(name_of, modules) if not _is_named(name, wanted)]
    biased = [name for name in names if getattr(model.get_submodule(name), "bias", None) is not None]
    # PEFT's single rows leave a layer's bias out of its product; a head with one is trained whole.
    wanted.modules_to_save = [*(wanted.modules_to_save or []), *biased] or None
    rows = [name for name in names if name not in biased]
    if rows:
        wanted.trainable_token_indices = {name: sorted(token_ids) for name in rows}
    logger.info(
        "the adapter trains the rows of %d new tokens in %s", len(token_ids), " and ".join(names) or "layers that it adapts already"
    )
    return wanted


def _name_in(model: PreTrainedModel) -> Any:
    names = {id(module): name for name, module in model.named_modules()}
    return lambda module: names[id(module)]


def _is_named(name: str, peft_config: Any) -> bool:
    """Whether the adapter trains this module already: whole, or as one of the layers it adapts."""
    targets = getattr(peft_config, "target_modules", None)
    named = [*(peft_config.modules_to_save or ()), *(targets if isinstance(targets, list | tuple | set) else ())]
    return any(name == one or name.endswith(f".{one}") for one in named)


def require_rows(model: Any, token_ids: Iterable[int], *, where: str, tokenizer: Any = None) -> None:
    """Every token has a row of the embeddings; torch would say "index out of range".

    Args:
        model: whose embeddings; one that has none to show is not looked at.
        token_ids: the tokens, or the largest of them.
        where: what they belong to.
        tokenizer: theirs, to name the token.

    Raises:
        UserError: one has none.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or getattr(embeddings, "weight", None) is None:
        return
    num_rows, token_id = embeddings.weight.shape[0], max(token_ids, default=0)
    if token_id < num_rows:
        return
    name = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(int(token_id))!r}"
    size = token_id + 1 if tokenizer is None else len(tokenizer)
    raise UserError(
        f"the token{name} has id {token_id}, the model's embeddings have {num_rows} rows",
        where=where,
        expected="a tokenizer that belongs to the model",
        mend="use the model's own tokenizer and chat template, or give the model rows for it first: "
        f"model.resize_token_embeddings({size}), then model.save_pretrained(…)",
    )


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model was made for; None where its architecture has no such limit, or the configuration is not known."""
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
