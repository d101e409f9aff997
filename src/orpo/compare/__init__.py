"""`orpo compare`: SFT, SFT + DPO, SimPO and ORPO from the same start, on the same rows in the same order, at the same care.

    compare(config, CompareOptions(methods=("sft", "sft+dpo", "simpo", "orpo"), seeds=(42, 1, 2)))

Each method gets the same small grid of learning rate and its own strength, decided on validation rows; the test rows are looked at once,
by the chosen settings. Every stage runs in a process of its own (`orpo.compare.stage`) and leaves a folder named by what it is, so that a
comparison that was interrupted, or is given more seeds or methods, does only what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo.compare.comparison import compare
from orpo.compare.data import Split
from orpo.compare.methods import DEFAULT_METHODS, Method
from orpo.compare.options import CompareOptions
from orpo.run.config import RunConfig, resolve
from orpo.system.callables import make_callable

__all__ = ["DEFAULT_METHODS", "CompareOptions", "Method", "Split", "compare"]


def _compare(config: RunConfig | str | Path, options: CompareOptions | None = None, **fields: Any) -> dict[str, Any]:
    """Compare methods: `from orpo import compare; compare("recipes/demo.yaml", methods=("sft", "orpo"))`.

    Args:
        config: a configuration file, or what `orpo.run.config.resolve` gives.
        options: which methods, seeds and grids; or their fields, by name. `tell` receives each line for the user.

    Returns:
        What `comparison.json` holds.

    Raises:
        UserError: anything wrong with configuration, data or options.

    Example: each stage is a run in a process of its own; this takes about a minute on two cores.

        >>> from orpo import compare
        >>> found = compare("orpo.yaml", methods=("sft", "orpo"), strengths={"orpo": (1.0,)}, output="comparison", tell=lambda line: None)
        >>> sorted(found["methods"])
        ['orpo', 'sft']
    """
    tell = fields.pop("tell", print)
    return compare(config if isinstance(config, RunConfig) else resolve(config), options or CompareOptions(**fields), tell)


make_callable(__name__, _compare)
