"""bf16 for compute, fp32 for what is trained.

In a single process on a CPU or a CUDA device the whole step runs on bf16 working weights (on a CPU matrix products are about 2.5 times as
fast, and none of autocast's copies are made; docs/performance.md counts the bytes); the float32 masters are the model's own parameters
before and after the step, so optimizer, checkpoints and everything else see an ordinary float32 model. Gradients of several
micro-batches add up in float32. Elsewhere (several processes, other devices) it is autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orpo.system.allocator import forget_file_pages

WORKING_DEVICES = ("cpu", "cuda")
"""Where working weights are used unless the user says otherwise."""


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
        self._copies = dict(zip(self.parameters, self.working, strict=True))
        self._versions = [parameter._version for parameter in self.parameters]
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._is_active = False
        self._may_be_behind = False
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self.parameters if parameter.requires_grad]

    def set_frozen_aside(self) -> None:
        """Let go of the pages of frozen masters that are mapped from a file: a step reads their copies alone."""
        forget_file_pages(
            (parameter.data_ptr(), parameter.nbytes)
            for parameter in self.parameters
            if not parameter.requires_grad and parameter.device.type == "cpu" and parameter.is_contiguous()
        )

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
            # Not another parameter: optimizer, hooks and tied layers hold this object, and autograd must not see the exchange.
            parameter.data = working
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
            for parameter, master in zip(self.parameters, masters, strict=True):
                parameter.data = master

    def release(self) -> None:
        """Put the gradients since the last call on the masters: of one micro-batch as they came, of several as float32 sums."""
        for parameter, gradient in self._gradients.items():
            parameter.grad_dtype = None  # any: bf16 gradients need no float32 copy
            parameter.grad = gradient
        self._gradients = {}
        self._may_be_behind = True

    def drop(self) -> None:
        """Forget the gradients since the last `release`."""
        self._gradients = {}

    def kept_up(self) -> None:
        """The optimizer has updated the copies together with their masters."""
        self._may_be_behind = False

    def _refresh(self, masters: list[Tensor]) -> None:
        """Copy the masters that have changed: their version counter says so, or a step is behind them.

        Many optimizers outside torch write through `.data`, which no version counter sees.
        """
        for index, (parameter, master) in enumerate(zip(self.parameters, masters, strict=True)):
            if parameter._version != self._versions[index] or (self._may_be_behind and parameter.requires_grad):
                self.working[index].copy_(master)
                self._versions[index] = parameter._version
        self._may_be_behind = False

    def _take(self, parameter: nn.Parameter) -> None:
        if not self._is_active:  # a backward of somebody else's, on the masters
            return
        # Taken away from autograd, which would add the next micro-batch's to it in bf16.
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if parameter in self._gradients:
            # float32 from the second micro-batch on: bf16 sums would depend on how a step is cut.
            self._gradients[parameter] = self._gradients[parameter].float().add_(gradient)
        else:
            self._gradients[parameter] = gradient

    def copy_of(self, parameter: nn.Parameter) -> Tensor | None:
        """The working copy of a parameter."""
        return self._copies.get(parameter)


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 masters whose gradients may be bf16: convert, clip, update and refresh the working copy, piece by piece.

    The same update as `torch.optim.AdamW(fused=True)` on float32 gradients, and the same state, but every number is fetched from memory
    once, and no float32 copy of all gradients ever exists.

    Attributes:
        working: the working weights to keep up, if any.
        gradient_scale: factor on all gradients in the next step (clipping); 1 again after it.
    """

    PIECE = 2**19
    """Numbers worked on at a time on a CPU; five arrays of them stay in the cache."""
    LAUNCH = 2**26
    """Numbers that one call takes elsewhere, which bounds the float32 copies of their gradients."""
    PIECEWISE = ("cpu",)

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{**options, "fused": True})
        self.working: WorkingWeights | None = None
        self.gradient_scale = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        try:
            self._step_all()
        finally:
            self.gradient_scale = 1.0
        if self.working is not None:
            self.working.kept_up()
        return loss

    def _step_all(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self._prepare(parameter)
            if parameters and parameters[0].device.type in self.PIECEWISE:
                for parameter in parameters:
                    self._update(parameter, group)
            else:
                for several in _launches(parameters, self.LAUNCH):
                    self._update_together(several, group)

    def _prepare(self, parameter: nn.Parameter) -> None:
        if not self.state[parameter]:
            # As torch's own AdamW keeps it, tensor and all: a checkpoint of either loads into the other.
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }

    def _divisor(self, device: torch.device) -> Tensor | None:
        """The kernel was given its argument for loss scaling and divides by it, so a factor goes in as its inverse."""
        return None if self.gradient_scale == 1.0 else torch.full((), 1.0 / self.gradient_scale, device=device)

    def _update_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Many weights in one call: a GPU waits for launches, not for its cache."""
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        masters = [parameter.data for parameter in parameters]
        gradients = [parameter.grad.float() for parameter in parameters]  # type: ignore[union-attr]
        torch._foreach_add_(steps, 1)  # behind what takes memory: a launch that finds none has changed nothing
        torch._fused_adamw_(
            masters, gradients,
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,  # no amsgrad, hence no maxima
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=group["maximize"], grad_scale=self._divisor(masters[0].device),
        )  # fmt: skip
        copies = [None if self.working is None else self.working.copy_of(parameter) for parameter in parameters]
        pairs = [(copy, master) for copy, master in zip(copies, masters, strict=True) if copy is not None]
        if pairs:
            torch._foreach_copy_([copy for copy, _ in pairs], [master for _, master in pairs])

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        copy = None if self.working is None else self.working.copy_of(parameter)
        beta1, beta2 = group["betas"]
        divisor = self._divisor(parameter.device)
        arrays = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"], copy)
        for master, gradient, average, square, working in _pieces(arrays, self.PIECE):
            gradient = gradient.float() if gradient.dtype != torch.float32 else gradient
            torch._fused_adamw_(
                [master], [gradient], [average], [square], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=group["maximize"], grad_scale=divisor,
            )  # fmt: skip
            if working is not None:
                working.copy_(master)  # while the master is still in the cache


def _launches(parameters: list[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of at most `size` numbers together, or of one that has more."""
    several: list[nn.Parameter] = []
    for parameter in parameters:
        if several and sum(one.numel() for one in several) + parameter.numel() > size:
            yield several
            several = []
        several.append(parameter)
    if several:
        yield several


