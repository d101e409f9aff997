"""Odds Ratio Preference Optimization (ORPO) of language models.

The public names are loaded on first use, so that `import orpo` and `orpo --help` stay quick: torch and transformers take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.audit import _audit as audit
    from orpo.compare import _compare as compare
    from orpo.config.options import ORPOConfig
    from orpo.evaluate import _evaluate as evaluate
    from orpo.run.look import preview
    from orpo.training.trainer import ORPOTrainer

    __version__: str

__all__ = ["ORPOConfig", "ORPOTrainer", "__version__", "audit", "compare", "evaluate", "preview"]

_HOME_OF = {"ORPOConfig": "orpo.config.options", "ORPOTrainer": "orpo.training.trainer", "preview": "orpo.run.look"}
_CALLABLE_PACKAGES = ("audit", "compare", "evaluate")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from orpo.system.machine import own_version

        return own_version()
    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"orpo.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
