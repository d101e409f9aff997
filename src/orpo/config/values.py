"""What a configuration field accepts, read from its type annotation.

One reading of the annotations serves Python (`is_accepted`), YAML (`from_yaml`) and flags (`from_flag`), so that a value is right or
wrong alike wherever it was written.
"""

from __future__ import annotations

import difflib
import enum
import math
import numbers
import os
import re
import types
import typing
from typing import Any

import yaml

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_ASSIGNMENTS = re.compile(r"[A-Za-z_]\w*=[^=,{}\[\]/]+(,\s*[A-Za-z_]\w*=[^=,{}\[\]/]+)*")
"""`min_lr=1e-6,num_cycles=2`; a slash would be a file's."""
_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})
_NOTHING = frozenset({"none", "null", "~"})


class NotAcceptedError(ValueError):
    """A value does not fit its field's type."""


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _accepts_one(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, os.PathLike, enum.Enum))
    if hint is list or origin is list:
        inner = typing.get_args(hint) or (Any,)
        return isinstance(value, (list, tuple)) and all(is_accepted(inner[0], item) for item in value)
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    return isinstance(hint, type) and isinstance(value, hint)


def is_accepted(hint: Any, value: Any) -> bool:
    """Whether `value` already has a type that `hint` allows; whole numbers are fine where a number is asked for, booleans never are."""
    return any(_accepts_one(member, value) for member in members(hint))


def describe(hint: Any) -> str:
    """The type in a user's words: "a number or nothing"."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing (null)"}
    words: list[str] = []
    for member in members(hint):
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            word = "one of " + ", ".join(repr(choice) for choice in typing.get_args(member))
        elif member is list or origin is list:
            inner = typing.get_args(member)
            word = f"a list, each item {describe(inner[0])}" if inner else "a list"
        elif member is dict or origin is dict:
            word = "a mapping (key: value)"
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            continue
        else:
            word = names.get(member, getattr(member, "__name__", str(member)))
        if word not in words:
            words.append(word)
    return " or ".join(words)


def found(value: Any) -> str:
    """A value and its type in a user's words: "the text 'abc'"."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Number):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, dict):
        return f"a mapping with the keys {', '.join(map(str, list(value)[:5]))}" if value else "an empty mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def _number(text: str, *, is_whole: bool) -> int | float:
    """Read a number; `1e-5` and `1_000` too, and `1e3` where a whole number is asked for."""
    stripped = text.strip()
    if stripped.lower() in ("nan", "inf", "-inf", ".nan", ".inf", "-.inf"):
        if is_whole:
            raise NotAcceptedError(text)
        return float(stripped.replace(".", ""))
    if not _NUMBER.fullmatch(stripped):
        raise NotAcceptedError(text)
    try:
        return int(stripped)
    except ValueError:
        value = float(stripped.replace("_", ""))
    if not is_whole:
        return value
    if not math.isfinite(value) or value != int(value):
        raise NotAcceptedError(text)
    return int(value)


def _with_numbers(value: Any) -> Any:
    """A mapping's texts that read as numbers, as numbers (`{min_lr: 1e-6}`); a revision stays text: a commit may look so (1234e56)."""
    if isinstance(value, dict):
        return {key: item if str(key).endswith("revision") else _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return _number(value, is_whole=False) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _number_or_text(text: str) -> Any:
    return _number(text, is_whole=False) if _NUMBER.fullmatch(text.strip()) else text


def split_list(text: str) -> list[str]:
    """`a, b` as a list of texts."""
    return [item.strip() for item in text.split(",") if item.strip()]


def from_yaml(hint: Any, value: Any) -> Any:
    """Fit a value that YAML has already read.

    YAML 1.1 reads `1e-5` (no dot) as text, and whatever stands in quotes; where no text is asked for, a number, a truth value or nothing
    that was written so is taken as what was meant. A single item stands for a list of one, `a, b` for a list of texts. Nothing else is
    converted: `"4"` for a whole number is, `"four"` is not. Inside a mapping of anything, what reads as a number is one, too.

    Raises:
        NotAcceptedError: the value does not fit.
    """
    alternatives = members(hint)
    if isinstance(value, dict) and not any(typing.get_args(member)[1:] == (str,) for member in alternatives):
        value = _with_numbers(value)
    if is_accepted(hint, value):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        if bool in alternatives and word in (_TRUE | _FALSE) - {"0", "1"}:
            return word in _TRUE
        if type(None) in alternatives and word in _NOTHING:
            return None
        for kind in (int, float):
            if kind in alternatives:
                try:
                    return _number(value, is_whole=kind is int)
                except NotAcceptedError:
                    continue
    if isinstance(value, float) and int in alternatives and math.isfinite(value) and value == int(value):
        return int(value)
    if isinstance(value, str) and "," in value and any(member == list[str] for member in alternatives):
        return split_list(value)
    if not isinstance(value, (list, dict)) and value is not None:
        for member in alternatives:
            if typing.get_origin(member) is list and is_accepted(member, [value]):
                return [value]
    raise NotAcceptedError(value)


def from_flag(hint: Any, text: str) -> Any:
    """Fit the text of a command-line flag: `true`, `1e-5`, `none`, `[a, b]`, `{k: v}` or `k=v,l=w`, or `a,b` for a list of texts.

    Raises:
        NotAcceptedError: the text does not fit.
    """
    alternatives = members(hint)
    lowered = text.strip().lower()
    if hint is Any:  # an older name, whose value its own translation judges
        return lowered in _TRUE if lowered in (_TRUE | _FALSE) - {"0", "1"} else _number_or_text(text)
    if type(None) in alternatives and lowered in _NOTHING:
        return None
    for member in alternatives:
        if typing.get_origin(member) is typing.Literal and text in typing.get_args(member):
            return text
    if bool in alternatives and lowered in _TRUE | _FALSE and not (lowered in "01" and int in alternatives):
        return lowered in _TRUE
    for kind in (int, float):
        if kind in alternatives:
            try:
                return _number(text, is_whole=kind is int)
            except NotAcceptedError:
                continue
    mapping = next((member for member in alternatives if member is dict or typing.get_origin(member) is dict), None)
    if mapping is not None and _ASSIGNMENTS.fullmatch(text.strip()):
        text = "{" + text.strip().replace("=", ": ") + "}"
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = from_yaml(hint, yaml.safe_load(text))
        except (yaml.YAMLError, NotAcceptedError) as error:
            if str not in alternatives:
                raise NotAcceptedError(text) from error
        else:
            if any(_accepts_one(member, value) for member in alternatives if member is not str):
                return value
    if str in alternatives:
        return text
    for member in alternatives:
        if typing.get_origin(member) is list and str in members(typing.get_args(member)[0]):
            return split_list(text)
    raise NotAcceptedError(text)


def did_you_mean(word: Any, choices: typing.Iterable[str]) -> str | None:
    """`did you mean 'cosine'?` for a near miss, else None."""
    close = difflib.get_close_matches(str(word), list(choices), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in close)}?" if close else None
