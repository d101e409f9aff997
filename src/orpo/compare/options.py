"""What is compared, and how thoroughly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from orpo.compare.data import Split
from orpo.compare.methods import DEFAULT_METHODS, find_methods
from orpo.errors import UserError


@dataclass(frozen=True)
class CompareOptions:
    """What to compare, and how thoroughly.

    Attributes:
        methods: names, in the order to show them.
        seeds: of data order and adapters; the first also decides the grids.
        learning_rates: the grid that every method gets; empty takes the configuration's rate alone.
        strengths: grid of a method's own strength, by method; a method that is missing keeps its default grid.
        split: how rows are parted.
        num_points: points of the first seed's curves of log-probabilities.
        sweep: widen the grids of ORPO and SFT + DPO to five rates by five strengths, for the heat map of stability.
        evaluations: arguments of `orpo eval` for every final run and the start; `@METHOD` is replaced by that method's run.
        output: the comparison's folder; None derives it from the configuration.
        num_processes: that train a stage together, each with the whole model (DDP). A step has so many times the rows, as in `orpo train`.

    Example:
        >>> from orpo.compare import CompareOptions
        >>> CompareOptions(methods=("sft", "orpo"), seeds=(42, 1, 2)).check()
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (42,)
    learning_rates: tuple[float, ...] = ()
    strengths: dict[str, tuple[float, ...]] = field(default_factory=dict)
    split: Split = field(default_factory=Split)
    num_points: int = 8
    sweep: bool = False
    evaluations: tuple[str, ...] = ()
    output: str | None = None
    num_processes: int = 1

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: unknown methods or strengths, no seed, a fraction or rate out of range.
        """
        if self.num_processes < 1:
            raise UserError(f"found {self.num_processes}", where="--num_processes", expected="at least 1")
        names = {method.name for method in find_methods(self.methods)}
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"found {list(self.seeds)}", where="--seeds", expected="one or more different whole numbers")
        for name in self.strengths:
            if name not in names:
                raise UserError(f"{name} is not compared", where="--strengths", expected=f"one of {', '.join(sorted(names))}")
        numbers = [*self.learning_rates, *itertools.chain(*self.strengths.values())]
        if any(not 0 < number < float("inf") for number in numbers):
            raise UserError(f"found {numbers}", where="--learning_rates, --strengths", expected="positive numbers")
        for name in ("test_fraction", "validation_fraction"):
            if not 0 < getattr(self.split, name) < 1:
                raise UserError(f"found {getattr(self.split, name)}", where=f"--{name}", expected="between 0 and 1")
