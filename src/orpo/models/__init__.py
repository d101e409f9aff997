"""Models by any name: load, find, adapters, GGUF in and out, export.

`load_model` and `load_tokenizer` are public; they are loaded on first use, since torch takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.models.load import LoadedModel, load_model, load_tokenizer

__all__ = ["LoadedModel", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from orpo.models import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
