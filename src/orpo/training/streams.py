"""Optimizer steps over a stream: the same for every rank, one after the other, from wherever a checkpoint was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from orpo.data.stored.windows import StreamPosition, WindowedGroups
from orpo.data.types import TokenGroup
from orpo.training.steps import StepBatch, StepDataset, StepSampler


class StreamSampler:
    """Numbers of steps, as many as the run has: what is in them is the stream's part.

    Args:
        rows_per_step: rows of an optimizer step over all ranks.
        num_steps: of the run.

    Attributes:
        position: where the stream is behind the last step that was made.
    """

    def __init__(self, rows_per_step: int, num_steps: int) -> None:
        self.rows_per_step, self.num_steps = rows_per_step, num_steps
        self.position = StreamPosition()

    def set_epoch(self, epoch: int) -> None:
        """Nothing: passes are counted by the stream."""

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        return ([number] for number in range(self.num_steps))


class StreamDataset(torch.utils.data.Dataset[StepBatch]):
    """The steps of a stream, asked for by their numbers, in order. The first that is asked for begins at the sampler's position.

    Args:
        groups: the stream.
        sampler: knows the position, and the rows of a step.
        check: called with the rows of each step; raises for those that the model does not take.
        limits: of a micro-batch, the scope of the next-token loss, and the rank: keyword arguments of `StepSampler`.
    """

    def __init__(
        self, groups: WindowedGroups, sampler: StreamSampler, check: Callable[[Sequence[TokenGroup]], None], **limits: Any
    ) -> None:
        self._groups, self._sampler, self._check, self._limits = groups, sampler, check, limits
        self._steps: Iterator[tuple[list[TokenGroup], StreamPosition]] | None = None

    def __len__(self) -> int:
        return self._sampler.num_steps * self._sampler.rows_per_step

    def __getitem__(self, number: int) -> StepBatch:
        if self._steps is None:
            self._steps = self._groups.steps(self._sampler.rows_per_step, self._sampler.position)
        groups, after = next(self._steps)
        self._check(groups)
        plan = StepSampler(groups, rows_per_step=len(groups), **self._limits).plan(range(len(groups)))
        nll_scope, world_size = self._limits["nll_scope"], self._limits["world_size"]
        return replace(StepDataset(groups, nll_scope=nll_scope, world_size=world_size)[plan], after=after)
