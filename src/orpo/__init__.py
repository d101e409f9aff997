"""Odds Ratio Preference Optimization (ORPO) of language models.

The public names are loaded on first use, so that `import orpo` and `orpo --help` stay quick: torch and transformers take seconds.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.audit import _audit as audit
    from orpo.compare import _compare as compare
    from orpo.config.options import ORPOConfig
    from orpo.evaluate import _evaluate as evaluate
    from orpo.run.look import preview
    from orpo.run.scripts import ModelConfig, ScriptArguments, get_kbit_device_map, get_peft_config, get_quantization_config
    from orpo.training.trainer import ORPOTrainer

    __version__: str

__all__ = [
    "ModelConfig",
    "ORPOConfig",
    "ORPOTrainer",
    "ScriptArguments",
    "__version__",
    "audit",
    "compare",
    "evaluate",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
    "preview",
]

_OF_SCRIPTS = ("ModelConfig", "ScriptArguments", "get_kbit_device_map", "get_peft_config", "get_quantization_config")
_HOME_OF = {
    "ORPOConfig": "orpo.config.options",
    "ORPOTrainer": "orpo.training.trainer",
    "preview": "orpo.run.look",
    **dict.fromkeys(_OF_SCRIPTS, "orpo.run.scripts"),
}
_CALLABLE_PACKAGES = ("audit", "compare", "evaluate")


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


# peft imports bitsandbytes wherever it is installed, and that complains on import, on CPUs with AVX512-BF16, that a package of kernels is
# missing. They would speed up generation from 4-bit weights on a CPU alone, which nothing here does; its other messages are shown.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_saying)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from orpo.system.machine import own_version

        return own_version()
    if (name in _CALLABLE_PACKAGES or name in _HOME_OF) and "torch" not in sys.modules:
        from orpo.system.process import let_threads_wait

        let_threads_wait()  # which torch reads when it is loaded, as it will be now
    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"orpo.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
