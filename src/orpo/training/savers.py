"""How weights, optimizer and schedule go into a checkpoint and come back: whole, or in parts that are spread over the ranks.

A saver writes as its run holds its weights, and reads what either has written. A third way to hold them is one more class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from orpo.checkpoint import (
    Ranks,
    load_optimizer,
    load_scheduler,
    require_safe_weights,
    save_optimizer,
    save_scaler,
    save_scheduler,
)
from orpo.checkpoint.sharded import (
    MOMENTS,
    load_optimizer_facts,
    load_optimizer_parts,
    load_weights,
    save_optimizer_facts,
    save_optimizer_parts,
    save_parts,
    save_weights,
    saved_weights,
)
from orpo.engine.parallel import is_sharded
from orpo.engine.shared import unwrap
from orpo.errors import CheckpointError
from orpo.system.parts import WEIGHTS, has_weights_in_parts, read_parts

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

    def prepare(self, ranks: Ranks, *, weights_only: bool) -> None:  # noqa: B027  (most have nothing to do)
        """Bring together what has to be, before a save: inside it a rank that fails would leave the others waiting."""

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
        if has_weights_in_parts(folder):
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
        if has_weights_in_parts(folder):
            load_optimizer_parts(self.trainer.optimizer, self.trainer.model, folder)
        else:
            load_optimizer(self.trainer.optimizer, folder)


class SpreadState(StateSaver):
    """Each rank has parts of the weights and of the optimizer, and writes its own."""

    def save_weights(self, folder: Path, ranks: Ranks) -> None:
        model: Any = self.trainer.model
        self.save_own_weights(folder, ranks)
        if not ranks.is_first:
            return
        adapters = getattr(model, "peft_config", None) or {}
        for settings in adapters.values():
            settings.save_pretrained(str(folder))
        if not adapters:
            unwrap(model).config.save_pretrained(str(folder))
        if getattr(unwrap(model), "generation_config", None) is not None:
            unwrap(model).generation_config.save_pretrained(str(folder))
        self.trainer.processing_class.save_pretrained(str(folder))

    def save_own_weights(self, folder: Path, ranks: Ranks) -> None:
        """What of the weights this rank writes."""
        save_weights(self.trainer.model, folder, rank=ranks.rank)

    def save_optimizer(self, folder: Path, ranks: Ranks) -> None:
        save_optimizer_parts(self.trainer.optimizer, self.trainer.model, folder, rank=ranks.rank)

    def load_weights(self, folder: Path, load_whole: Load) -> None:
        # Whole weights are loaded before the model is spread; the Trainer's loop asks once more when it is.
        if has_weights_in_parts(folder) or not is_sharded(self.trainer.model):
            super().load_weights(folder, load_whole)

    def load_best(self, folder: Path, load_whole: Load) -> None:
        if not has_weights_in_parts(folder):
            raise CheckpointError(
                "was written before the weights were in parts, and is the best",
                where=str(folder),
                mend="finish the run as it was started, or without load_best_model_at_end",
            )
        super().load_best(folder, load_whole)

    def load_optimizer(self, folder: Path) -> None:
        load_optimizer_parts(self.trainer.optimizer, self.trainer.model, folder)


class ZeroState(SpreadState):
    """DeepSpeed has parts that are no rectangles of a weight: each rank writes its share of the weights, whole."""

    trainer: Any
    _weights: dict[str, Tensor]
    _moments: dict[str, Tensor]
    _dtypes: dict[str, dict[str, torch.dtype]]

    def prepare(self, ranks: Ranks, *, weights_only: bool) -> None:
        zero, wanted = self.trainer.zero, saved_weights(self.trainer.model)
        pairs = ((name, value) for name, value in zero.weights(set(wanted)))
        self._weights = self._own_share(pairs, ranks)
        if ranks.is_first:
            buffers = wanted.keys() - dict(self.trainer.model.named_parameters()).keys()
            self._weights |= {name: wanted[name] for name in buffers}
        if weights_only:
            return
        self._dtypes = {name: {} for names in zero.group_names for name in names} if zero.scalars() else {}
        self._moments = self._own_share(self._named_moments(), ranks)

    def _named_moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, key, value in self.trainer.zero.moments():
            self._dtypes[name][key] = value.dtype
            yield f"{name}.{key}", value

    @staticmethod
    def _own_share(pairs: Iterator[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
        return {name: value.to("cpu", copy=True) for number, (name, value) in enumerate(pairs) if number % ranks.world_size == ranks.rank}

    def save_own_weights(self, folder: Path, ranks: Ranks) -> None:
        save_parts(self._weights, folder, WEIGHTS, rank=ranks.rank, writes_whole=True)
        self._weights = {}

    def save_optimizer(self, folder: Path, ranks: Ranks) -> None:
        zero = self.trainer.zero
        save_parts(self._moments, folder, MOMENTS, rank=ranks.rank, writes_whole=True)
        self._moments = {}
        if ranks.is_first:
            groups = [{**group, "params": names} for group, names in zip(zero.groups, zero.group_names, strict=True)]
            save_optimizer_facts(groups, {name: zero.scalars() for name in self._dtypes}, self._dtypes, folder)

    def load_weights(self, folder: Path, load_whole: Load) -> None:
        if self.trainer.zero is None:
            StateSaver.load_weights(self, folder, load_whole)
        elif has_weights_in_parts(folder):
            # Before the model was spread they were put into it; at the end of a run they are those of the best step.
            model, zero = self.trainer.model, self.trainer.zero
            names = saved_weights(model).keys()
            shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.named_parameters() if name in names}
            for some in _in_portions(shapes):
                values = {name: torch.empty(shapes[name]) for name in some}
                read_parts(values, folder, is_all=False)
                zero.put_weights(values)

    def load_optimizer(self, folder: Path) -> None:
        zero, model = self.trainer.zero, self.trainer.model
        saved = load_optimizer_facts(folder, zero.group_names)
        for group, old in zip(zero.groups, saved["groups"], strict=True):
            group.update({key: value for key, value in old.items() if key != "params"})
        if not saved["scalars"]:
            return
        scalars, kinds = _one_of(saved["scalars"], folder), _one_of(saved["dtypes"], folder)
        zero.begin_state(scalars, kinds)
        shapes = {name: getattr(model.get_parameter(name), "ds_shape", model.get_parameter(name).shape) for name in saved["dtypes"]}
        for some in _in_portions(shapes):
            values = {f"{name}.{key}": torch.empty(shapes[name], dtype=dtype) for name in some for key, dtype in kinds.items()}
            if "whole" in saved:
                values = {name: saved["whole"][name] for name in values}
            else:
                read_parts(values, folder, MOMENTS, is_all=False)
            for name in some:
                for key in kinds:
                    zero.put_moment(name, key, values[f"{name}.{key}"])


_PORTION_BYTES = 2**30


def _in_portions(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names of weights, so many at a time that a rank has room for them whole."""
    some: list[str] = []
    held = 0
    for name, shape in shapes.items():
        if some and held + 4 * shape.numel() > _PORTION_BYTES:
            yield some
            some, held = [], 0
        some.append(name)
        held += 4 * shape.numel()
    if some:
        yield some


def _one_of(by_weight: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What is the same for all weights, as ZeRO's optimizer keeps it.

    Raises:
        CheckpointError: it is not, as where some weights had no gradient in a step.
    """
    first, *others = by_weight.values()
    if any(other != first for other in others):
        raise CheckpointError(
            "its optimizer has made different steps for different weights, which ZeRO cannot go on with",
            where=str(folder),
            mend="parallelism: fsdp2, or ddp",
        )
    return first
