"""`ORPOConfig`, every check on its values, and TRL's names for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig

__all__ = ["ORPOConfig"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use, since it brings transformers
        from orpo.config import options

        return getattr(options, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
