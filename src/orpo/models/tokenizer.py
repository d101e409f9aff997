"""Tokenizers, as far as it does not matter where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_tokenizer(tokenizer_or_processor: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, also where a multimodal processor that holds one was handed over.

    Raises:
        UserError: neither a tokenizer nor a processor with one.
    """
    from transformers import PreTrainedTokenizerBase

    inner = tokenizer_or_processor
    if not isinstance(inner, PreTrainedTokenizerBase):
        inner = getattr(tokenizer_or_processor, "tokenizer", None)
    if not isinstance(inner, PreTrainedTokenizerBase):
        raise UserError(
            f"a {type(tokenizer_or_processor).__name__} cannot turn text into tokens",
            where="processing_class",
            expected="a tokenizer of transformers, or a processor that holds one",
        )
    return inner


def settle_padding(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Generation in batches pads, so a padding token must exist; which one it is cannot change a loss here."""
    if tokenizer.pad_token_id is not None:
        return ()
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return (f"the tokenizer has no padding token; {tokenizer.pad_token!r} is used",) if tokenizer.pad_token else ()
