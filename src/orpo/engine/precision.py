"""bf16 for compute, fp32 for what is trained.

On a single process on a CPU the whole step runs on bf16 working weights (matrix products are about 2.5 times as fast, and none of
autocast's copies are made); the float32 masters are the model's own parameters before and after the step, so optimizer, checkpoints and
everything else see an ordinary float32 model. Gradients come back to float32 one by one, as soon as each is complete, and add up there
over micro-batches. Elsewhere (GPUs, several processes) it is autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class WorkingWeights:
    """Low-precision working copies of a float32 model's weights.

    Args:
        model: its float32 parameters are the masters.
        dtype: of the working copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.parameters = [parameter for parameter in model.parameters() if parameter.dtype == torch.float32]
        self.working: list[Tensor] = [parameter.data.to(dtype) for parameter in self.parameters]
        self._versions = [parameter._version for parameter in self.parameters]
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take) for parameter in self.parameters if parameter.requires_grad
        ]

    def close(self) -> None:
        """Stop watching the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model computes with working weights inside, and holds its masters again outside. Gradients are held back until `release`."""
        masters = [parameter.data for parameter in self.parameters]
        self._refresh(masters)
        for parameter, working in zip(self.parameters, self.working, strict=True):
            parameter.data = working
        try:
            yield
        finally:
            for parameter, master in zip(self.parameters, masters, strict=True):
                parameter.data = master

    def release(self) -> None:
        """Put the float32 gradients of all micro-batches since the last call on the masters."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        self._gradients = {}

    def _refresh(self, masters: list[Tensor]) -> None:
        """Copy the masters that have changed. Their version counter says so; a step changes them all, evaluation none."""
        for index, (parameter, master) in enumerate(zip(self.parameters, masters, strict=True)):
            if parameter._version != self._versions[index]:
                self.working[index].copy_(master)
                self._versions[index] = parameter._version

    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if parameter in self._gradients:
            self._gradients[parameter].add_(gradient)
        else:
            self._gradients[parameter] = gradient.float()


def autocast_to(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast on the device, or nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)  # type: ignore[return-value]


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system after every large tensor.

    By default each tensor above 32 MiB is mapped afresh and its pages are faulted in again on every use: converting 11 million numbers
    took 11.1 ms with it and 1.2 ms without (docs/performance.md). Affects the process, so only a trainer that owns the step asks for it.

    Returns:
        Whether the allocator took the setting (glibc only).
    """
    import ctypes

    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(m_mmap_threshold, 2**30) and mallopt(m_trim_threshold, 2**31 - 1))
