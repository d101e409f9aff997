"""The part of the trainer that deals rows out: one item of a loader is one whole optimizer step of this rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from orpo.data.stored.windows import WindowedGroups
from orpo.data.types import TokenGroup
from orpo.errors import UserError
from orpo.run.scriptrows import as_groups
from orpo.training.ahead import Ahead
from orpo.training.setup import check_known_rows
from orpo.training.steps import StepBatch, StepDataset, StepSampler, only_item
from orpo.training.streams import StreamDataset, StreamSampler

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

EVALUATION_PIECE = 32
"""Micro-batches of a rank that are packed at a time in evaluation: enough to even them out, little enough to hold in memory."""


class LoaderMixin(_Base):
    """Loaders for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    encoder: Any
    train_sampler: StepSampler | StreamSampler
    _ahead: Ahead | None = None
    restore_accelerate: Callable[[], None]

    @property
    def known_rows(self) -> Sequence[TokenGroup]:
        """Rows to train on, to look at: all of them, or those of a stream's first window."""
        return self.train_dataset.first if isinstance(self.train_dataset, WindowedGroups) else self.train_dataset

    def _train_sampler(self) -> StepSampler | StreamSampler:
        if not isinstance(self.train_dataset, WindowedGroups):
            return self._sampler(self.train_dataset, is_training=True)
        args = self.args
        return StreamSampler(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size, args.max_steps)

    def _sampler(self, groups: Sequence[TokenGroup], *, is_training: bool) -> StepSampler:
        args = self.args
        rows = args.per_device_train_batch_size if is_training else args.per_device_eval_batch_size
        steps = args.gradient_accumulation_steps if is_training else 1
        return StepSampler(
            groups,
            rows_per_step=rows * steps * args.world_size * (1 if is_training else EVALUATION_PIECE),
            max_rows=rows,
            max_tokens=args.microbatch_tokens,
            nll_scope=args.nll_scope,
            seed=(args.seed if args.data_seed is None else args.data_seed) if is_training else None,
            rank=args.process_index,
            world_size=args.world_size,
            normalise_over_all=not is_training,
        )

    def _loader(self, steps: Dataset[StepBatch], sampler: StepSampler | StreamSampler) -> DataLoader:
        """Not prepared by accelerate: the sampler already knows the ranks, and every batch is one whole step."""
        return DataLoader(
            steps,
            batch_sampler=sampler,
            collate_fn=only_item,
            generator=torch.Generator().manual_seed(0),  # or the loader draws a seed from the global state, and resuming would not be exact
        )

    def get_train_dataloader(self) -> DataLoader:
        """One item is one optimizer step of this rank."""
        if isinstance(self.train_sampler, StreamSampler):
            return self._loader(self._stream(self.train_dataset, self.train_sampler), self.train_sampler)
        return self._loader(self._steps(self.train_dataset), self.train_sampler)

    def _steps(self, groups: Sequence[TokenGroup]) -> StepDataset:
        return StepDataset(groups, nll_scope=self.args.nll_scope, world_size=self.args.world_size)

    def _stream(self, groups: WindowedGroups, sampler: StreamSampler) -> StreamDataset:
        args = self.args
        return StreamDataset(
            groups,
            sampler,
            lambda rows: check_known_rows(self.model, self.processing_class, rows),
            max_rows=args.per_device_train_batch_size,
            max_tokens=args.microbatch_tokens,
            nll_scope=args.nll_scope,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All rows, normalised together, cut into micro-batches over the ranks; an item is a piece of them."""
        self.restore_accelerate()
        if isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict):
            rows = self.eval_dataset[eval_dataset]
        else:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise UserError("there are no rows to evaluate on", where="eval_dataset", mend="give eval_dataset, or dataset_test_split")
        groups = as_groups(rows, self.processing_class, self.args, encoder=self.encoder)[0]
        return self._loader(self._steps(groups), self._sampler(groups, is_training=False))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.train_sampler.rows_per_step

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepBatch], num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], None]:
        """The next step; its counts are in it."""
        if self._ahead is None:
            steps = list(itertools.islice(epoch_iterator, num_batches))
        else:
            steps = self._ahead.take(epoch_iterator, num_batches)
        for step in steps:
            if isinstance(self.train_sampler, StreamSampler) and step.after is not None:
                self.train_sampler.position = step.after
        return steps, None
