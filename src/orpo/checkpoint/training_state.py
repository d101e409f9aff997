"""Optimizer, scheduler, scaler and random-number state of a run, to and from a checkpoint folder, bit for bit."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.checkpoint.state import load_state, save_state
from orpo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler"
SCALER = "scaler"


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path | str) -> None:
    """Write any torch optimizer's `state_dict()` as optimizer.json and optimizer.safetensors.

    The shape of every parameter is written too, so that a changed model is told as such.
    """
    save_state({"state": optimizer.state_dict(), "shapes": _shapes(optimizer)}, folder, OPTIMIZER)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path | str) -> None:
    """Restore what `save_optimizer` wrote, with each tensor's dtype and bits as they were.

    `Optimizer.load_state_dict` casts floating-point state to its parameter's dtype (fp32 moments of bf16 weights would lose bits), so the
    tensors are put in place again after it, on the device that it chose.

    Raises:
        CheckpointError: unreadable, or of parameters with other shapes.
    """
    saved = load_state(folder, OPTIMIZER)
    if saved["shapes"] != _shapes(optimizer):
        raise CheckpointError(
            "the optimizer state belongs to a model with other trainable parameters",
            where=str(folder),
            expected=f"{sum(map(len, _shapes(optimizer)))} tensors of the same shapes, found {sum(map(len, saved['shapes']))}",
            mend="resume with the model and adapter settings of the run, or start in a new folder",
        )
    optimizer.load_state_dict(saved["state"])
    inner = _unwrapped(optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    indices = [index for group in saved["state"]["param_groups"] for index in group["params"]]
    by_index = saved["state"]["state"]
    for index, parameter in zip(indices, parameters, strict=True):
        if index in by_index and parameter in inner.state:
            inner.state[parameter] = _exact(inner.state[parameter], by_index[index])


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _exact(loaded: Any, saved: Any) -> Any:
    """The loaded state with the saved tensors in it, on the loaded ones' devices."""
    import torch

    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return saved if loaded.dtype == saved.dtype and loaded.device == saved.device else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _exact(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    return loaded


def save_scheduler(scheduler: Any, folder: Path | str) -> None:
    """Write a learning-rate scheduler's `state_dict()`."""
    save_state(scheduler.state_dict(), folder, SCHEDULER)


def load_scheduler(scheduler: Any, folder: Path | str) -> None:
    """Restore what `save_scheduler` wrote. Raises CheckpointError if it cannot be read."""
    scheduler.load_state_dict(load_state(folder, SCHEDULER))


def save_scaler(scaler: Any, folder: Path | str) -> None:
    """Write a gradient scaler's `state_dict()` (fp16)."""
    save_state(scaler.state_dict(), folder, SCALER)


def load_scaler(scaler: Any, folder: Path | str) -> None:
    """Restore what `save_scaler` wrote. Raises CheckpointError if it cannot be read."""
    scaler.load_state_dict(load_state(folder, SCALER))


def rng_name(rank: int) -> str:
    """File name, without ending, of a rank's random-number state."""
    return f"rng-{rank}"


def save_rng(folder: Path | str, *, rank: int = 0) -> None:
    """Write this process's random-number states: python, numpy, torch, and the current accelerator's."""
    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    save_state(state, folder, rng_name(rank))


def load_rng(folder: Path | str, *, rank: int = 0) -> bool:
    """Restore what `save_rng` wrote for this rank; False, with a warning, if the checkpoint has none (it was written by fewer ranks).

    Raises:
        CheckpointError: it is there but cannot be read.
    """
    import numpy as np
    import torch

    if not (Path(folder) / f"{rng_name(rank)}.json").exists():
        logger.warning(
            "the checkpoint has no random-number state for rank %d; it was written by fewer processes, so this rank starts from the seed",
            rank,
        )
        return False
    state = load_state(folder, rng_name(rank))
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random-number state cannot be restored ({error})", where=str(folder)) from None
    return True
