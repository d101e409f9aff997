"""The part of the trainer that fits a model into memory: its weights spread over ranks, in place of accelerate's own FSDP, and layers
computed again."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from orpo.config.parallelism import Parallelism
from orpo.engine.parallel import is_sharded, shard
from orpo.system.allocator import return_freed_memory
from orpo.system.ranks import Ranks
from orpo.training.planning import packed_lengths, weigh_model
from orpo.training.recompute import AUTO, fewest_layers, recomputed

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SpreadMixin(_Base):
    """Spreading for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    parallelism: Parallelism
    before_sharding: Callable[[], None] = staticmethod(lambda: None)
    """Called when the weights are whole for the last time."""
    load_whole_weights: Callable[[str | None], None]
    ranks: Ranks
    args: Any
    recomputed_layers: int | None = None

    @property
    def _is_sharded(self) -> bool:
        return self.parallelism.is_sharded

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, without accelerate's own FSDP."""
        with self.args.fsdp_hidden():
            super().create_accelerator_and_postprocess()

    def recomputing(self) -> AbstractContextManager[int | None]:
        """`gradient_checkpointing: auto`: as few layers computed again as fit, the same number on every rank."""
        if self.args.gradient_checkpointing != AUTO:
            return nullcontext()
        need = weigh_model(self.model, self.args, packed_lengths(self.train_dataset, self.args)["largest_microbatch_tokens"])
        count = self.ranks.max([fewest_layers(self.model, need, self.args)])[0]
        return recomputed(self.model, count, self.args.gradient_checkpointing_kwargs)

    def spread_weights(self, checkpoint: str | None) -> None:
        """Spread the weights over the ranks, those of a checkpoint that has them whole too."""
        if not self._is_sharded or is_sharded(self.model):
            return
        self.load_whole_weights(checkpoint)
        self.before_sharding()
        wanted = self.parallelism
        per_replica = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if wanted.is_hybrid else 0
        shard(
            self.model,
            dtype=getattr(torch, self.args.compute_dtype),
            layers=wanted.layers,
            reshards=wanted.reshards,
            offloads=wanted.offloads,
            per_replica=per_replica,
        )
        if self.args.device.type == "cpu":
            return_freed_memory()  # the weights as they were whole
        self.model._is_accelerate_prepared = True  # or accelerate would put DDP around it
