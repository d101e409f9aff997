"""The part of the trainer that deals rows out: one item of a loader is one whole optimizer step of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from orpo.data.types import TokenGroup
from orpo.errors import UserError
from orpo.run.data import as_groups
from orpo.training.steps import StepDataset, StepSampler, only_item

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

EVALUATION_PIECE = 32
"""Micro-batches of a rank that are packed at a time in evaluation: enough to even them out, little enough to hold in memory."""


class LoaderMixin(_Base):
    """Loaders for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    encoder: Any
    train_sampler: StepSampler

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

    def _loader(self, groups: Sequence[TokenGroup], sampler: StepSampler) -> DataLoader:
        """Not prepared by accelerate: the sampler already knows the ranks, and every batch is one whole step."""
        return DataLoader(
            StepDataset(groups, nll_scope=self.args.nll_scope, world_size=self.args.world_size),
            batch_sampler=sampler,
            collate_fn=only_item,
            generator=torch.Generator().manual_seed(0),  # or the loader draws a seed from the global state, and resuming would not be exact
        )

    def get_train_dataloader(self) -> DataLoader:
        """One item is one optimizer step of this rank."""
        return self._loader(self.train_dataset, self.train_sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All rows, normalised together, cut into micro-batches over the ranks; an item is a piece of them."""
        if isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict):
            rows = self.eval_dataset[eval_dataset]
        else:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise UserError("there are no rows to evaluate on", where="eval_dataset", mend="give eval_dataset, or dataset_test_split")
        groups = as_groups(rows, self.processing_class, self.args, encoder=self.encoder)[0]
        return self._loader(groups, self._sampler(groups, is_training=False))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)
