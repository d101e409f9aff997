"""What torch compiles in a run: at its start, and never again."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from orpo.engine.kernels import num_compiled_graphs

logger = logging.getLogger(__name__)

NUM_FIRST = 3
"""Steps in which graphs are new: whole and ragged micro-batches, of one group and of several."""


class GraphsCallback(TrainerCallback):
    """Counts the graphs that are compiled from the start of a training on, and says so when one is made in the middle of it: a step then
    takes as long as hundreds.

    Attributes:
        num_graphs: so far; 0 where nothing is compiled.
        num_late: of them, those compiled after the first steps.
    """

    def __init__(self) -> None:
        self.num_graphs = self.num_late = 0
        self._before = self._num_steps = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.num_graphs = self.num_late = self._num_steps = 0
        self._before = num_compiled_graphs()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._num_steps += 1
        found = num_compiled_graphs() - self._before
        new, self.num_graphs = found - self.num_graphs, found
        if new and self._num_steps > NUM_FIRST:
            self.num_late += new
            logger.warning(
                "step %d: torch compiled %d more graph%s in the middle of the run (%d so far); TORCH_LOGS=recompiles says why",
                state.global_step,
                new,
                "s" if new > 1 else "",
                found,
            )
