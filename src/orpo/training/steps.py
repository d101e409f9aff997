"""Whole optimizer steps: which rows they hold, and how each rank cuts its part into micro-batches.

transformers counts micro-batches to find the step, recycles rows where ranks are uneven, and scales by its own counts. Here the sampler
yields one optimizer step at a time, so every count is known before anything is computed: all ranks get the same number of micro-batches
(one of weight zero where a rank is short), no row appears twice in an epoch, and the ragged tail is a smaller step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from orpo.data.stored.measures import measures_of
from orpo.data.stored.windows import StreamPosition
from orpo.data.types import TokenGroup
from orpo.engine.layout import PreferenceBatch, collate
from orpo.engine.packing import pack


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step, as one rank sees it.

    Attributes:
        microbatches: row indices of each of this rank's micro-batches; empty for a filler.
        filler: a row to run with weight zero in an empty micro-batch.
        rows: all rows of the step, over all ranks.
        num_nll_tokens, num_pairs, num_tokens: what the losses are divided by: counts of the whole step, over all ranks.
    """

    microbatches: tuple[tuple[int, ...], ...]
    filler: int
    rows: tuple[int, ...]
    num_nll_tokens: int
    num_pairs: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """The micro-batches of one rank's part of an optimizer step, normalised by the whole step."""

    microbatches: tuple[PreferenceBatch, ...]
    num_rows: int
    """Rows of the whole step."""
    after: StreamPosition | None = None
    """Where a stream is behind this step."""

    def pinned(self) -> StepBatch:
        """The same step in memory that a GPU copies from by itself."""
        return replace(self, microbatches=tuple(batch.pinned() for batch in self.microbatches))

    @property
    def groups(self) -> list[TokenGroup]:
        """This rank's rows, fillers included."""
        return [group for batch in self.microbatches for group in batch.groups]


class StepSampler:
    """Yields a `StepPlan` per optimizer step. Every rank builds the same plan and takes its own part, without communication.

    Args:
        groups: the rows.
        rows_per_step: rows of an optimizer step over all ranks.
        max_rows: most rows of a micro-batch.
        max_tokens: most packed tokens of a micro-batch; a longer row is a micro-batch of its own.
        nll_scope: "sequence" or "response".
        seed: of the shuffle; None keeps the order.
        rank, world_size: this process and the number of them.
        normalise_over_all: divide by the counts of all rows, not by those of a step: evaluation, whose "steps" are only pieces of one mean.
    """

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        *,
        rows_per_step: int,
        max_rows: int,
        max_tokens: int,
        nll_scope: str = "sequence",
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        normalise_over_all: bool = False,
    ) -> None:
        self.rows_per_step, self.max_rows, self.max_tokens = rows_per_step, max_rows, max_tokens
        self.normalise_over_all = normalise_over_all
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        found = measures_of(groups)
        self.sizes, self.nll_tokens, self.pairs = found.num_tokens, found.nll_tokens(nll_scope), found.num_pairs

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.rows_per_step)

    def __iter__(self) -> Iterator[list[StepPlan]]:
        order = self.order()
        for start in range(0, len(order), self.rows_per_step):
            yield [self.plan(order[start : start + self.rows_per_step].tolist())]

    def order(self) -> np.ndarray:
        """int64, the rows of the current epoch in training order, each exactly once."""
        if self.seed is None:
            return np.arange(len(self.sizes))
        # A product and not a sum: epoch 1 of seed 0 would be epoch 0 of seed 1.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(len(self.sizes), generator=generator).numpy()

    def plan(self, rows: Sequence[int]) -> StepPlan:
        """Cut the rows of a step into micro-batches, and take this rank's."""
        bins = pack(self.sizes[list(rows)].tolist(), num_ranks=self.world_size, max_rows=self.max_rows, max_tokens=self.max_tokens)
        own = bins[self.rank :: self.world_size]  # fullest first, so what is dealt out in turn weighs alike
        counted = slice(None) if self.normalise_over_all else list(rows)
        return StepPlan(
            microbatches=tuple(tuple(rows[item] for item in sorted(content)) for content in own),
            # Every rank has to enter every collective, so one without rows runs the cheapest of the step for nothing.
            filler=min(rows, key=lambda row: int(self.sizes[row])),
            rows=tuple(rows),
            num_nll_tokens=int(self.nll_tokens[counted].sum(dtype=np.int64)),
            num_pairs=int(self.pairs[counted].sum(dtype=np.int64)),
            num_tokens=int(self.sizes[counted].sum(dtype=np.int64)),
        )


class StepDataset(torch.utils.data.Dataset[StepBatch]):
    """Rows that are asked for by whole `StepPlan`s. Its length is the number of rows."""

    def __init__(self, groups: Sequence[TokenGroup], *, nll_scope: str = "sequence", world_size: int = 1) -> None:
        self.groups, self.nll_scope, self.world_size = groups, nll_scope, world_size

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, plan: StepPlan) -> StepBatch:
        # Data-parallel wrappers average gradients over ranks; dividing the normalisers by the number of ranks undoes it.
        counts = [count / self.world_size for count in (plan.num_nll_tokens, plan.num_pairs, plan.num_tokens)]
        batches = []
        for rows in plan.microbatches:
            batch = collate([self.groups[row] for row in rows or (plan.filler,)], self.nll_scope)
            batch = batch if rows else without_weight(batch)
            batches.append(batch.with_normalisers(*counts))
        return StepBatch(tuple(batches), len(plan.rows))


def without_weight(batch: PreferenceBatch) -> PreferenceBatch:
    """The same batch counting for nothing: no token in the next-token and the router's loss, no pair."""
    index = batch.index
    nothing = index.chosen_B[:0]
    weightless = replace(index, nll_weight_N=torch.zeros_like(index.nll_weight_N), chosen_B=nothing, rejected_B=nothing)
    spans = tuple(replace(span, b=(0, 0)) for span in batch.spans)
    return replace(batch, index=weightless, spans=spans, token_weight=0.0)


def only_item(items: list[StepBatch]) -> StepBatch:
    """Collate function of a loader whose sampler asks for one step at a time."""
    return items[0]


class _Stepping(Protocol):
    """What `EpochCallback` needs of a trainer."""

    train_sampler: StepSampler

    def make_up_evaluation(self) -> None: ...


class EpochCallback(TrainerCallback):
    """Epochs, told from the step counter alone, so that a run resumed at any step does what the uninterrupted one does.

    The sampler gets the epoch's shuffle. What transformers does at the end of an epoch (log, evaluate, save) happens at the end of its last
    step instead: between the two a checkpoint may be saved, and a run resumed from it begins with the next epoch.
    """

    def __init__(self, trainer: _Stepping) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.make_up_evaluation()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        sampler = self.trainer.train_sampler
        sampler.set_epoch(state.global_step // max(len(sampler), 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % max(len(self.trainer.train_sampler), 1) == 0 or state.global_step >= state.max_steps:
            # Only ever switched on: a callback before this one may have asked for the same.
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        if state.global_step >= state.max_steps:  # what came after the last regular log, which may be all there was
            control.should_log |= args.logging_strategy == IntervalStrategy.STEPS

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # All of it was done at the epoch's last step; transformers sets these again here.
        control.should_log = control.should_evaluate = control.should_save = False
