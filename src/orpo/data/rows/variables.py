"""Variables for the chat template: those of a run, and a row's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from orpo.data.reading.splits import did_you_mean
from orpo.data.rows.messages import BadRow, type_name
from orpo.errors import UserError

TEMPLATE_KWARGS = "chat_template_kwargs"
"""The column of a row's own variables for the chat template."""

OWN_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
    }
)
"""What orpo gives a template itself."""


def read_template_kwargs(value: Any) -> dict[str, Any] | None:
    """A row's variables for the chat template: an object, or the same as JSON text; None where there are none.

    A null inside says nothing: tables give every row the keys of all.

    Raises:
        BadRow: something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("wrong_type", f"{TEMPLATE_KWARGS} is text that is not JSON") from None
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise BadRow("wrong_type", f"{TEMPLATE_KWARGS} is a {type_name(value)}, not an object")
    if own := OWN_TEMPLATE_KWARGS.intersection(value):
        raise BadRow("wrong_type", f"{TEMPLATE_KWARGS} holds {', '.join(sorted(own))}, which is not the template's to choose")
    return {key: item for key, item in value.items() if item is not None} or None


def read_run_kwargs(value: Any) -> dict[str, Any]:
    """A run's variables for the chat template, by the same rules.

    Raises:
        UserError: they are none.
    """
    try:
        return read_template_kwargs(value) or {}
    except BadRow as bad:
        raise UserError(
            bad.detail.removeprefix(f"{TEMPLATE_KWARGS} "),
            where=TEMPLATE_KWARGS,
            expected="variables of the chat template, as an object",
            mend='for instance chat_template_kwargs: {"enable_thinking": false}',
        ) from None


def unread_variables(source: str | None, given: Mapping[str, Any]) -> list[str]:
    """Variables that a template has no word for, each with the name that may have been meant.

    Args:
        source: the template; None where rows are rendered without one.
        given: variables for it.
    """
    words = set(re.findall(r"[A-Za-z_]\w*", source or ""))
    return [f"{name!r}{did_you_mean(name, words)}" for name in given if name not in words]
