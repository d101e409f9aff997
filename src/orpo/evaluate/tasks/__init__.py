"""The tasks of `orpo eval`, one file each. A new one is a file here and a line below."""
# ruff: noqa: I001  in the order in which people are told of them

from orpo.evaluate.tasks import pairs
from orpo.evaluate.tasks import retention
from orpo.evaluate.tasks import ifeval
from orpo.evaluate.tasks import mtbench
from orpo.evaluate.tasks import alpacaeval
from orpo.evaluate.tasks import custom

__all__ = ["alpacaeval", "custom", "ifeval", "mtbench", "pairs", "retention"]
