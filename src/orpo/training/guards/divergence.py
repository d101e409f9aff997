"""A run whose loss has left what a language model can have: told at once, and stopped where it does not come back."""

from __future__ import annotations

import logging
import math
from typing import Any

from orpo.checkpoint import Ranks
from orpo.errors import GuardStop

logger = logging.getLogger(__name__)

START_FACTOR = 2.0
"""The loss is far above its start at this many times it."""
NUM_TOLD, NUM_STOPPED = 3, 25
"""Steps in a row above the bound after which a run is warned of, and stopped. Spikes of a sound run are shorter, and mostly far lower."""
_NUM_FIRST = 3
_UNIT, _MOST, _UNKNOWN = 1e-6, 1e9, -(2**62)
"""Ranks agree on whole numbers: the loss in units of 1e-6 nats, up to a bound far above any that is reached."""

ALONE = Ranks()


class DivergenceGuard:
    """Watches the next-token loss of every step, nats per token.

    The bound is both twice the loss of the first steps and ln(vocabulary). A guess that knows nothing, every token alike, has the latter:
    above it a model is worse than one that was never trained. A model trained from scratch starts there, hence the other condition. The
    next-token loss is measured whatever the objective, so that neither a large `orpo_alpha` nor another objective's scale counts.

    Args:
        vocabulary: number of tokens.
        learning_rate: for the message.
        ranks: of a distributed run; the lowest loss of all counts, so that every rank comes to the same verdict.
    """

    def __init__(self, vocabulary: int, *, learning_rate: float, ranks: Ranks = ALONE) -> None:
        self.guess = math.log(max(vocabulary, 2))
        self._ranks = ranks
        self.start_anew(learning_rate)

    def start_anew(self, learning_rate: float) -> None:
        """Another training begins."""
        self._learning_rate = learning_rate
        self._first: list[float] = []
        self._num_above = 0

    def end_step(self, step: int, nll: float | None, *, is_last: bool) -> None:
        """Call it after every optimizer step, on every rank.

        Args:
            step: the step that has been done, 1-based.
            nll: mean next-token loss of this rank's tokens in it, nats; None where it had none to learn from.
            is_last: no step follows: a run that ends above the bound is not done.

        Raises:
            GuardStop: above the bound for `NUM_STOPPED` steps in a row, or in the last `NUM_TOLD` of the run; on every rank.
        """
        known = nll if nll is not None and math.isfinite(nll) else None  # what is not finite is another guard's
        # Ranks know a maximum alone: of the negated losses it is the lowest.
        highest = self._ranks.max([_UNKNOWN if known is None else -round(min(known, _MOST) / _UNIT)])[0]
        if highest == _UNKNOWN:
            return
        lowest = -highest * _UNIT
        if len(self._first) < _NUM_FIRST:
            self._first.append(lowest)
        # The lowest of the first ones: at a rate that is far too high the second step may be lost already.
        start = min(self._first)
        bound = max(START_FACTOR * start, self.guess)
        self._num_above = self._num_above + 1 if lowest > bound else 0
        if self._num_above < NUM_TOLD:
            return
        told = (
            f"step {step}: the next-token loss is {lowest:.4g} nats per token, and has been above {bound:.3g} for {self._num_above} steps; "
            f"it was {start:.3g} at first, and guessing among all tokens alike has {self.guess:.3g}"
        )
        if self._num_above >= NUM_STOPPED or is_last:
            sound = f"checkpoints from before step {step - self._num_above} are sound"
            raise GuardStop(
                f"{told}. The weights are destroyed; none were saved as the run's outcome.\n  to mend it: a lower learning_rate "
                f"(it is {self._learning_rate:g}) and another output_dir; {sound}"
            )
        if self._num_above == NUM_TOLD and self._ranks.is_first:
            logger.warning("%s. The run stops if it stays there; learning_rate is %g", told, self._learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run is judged by the start of the whole."""
        return {"first": self._first, "num_above": self._num_above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self._first, self._num_above = list(state["first"]), int(state["num_above"])
