"""Tokenizers, as far as it does not matter where they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = "What is it, and how many are there?"
"""Its words stay apart in every tokenizer that has blanks."""


def as_tokenizer(tokenizer_or_processor: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, also where a multimodal processor that holds one was handed over.

    Raises:
        UserError: neither a tokenizer nor a processor with one, or it was read by rules that are not its own.
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
    if runs_words_together(inner):
        place = inner.name_or_path
        raise UserError(
            f"the tokenizer of {place} loses the blanks between words: it was read as a {type(inner).__name__}, "
            "whose rules are others than those of its tokenizer.json",
            where="processing_class",
            mend=f"read it with `transformers.PreTrainedTokenizerFast.from_pretrained({place!r})`, or with a newer transformers",
        )
    return inner


def read_tokenizer(location: str, **arguments: Any) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """What `AutoTokenizer` finds there, or by the rules of tokenizer.json where it was read by others; and what is to be told of it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
    if not runs_words_together(tokenizer, arguments.get("revision")):
        return tokenizer, ()
    name = type(tokenizer).__name__
    note = f"tokenizer_config.json asks for a {name}, which loses the blanks between words; the tokenizer is read by its tokenizer.json"
    return PreTrainedTokenizerFast.from_pretrained(location, **arguments), (note,)


def runs_words_together(tokenizer: Any, revision: str | None = None) -> bool:
    """Whether a text comes back with fewer words than by the rules in the tokenizer's own file.

    transformers builds the tokenizers of some classes anew from the vocabulary. Where tokenizer_config.json names the wrong class, as with
    DeepSeek's models, its older versions (5.17) give a tokenizer without blanks, and nobody is told. A tokenizer that has none of its own
    is as it should be, hence the look into the file.
    """
    if _keeps_words(tokenizer.decode, lambda text: tokenizer.encode(text, add_special_tokens=False)) is not False:
        return False
    if (file := _own_file(str(getattr(tokenizer, "name_or_path", "") or ""), revision)) is None:
        return False
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    return bool(_keeps_words(own.decode, lambda text: own.encode(text, add_special_tokens=False).ids))


def _keeps_words(decode: Callable[[list[int]], str], encode: Callable[[str], list[int]]) -> bool | None:
    """Whether a text has all of its words on the way back; None: it cannot be encoded."""
    try:
        return len(decode(encode(TEXT)).split()) >= len(TEXT.split())
    except Exception:  # tokenizers raises nothing more special
        return None


def _own_file(name: str, revision: str | None) -> Path | None:
    """tokenizer.json of a folder, or of a hub's repository if it is in the cache."""
    if not name or Path(name).is_dir():
        file = Path(name) / "tokenizer.json"
        return file if name and file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found) if isinstance(found, str) else None


def settle_padding(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Generation in batches pads, so a padding token must exist; which one it is cannot change a loss here."""
    if tokenizer.pad_token_id is not None:
        return ()
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return (f"the tokenizer has no padding token; {tokenizer.pad_token!r} is used",) if tokenizer.pad_token else ()
