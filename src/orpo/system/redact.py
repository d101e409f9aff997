"""Secrets are taken out of everything that is written or shown: run.json, logs, messages, reports, cards."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "<redacted>"

# "token" as a whole word of the name: hub_token is a secret, max_tokens_per_microbatch and label_pad_token_id are not.
_SECRET_NAME = re.compile(r"(^|_|-)(token|secret|password|passwd|credentials?|(api|access|private)[_-]?key)$", re.IGNORECASE)
_VOCABULARY = frozenset(f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image"))
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}"
    r"|xox[abpr]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_MIN_SECRET_LENGTH = 8
"""Below this a value of the environment is no secret worth hiding, and replacing it would garble texts."""


def is_secret_name(name: str) -> bool:
    """Whether an option or environment variable of this name holds a secret."""
    return name.lower() not in _VOCABULARY and bool(_SECRET_NAME.search(name))


def _environment_secrets() -> list[str]:
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _MIN_SECRET_LENGTH}
    return sorted(values, key=len, reverse=True)


def redact_text(text: str) -> str:
    """The text without tokens of known forms, logins in addresses, and the values of the environment's secret variables."""
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return _URL_LOGIN.sub(HIDDEN, _SECRET_TEXT.sub(HIDDEN, text))


def redact(value: Any) -> Any:
    """The same structure with every secret replaced: values under secret names, and secrets inside texts."""
    if isinstance(value, dict):
        return {
            redact(key): HIDDEN if isinstance(key, str) and is_secret_name(key) and item not in (None, "") else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_words(words: Sequence[str]) -> list[str]:
    """A command line without secrets: also the value behind a secret's flag (`--hub_token VALUE`, `--hub_token=VALUE`)."""
    shown: list[str] = []
    hides_next = False
    for word in words:
        name, has_value, _ = word.partition("=")
        is_flag = word.startswith("-") and is_secret_name(name.lstrip("-"))
        if hides_next and not word.startswith("--"):
            shown.append(HIDDEN)
        else:
            shown.append(f"{name}={HIDDEN}" if is_flag and has_value else redact_text(word))
        hides_next = is_flag and not has_value
    return shown
