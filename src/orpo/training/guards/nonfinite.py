"""Stop, or skip, an optimizer step whose loss or gradient is not finite, on all ranks alike and before any weight is touched."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from orpo.errors import GuardStop
from orpo.system.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from orpo.data.types import TokenGroup

logger = logging.getLogger(__name__)

_MAX_NAMED = 8


class NonFiniteGuard:
    """Decides before each optimizer step whether it may be done.

    Args:
        policy: "stop" raises `GuardStop` at the first bad step; "skip" leaves the step out.
        max_skips: steps that may be left out in the whole run, resumes included.
        ranks: the processes of the run; a bad value on one is bad on all.
    """

    def __init__(self, policy: str = "stop", max_skips: int = 3, *, ranks: Ranks = ALONE) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(f"policy {policy!r} is neither 'stop' nor 'skip'")
        self.policy, self.max_skips, self.num_skipped = policy, max_skips, 0
        self._ranks = ranks

    def check(
        self,
        *,
        step: int,
        loss: Any,
        grad_norm: Any,
        groups: Sequence[TokenGroup] = (),
        logp_sums: Iterable[Any] | None = None,
        is_bad_elsewhere: bool | None = None,
    ) -> bool:
        """Whether to do the optimizer step; every rank calls it after the backward pass and the reduction of gradients.

        Args:
            step: the step about to be done, 1-based.
            loss: scalar, float or tensor.
            grad_norm: total norm of the gradients, float or tensor; a NaN or infinity in any gradient shows in it.
            groups: this rank's groups in the step, to name rows.
            logp_sums: summed log-probability of each of the groups' responses, in order, if at hand, to name the bad ones.
            is_bad_elsewhere: whether the loss of any rank is not finite, where the ranks have agreed on that already; the norm is that of
                all ranks. None: they are asked here.

        Returns:
            True: do it. False: leave it out (policy "skip"): zero the gradients and go on.

        Raises:
            GuardStop: policy "stop", or too many skips; on every rank with the same message.
        """
        values = {"loss": float(loss), "gradient norm": float(grad_norm)}
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not (self._ranks.max([len(bad)])[0] if is_bad_elsewhere is None else bad or is_bad_elsewhere):
            return True
        found = " and ".join(f"the {name} is {value}" for name, value in bad.items())
        # A collective inside a branch: all ranks take it, since all were told the same above.
        reports = self._ranks.gather(f"{found}; {_name_rows(groups, logp_sums)}" if bad else None)
        told = "; ".join(f"rank {rank}: {report}" if len(reports) > 1 else report for rank, report in enumerate(reports) if report)
        if self.policy == "skip" and self.num_skipped < self.max_skips:
            self.num_skipped += 1
            logger.warning("step %d left out (%d of at most %d): %s", step, self.num_skipped, self.max_skips, told)
            return False
        bound = f" after {self.num_skipped} skipped steps, the most allowed" if self.policy == "skip" else ""
        raise GuardStop(
            f"step {step}: {told}. Stopped before the optimizer step{bound}; the weights are those of step {step - 1} "
            "and the last checkpoint is intact.\n  to mend it: look at these rows, lower learning_rate or max_grad_norm"
            + ("" if self.policy == "skip" else ", or leave such steps out with on_nonfinite: skip")
        )

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint: the bound on skips holds over resumes."""
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore `state_dict()`."""
        self.num_skipped = int(state["num_skipped"])


def _name_rows(groups: Sequence[TokenGroup], logp_sums: Iterable[Any] | None) -> str:
    """The responses whose log-probability is not finite; if that is none (or not known), the rows of the step."""
    if not groups:
        return "the rows of this step are not known"
    names = [f"{group.where} answer {index}" for group in groups for index in range(len(group.response_ids))]
    if logp_sums is not None:
        values = [float(value) for value in logp_sums]
        bad = [f"{name} (log-probability {value})" for name, value in zip(names, values, strict=False) if not math.isfinite(value)]
        if bad:
            return f"bad answers: {_some(bad)}"
    return f"rows of this step: {_some([str(group.where) for group in groups])}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
