"""Which chat template a run uses, from what the user named and what the tokenizer has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from orpo.data.chat.render import CHATML, CHATML_TOKENS
from orpo.errors import DataError

_MOST_TEMPLATE_BYTES = 1 << 20
_TOKEN_LIKE = re.compile(r"<\|[A-Za-z0-9_]{1,30}\|>|<｜[^｜<>]{1,30}｜>|<(?:start|end)_of_[a-z]{1,20}>")
_EXPECTED = "chatml, none, the path of a Jinja file, the name of one of the tokenizer's templates, or Jinja text"


def unwrap_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside a processor (with the processor's template if it has none of its own), or the tokenizer itself.

    Raises:
        DataError: it is one of mistral-common's.
    """
    if callable(getattr(tokenizer, "added_tokens_decoder", None)):
        raise DataError(
            f"a {type(tokenizer).__name__} (mistral-common) has no chat template that rows could be rendered with",
            where="processing_class",
            expected="a tokenizer of transformers",
            mend="load it as PreTrainedTokenizerFast.from_pretrained(…), from the tokenizer.json beside its tekken.json",
        )
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None or not hasattr(inner, "convert_ids_to_tokens"):
        return tokenizer
    if not getattr(inner, "chat_template", None):
        inner.chat_template = getattr(tokenizer, "chat_template", None)
    return inner


def choose_template(tokenizer: Any, choice: str | Path | None) -> tuple[str | None, str, tuple[str, ...]]:
    """The template, the name that messages call it by, and the tokens that were added to the tokenizer for it.

    A template given by the user becomes the tokenizer's own, so that it is saved with the model. A template of None leaves the choice
    to a tokenizer that has several; the name "none" means plain text.

    Raises:
        DataError: nothing is there by that name, or the file cannot be read.
    """
    own = getattr(tokenizer, "chat_template", None)
    if choice is None:
        return (own if isinstance(own, str) else None, "tokenizer's chat template", ()) if own else (None, "none", ())
    if choice == "none":
        return None, "none", ()
    template, name = _find(choice, own)
    new = _add_tokens(tokenizer) if template == CHATML else ()
    if template == CHATML:
        template = _bos_of(tokenizer) + template
    tokenizer.chat_template = template
    return template, name, new


def _bos_of(tokenizer: Any) -> str:
    """What the built-in template prints first: the beginning-of-text token, where the tokenizer itself begins every text with it. Models
    of such tokenizers (Gemma, Llama 3) were never trained on a text without."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer.encode("a"))[:1] == [bos]
    return "{{ bos_token }}" if begins else ""


def missing_tokens(tokenizer: Any, printed: str, name: str) -> list[str]:
    """A sentence about what a template prints that looks like a token of its model, and that this tokenizer would read letter by letter."""
    # The whole vocabulary takes half a second to list; a fast backend is asked for one token.
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    find = tokenizer.get_vocab().get if backend is None else backend.token_to_id
    missing = [repr(text) for text in dict.fromkeys(_TOKEN_LIKE.findall(printed)) if find(text) is None]
    if not missing:
        return []
    return [
        f"the {name} prints {', '.join(missing[:6])}, which this tokenizer has no token for: it is trained letter by letter, and ends no "
        "answer. Add it to the tokenizer, or use chat_template: chatml, which adds its tokens"
    ]


def _add_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Add those of ChatML's tokens that the tokenizer lacks."""
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = tuple(token for token in CHATML_TOKENS if token not in vocabulary)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    return new


def _find(choice: str | Path, own: str | dict[str, str] | None) -> tuple[str, str]:
    text = str(choice)
    if isinstance(own, dict) and text in own:
        return own[text], f"tokenizer's chat template {text!r}"
    if text == "chatml":
        return CHATML, "built-in ChatML template"
    if "{{" in text or "{%" in text:
        return text, "chat template given as text"
    path = Path(text).expanduser()
    if not path.is_file():
        raise DataError(f"no chat template {text!r}: no such name and no such file", where="chat_template", expected=_EXPECTED)
    if path.stat().st_size > _MOST_TEMPLATE_BYTES:
        raise DataError(f"{path} is larger than {_MOST_TEMPLATE_BYTES} bytes", where="chat_template", expected="a Jinja file")
    try:
        found = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}", where="chat_template", expected="a Jinja file") from error
    if "{{" not in found and "{%" not in found:
        raise DataError(f"{path} holds no Jinja expression", where="chat_template", expected="a Jinja file")
    return found, f"chat template {path.name}"