def _pieces(arrays: tuple[Tensor | None, ...], size: int) -> Iterator[list[Any]]:
    """The arrays, all of one shape or None, in flat pieces; whole if one of them is not contiguous."""
    if not all(array is None or array.is_contiguous() for array in arrays):
        yield list(arrays)
        return
    flat = [None if array is None else array.view(-1) for array in arrays]
    length = arrays[0].numel()  # type: ignore[union-attr]
    for start in range(0, length, size):
        yield [None if array is None else array[start : start + size] for array in flat]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, in float32 whatever their dtype; where they lie, so that nobody waits for it."""
    if not gradients:
        return torch.zeros(())
    # The norm of the pieces' norms is the norm of all, and a few thousand numbers are all that is ever put side by side.
    pieces = (piece for gradient in gradients for piece in _norm_pieces(gradient))
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(piece.float()) for piece in pieces]))


def _norm_pieces(gradient: Tensor) -> tuple[Tensor, ...]:
    """A low-precision gradient on a CPU in pieces, whose float32 copies stay in the cache; others whole."""
    if gradient.device.type != "cpu" or gradient.dtype == torch.float32 or not gradient.is_contiguous():
        return (gradient,)
    return gradient.view(-1).split(MasterAdamW.PIECE)


def autocast_to(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast on the device, or nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
