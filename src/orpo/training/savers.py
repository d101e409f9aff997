"""How weights, optimizer and schedule go into a checkpoint and come back: whole, or in parts that are spread over the ranks.

A saver writes as its run holds its weights, and reads what either has written. A third way to hold them is one more class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from orpo.checkpoint import (
    Ranks,
    load_optimizer,
    load_scheduler,
    require_safe_weights,
    save_optimizer,
    save_scaler,
    save_scheduler,
)
from orpo.checkpoint.sharded import is_sharded_checkpoint, load_optimizer_parts, load_weights, save_optimizer_parts, save_weights
from orpo.engine.parallel import is_sharded
from orpo.engine.shared import unwrap
from orpo.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import Trainer

Load = Callable[[], None]
"""transformers' own way to put whole weights of a folder into the model."""


class StateSaver(ABC):
    """One way to save and load what a run has learned. All ranks call every method, in the same order.

    Random numbers, the trainer's own state, staging, checksums and the manifest are not its business (`orpo.training.saving`). Any number
    of ranks can read what any number has written.

    Args:
        trainer: whose model, optimizer and schedule they are, as they are at each call.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def save(self, folder: Path, ranks: Ranks, *, weights_only: bool) -> None:
        """Write this rank's files; names differ between ranks, and rank 0 writes what is the same on all."""
        self.save_weights(folder, ranks)
        if weights_only:
            return
        self.save_optimizer(folder, ranks)
        if ranks.is_first:
            save_scheduler(self.trainer.lr_scheduler, folder)
            if self.trainer.accelerator.scaler is not None:
                save_scaler(self.trainer.accelerator.scaler, folder)

    def load_state(self, folder: Path) -> None:
        """Put back optimizer and schedule, which have been made by then."""
        self.load_optimizer(folder)
        load_scheduler(self.trainer.lr_scheduler, folder)

    def load_weights(self, folder: Path, load_whole: Load) -> None:
        """Put a checkpoint's weights into the model, after proving that nothing in it would be unpickled.

        Raises:
            CheckpointError: they cannot be read.
        """
        if is_sharded_checkpoint(folder):
            load_weights(self.trainer.model, folder)
            return
        require_safe_weights(folder)
        try:
            load_whole()
        except SafetensorError as error:
            raise CheckpointError(f"the weights cannot be read ({error})", where=str(folder)) from None

    def load_best(self, folder: Path, load_whole: Load) -> None:
        """The same at the end of a run, for the checkpoint that was best."""
        self.load_weights(folder, load_whole)

    @abstractmethod
    def save_weights(self, folder: Path, ranks: Ranks) -> None:
        """The model's weights, and what belongs beside them (configuration, tokenizer)."""

    @abstractmethod
    def save_optimizer(self, folder: Path, ranks: Ranks) -> None:
        """The optimizer's state."""

    @abstractmethod
    def load_optimizer(self, folder: Path) -> None:
        """Put back the optimizer's state, of a checkpoint of either kind."""


class WholeState(StateSaver):
    """Every rank has all weights and the whole optimizer, and rank 0 writes them."""

    def save_weights(self, folder: Path, ranks: Ranks) -> None:
        self.trainer.save_model(str(folder), _internal_call=True)

    def save_optimizer(self, folder: Path, ranks: Ranks) -> None:
        if ranks.is_first:
            save_optimizer(self.trainer.optimizer, folder)

    def load_optimizer(self, folder: Path) -> None:
        if is_sharded_checkpoint(folder):
            load_optimizer_parts(self.trainer.optimizer, self.trainer.model, folder)
        else:
            load_optimizer(self.trainer.optimizer, folder)


class SpreadState(StateSaver):
    """Each rank has parts of the weights and of the optimizer, and writes its own."""

    def save_weights(self, folder: Path, ranks: Ranks) -> None:
        model: Any = self.trainer.model
        save_weights(model, folder, rank=ranks.rank)
        if not ranks.is_first:
            return
        adapters = getattr(model, "peft_config", None) or {}
        for settings in adapters.values():
            settings.save_pretrained(str(folder))
        if not adapters:
            unwrap(model).config.save_pretrained(str(folder))
        self.trainer.processing_class.save_pretrained(str(folder))

    def save_optimizer(self, folder: Path, ranks: Ranks) -> None:
        save_optimizer_parts(self.trainer.optimizer, self.trainer.model, folder, rank=ranks.rank)

    def load_weights(self, folder: Path, load_whole: Load) -> None:
        # Whole weights are loaded before the model is spread; the Trainer's loop asks once more when it is.
        if is_sharded_checkpoint(folder) or not is_sharded(self.trainer.model):
            super().load_weights(folder, load_whole)

    def load_best(self, folder: Path, load_whole: Load) -> None:
        if not is_sharded_checkpoint(folder):
            raise CheckpointError(
                "was written before the weights were in parts, and is the best",
                where=str(folder),
                mend="finish the run as it was started, or without load_best_model_at_end",
            )
        super().load_best(folder, load_whole)

    def load_optimizer(self, folder: Path) -> None:
        load_optimizer_parts(self.trainer.optimizer, self.trainer.model, folder)
