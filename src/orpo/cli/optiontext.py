"""Texts of options that commands read alike: a JSON object, a column map; and the options that were given."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from orpo.errors import UserError


def json_object(text: str, where: str) -> dict[str, Any]:
    """Further fields of a request, as a flag has them.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"found {text!r}", where=where, expected='a JSON object such as {"max_tokens": null, "max_completion_tokens": 2048}'
        )
    return value


def column_map(text: str | None, where: str = "--column_map") -> dict[str, str] | None:
    """A column map as the key of a run takes it: `prompt=question`, or a mapping in braces.

    Raises:
        UserError: it is none.
    """
    from orpo.config.values import NotAcceptedError, from_flag

    try:
        value: dict[str, str] | None = None if text is None else from_flag(dict[str, str] | None, text)
    except NotAcceptedError:
        raise UserError(f"found {text!r}", where=where, expected="'{prompt: question}', or prompt=question") from None
    return value


def given_flags(args: argparse.Namespace, declare: Callable[[Any], None]) -> list[str]:
    """Flags of a group whose values are not their defaults.

    Args:
        declare: the function that declares the group.
    """
    parser = argparse.ArgumentParser(add_help=False)
    declare(parser)
    return [f"--{name}" for name, default in vars(parser.parse_args([])).items() if getattr(args, name, default) != default]


def without_effect(flags: list[str], why: str) -> list[str]:
    """A line for options that do nothing here; none where none was given."""
    return [f"{', '.join(flags)} {'has' if len(flags) == 1 else 'have'} no effect: {why}"] if flags else []
