"""`orpo compare`: SFT, SFT + DPO, SimPO and ORPO from the same start, on the same rows in the same order, at the same care.

    compare(config, CompareOptions(methods=("sft", "sft+dpo", "simpo", "orpo"), seeds=(42, 1, 2)))

Each method gets the same small grid of learning rate and its own strength, decided on validation rows; the test rows are looked at once,
by the chosen settings. Every stage runs in a process of its own (`orpo.compare.stage`) and leaves a folder named by what it is, so that a
comparison that was interrupted, or is given more seeds or methods, does only what is missing.
"""

from __future__ import annotations

from orpo.compare.comparison import CompareOptions, compare
from orpo.compare.data import Split
from orpo.compare.methods import DEFAULT_METHODS, Method

__all__ = ["DEFAULT_METHODS", "CompareOptions", "Method", "Split", "compare"]
