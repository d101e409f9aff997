"""Tokens that are new to a model: whether its embeddings have a row for each, and how an adapter trains those rows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

    from orpo.data.types import TokenGroup

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


def check_rows(model: nn.Module, tokenizer: Any, *sets: Any) -> None:
    """Every token of the rows has a row of the embeddings, and no row is longer than the model's positions.

    Args:
        sets: token groups, a dict of lists of them, or None.

    Raises:
        UserError: a token beyond the embeddings, or a row beyond the positions of a model without rope scaling.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    lists = [inner for one in sets if one for inner in (one.values() if isinstance(one, dict) else [one])]
    groups = [group for inner in lists for group in inner]
    if embeddings is None or not groups:
        return
    num_rows = embeddings.weight.shape[0]
    worst = max(groups, key=_largest_id)
    token_id = _largest_id(worst)
    if token_id >= num_rows:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(int(token_id))!r} has id {token_id}, the model's embeddings have {num_rows} rows",
            where=str(worst.where),
            expected="a tokenizer that belongs to the model",
            mend="use the model's own tokenizer and chat template, or give the model rows for it first: "
            f"model.resize_token_embeddings({len(tokenizer)}), then model.save_pretrained(…)",
        )
    _check_positions(model, groups)


def _largest_id(group: TokenGroup) -> int:
    return max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids) if len(ids))


def _check_positions(model: Any, groups: Sequence[TokenGroup]) -> None:
    limit = num_positions(model.config)
    longest = max(groups, key=lambda group: group.longest_tokens)
    if limit is None or longest.longest_tokens <= limit:
        return
    what = f"a row has {longest.longest_tokens} tokens, the model has {limit} positions"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {value.get("rope_type") for value in (rope, *rope.values()) if isinstance(value, dict)} - {None, "default"}
    if kinds:
        logger.warning("%s (%s); its rope scaling (%s) may reach further", what, longest.where, ", ".join(sorted(kinds)))
        return
    raise UserError(what, where=str(longest.where), expected=f"at most {limit}", mend=f"max_length: {limit}")


def num_positions(config: Any) -> int | None:
    """The longest sequence that a model was made for; None where its architecture has no such limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
