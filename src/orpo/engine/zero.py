"""A model under DeepSpeed's ZeRO: the optimizer's state and gradients (stage 2), and the weights too (stage 3), in parts over the ranks.

DeepSpeed is given a model and torch's own optimizer and keeps what it is good at: buckets, gathering, offload. When a step is made, with
which norm it is clipped and what is written is decided here; accelerate's way would step after every micro-batch. Gradients are means over
ranks, as under DDP.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from orpo.engine.sending import Sender
from orpo.engine.shared import unwrap
from orpo.errors import UserError
from orpo.system.group import on_all
from orpo.system.ranks import current_ranks

STEPPED_BY_ELEMENT = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop)
"""Optimizers that treat each weight by itself; DeepSpeed hands them one flat part of all weights."""

_NEVER = 10**9


class Zero:
    """A model that DeepSpeed holds. All ranks call every method, in the same order.

    Args:
        model: the same on every rank in shape; rank 0's values are what is spread, and under stage 3 the others' weights may be on the meta
            device. Changed in place.
        layers: its modules that are spread one after the other under stage 3.
        make_optimizer: makes the optimizer of its weights, once they are in parts.
        settings: DeepSpeed's configuration as far as the user has given it; `zero_optimization` with its stage at least.
        device: what is computed on.
        dtype: of the weights that are computed with; gradients are added up and weights are kept in float32.
        max_grad_norm: total norm that gradients are cut to; 0: they are not.

    Raises:
        UserError: an optimizer or weights that cannot be spread.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        make_optimizer: Callable[[], torch.optim.Optimizer],
        *,
        settings: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        max_grad_norm: float,
    ) -> None:
        on_all(lambda: _refuse_quantized(model))
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Its kernels for all-reduce on a CPU would be compiled at the first start, for minutes, and need a compiler.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        self.model = model
        self.stage = int(settings["zero_optimization"]["stage"])
        config = _configuration(model, settings, dtype=dtype, max_grad_norm=max_grad_norm)
        exact = _spread(model, layers, config, dtype, device) if self.stage == 3 else _rounded(model.parameters(), dtype)
        optimizer = make_optimizer()
        on_all(lambda: _refuse_optimizer(optimizer))
        self.groups = list(optimizer.param_groups)  # DeepSpeed takes those out that hold nothing
        self.group_names = [[name for name, weight in model.named_parameters() if _is_in(weight, group)] for group in self.groups]
        self._base = optimizer
        self._is_dropped = False
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self._require_applied()
        while exact:  # each is given back as soon as it has its place
            weight, values = exact.popitem()
            _set_own_part(weight, values) if self.stage == 3 else _set_part(weight, values, None)
        self.optimizer = ZeroOptimizer(self)

    def _require_applied(self) -> None:
        """Hold what was asked for against what is: every trained weight has a float32 part somewhere, under stage 3 every weight a part."""
        mark = "ds_id" if self.stage == 3 else "_hp_mapping"
        wanted = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad or self.stage == 3]
        whole = [name for name, weight in wanted if not hasattr(weight, mark)]
        if whole or self.engine.zero_optimization_stage() != self.stage:
            raise RuntimeError(
                f"ZeRO-{self.stage} was asked for and not applied to {len(whole)} weights, {', '.join(whole[:3])} among them"
            )

    # ---- a step --------------------------------------------------------------------------------------------------------------------

    def begin_micro_batch(self, *, is_last: bool) -> None:
        """Before a micro-batch's forward pass: whether it is the step's last."""
        self._is_dropped = False
        self.engine.set_gradient_accumulation_boundary(is_boundary=is_last)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, added to those of the step; with the last one they are ready for `norm` and `step`."""
        self.engine.backward(loss)

    def norm(self) -> float:
        """Euclidean norm of all gradients of the whole model, the same on every rank; infinite or NaN where one of them is."""
        inner = self.engine.optimizer
        groups = inner._get_norm_groups() if self.stage == 3 else [inner.scaled_global_norm()]
        norms = [float(norm) for norm in groups]
        if any(norm < 0 for norm in norms):  # DeepSpeed's word for a gradient that is not finite
            return float("nan")
        return sum(norm * norm for norm in norms) ** 0.5

    def gradients(self, loss: Tensor, weights: Iterable[nn.Parameter]) -> list[Tensor]:
        """Gradients of some weights, of each what lies here as one row; none is left behind. Stage 3 alone."""
        from deepspeed.utils import safe_get_local_grad

        self.begin_micro_batch(is_last=True)
        self.backward(loss)
        found = [safe_get_local_grad(weight).clone() for weight in weights]
        self.drop()
        return found

    def drop(self) -> None:
        """Forget the step's gradients, also those of a step that an error has cut short: no weight moves."""
        inner = self.engine.optimizer
        _forget_backward(inner)
        if self.stage == 3:
            _forget_forward(self.model, inner.parameter_offload)
        self._is_dropped = True

    def step(self) -> None:
        """Clip and move the weights."""
        if not self._is_dropped:
            self.engine.step()
            _clear_rows(self.engine.optimizer)

    # ---- weights and state ---------------------------------------------------------------------------------------------------------

    def weights(self, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole weights by name, one gathered at a time, in float32 where they are trained; the same on every rank."""
        for name, weight in self.model.named_parameters():
            if names is None or name in names:
                yield name, whole_weight(weight)

    def put_weights(self, values: Mapping[str, Tensor]) -> None:
        """Put whole weights, the same on every rank, in the place of what is there."""
        named = dict(self.model.named_parameters())
        for name, value in values.items():
            with torch.no_grad(), _gathered_to_change(named[name]):
                named[name].data.copy_(value)
        self.engine.optimizer.refresh_fp32_params()
        for name, value in values.items():
            if named[name].requires_grad and named[name].dtype != torch.float32:  # or it is what it was rounded to
                _set_part(named[name], value.float(), None)

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """The optimizer's tensors: (weight's name, key, whole tensor), one gathered at a time; the same on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        keys = self._moment_keys()
        self._link_state()
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                for key in keys:
                    yield name, key, safe_get_full_optimizer_state(weight, key)

    def _flat_parts(self) -> list[Tensor]:
        inner = self.engine.optimizer
        return list(inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups)

    def _moment_keys(self) -> list[str]:
        state = self._base.state.get(self._flat_parts()[0], {})
        return [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]

    def scalars(self) -> dict[str, Any]:
        """What the optimizer keeps once for all weights, such as the number of steps; empty before the first.

        Tensors are new at each call, since optimizers of whole weights change each weight's own in place.
        """
        state = self._base.state.get(self._flat_parts()[0], {})
        return _copied({key: value for key, value in state.items() if not (isinstance(value, Tensor) and value.dim())})

    def begin_state(self, scalars: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
        """Make room for the optimizer's state, before `put_moment`."""
        for part in self._flat_parts():
            self._base.state[part] = _copied(scalars) | {key: torch.zeros_like(part, dtype=dtype) for key, dtype in dtypes.items()}
        self._link_state()

    def _link_state(self) -> None:
        """Tell DeepSpeed where each weight's state is; under stage 2 it does so once, before the state of all groups has been made."""
        if self.stage == 3:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for weights, part in zip(self.engine.optimizer.bit16_groups, self._flat_parts(), strict=True):
            lazy_init_hp_params_optimizer_state(weights, part, self._base.state)

    def put_moment(self, name: str, key: str, value: Tensor) -> None:
        """Put this rank's part of one of the optimizer's tensors in place."""
        _set_part(self.model.get_parameter(name), value, key)


class ZeroOptimizer(torch.optim.Optimizer):
    """The optimizer as transformers and schedules see it: torch's param groups, and DeepSpeed's step."""

    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(self, zero: Zero) -> None:
        self.zero = zero
        self.defaults = zero._base.defaults
        self.param_groups = zero.groups
        self.state = zero._base.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the engine."""
        self.zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed clears gradients with its step."""


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _is_in(weight: Tensor, group: Mapping[str, Any]) -> bool:
    return any(weight is other for other in group["params"])


def _refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in STEPPED_BY_ELEMENT:
        names = ", ".join(kind.__name__ for kind in STEPPED_BY_ELEMENT)
        raise UserError(
            f"{type(optimizer).__name__} needs whole weights, and ZeRO gives it one flat part of all of them",
            where="optim",
            expected=f"torch's {names}",
            mend="optim: adamw_torch, or parallelism: fsdp2",
        )


def _refuse_quantized(model: nn.Module) -> None:
    odd = next((name for name, weight in model.named_parameters() if not weight.is_floating_point()), None)
    if odd is not None:
        raise UserError(
            f"{odd} is quantised, which ZeRO cannot spread", where="parallelism", mend="parallelism: ddp, or leave load_in_4bit out"
        )


def _configuration(model: nn.Module, settings: Mapping[str, Any], *, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration: what the user has given, with what is decided here."""
    width = int(getattr(unwrap(model).config.get_text_config(), "hidden_size", 1024))
    sized = {  # as transformers does for "auto": buffers of a layer's size, in place of 2 GB
        "reduce_bucket_size": max(width * width, 2**20),
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    given = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    return {
        "steps_per_print": _NEVER,
        "communication_data_type": "fp32",
        **settings,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # a step's end is said for each micro-batch
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {**sized, **given},
    }


def _spread(
    model: nn.Module, layers: Iterable[nn.Module], config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[nn.Parameter, Tensor]:
    """Bring weights from rank 0 and put them into parts, a layer at a time, in `dtype`: DeepSpeed itself converts the whole model first.

    Returns:
        What lies here of trained weights that were rounded to `dtype`, in float32.
    """
    import deepspeed

    sender = Sender(model, device)
    exact: dict[nn.Parameter, Tensor] = {}
    for module in (*layers, model):
        sender.bring(module)
        whole = [weight for weight in module.parameters() if not hasattr(weight, "ds_id")]
        rounded = _rounded(whole, dtype)
        for weight in whole:
            if weight.requires_grad or dtype != torch.float32:  # a frozen base in 16 bits stays as small as it is
                weight.data = weight.data.to(dtype)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
        exact |= {weight: _row_of(weight, values).clone() for weight, values in rounded.items()}
    return exact


def _rounded(weights: Iterable[nn.Parameter], dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Trained weights as they are before they are rounded to `dtype`."""
    return {
        weight: weight.detach().float() for weight in weights if weight.requires_grad and dtype != torch.float32 and weight.dtype != dtype
    }


def whole_weight(weight: Tensor) -> Tensor:
    """A whole weight; all ranks call it."""
    if weight.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight)
    if hasattr(weight, "ds_id"):
        with _gathered_to_read(weight):
            return weight.detach().clone()
    return weight.detach()


def is_under_zero(weight: Tensor) -> bool:
    """Whether DeepSpeed holds the weight in parts, or its float32 values and moments."""
    return hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping")


def own_row(weight: Any) -> Tensor:
    """What lies here of a weight under ZeRO-3, without the padding of the last part."""
    size = weight.ds_tensor.numel()
    return weight.ds_tensor.flatten()[: max(0, weight.ds_numel - current_ranks().rank * size)]


def _gathered_to_read(weight: Tensor) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def _gathered_to_change(weight: Tensor) -> Any:
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


def _set_part(weight: Tensor, value: Tensor, key: str | None) -> None:
    """This rank's part of a whole float32 weight (`key` None) or of a tensor of the optimizer."""
    from deepspeed import utils

    if not hasattr(weight, "ds_id"):
        utils.safe_set_full_fp32_param(weight, value) if key is None else utils.safe_set_full_optimizer_state(weight, value, key)
        return
    _set_own_part(weight, _row_of(weight, value), key)


def _row_of(weight: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is cut as the weight is under ZeRO-3, padded to the length of every part."""
    # By parts: DeepSpeed's own way from the whole reads past the end of the last one.
    size, rank = weight.ds_tensor.numel(), current_ranks().rank
    part = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(part, (0, size - part.numel())).to(weight.ds_tensor.device)


def _set_own_part(weight: Tensor, part: Tensor, key: str | None = None) -> None:
    from deepspeed import utils

    utils.safe_set_local_fp32_param(weight, part) if key is None else utils.safe_set_local_optimizer_state(weight, part, key)


def _forget_backward(inner: Any) -> None:
    """Gradients wherever DeepSpeed's optimizer keeps them, and how far its backward pass had come."""
    inner.zero_grad(set_to_none=True)
    for group in list(inner.averaged_gradients):
        inner.averaged_gradients[group] = None
    inner._backward_active_depth = inner._remaining_grad_acc_hooks = 0
    if _clear_rows(inner):
        inner.micro_step_id = 0
        inner.params_already_reduced = dict.fromkeys(inner.params_already_reduced, False)
        for bucket in inner.ipg_buckets.values():
            bucket.clear_params()
        return
    inner.micro_step_id = -1
    inner.params_already_reduced = [False] * len(inner.params_already_reduced)
    inner.all_grad_tensors = dict.fromkeys(inner.all_grad_tensors)
    inner.extra_large_param_to_reduce.clear()
    for bucket in inner.ipg_buckets.values():
        bucket.clear()
    inner._release_ipg_buffers()


def _clear_rows(inner: Any) -> bool:
    """Under stage 3 gradients to 0 where they are added up: DeepSpeed leaves a weight that the next step does not reach with the old one.

    Returns:
        Whether it is stage 3.
    """
    rows = getattr(inner, "grad_partitions_flat_buffer", None)
    if rows is not None:
        rows.zero_()
    return rows is not None


def _forget_forward(model: nn.Module, offload: Any) -> None:
    """Give back weights that a forward or backward pass of stage 3 has gathered, and what it has noted of its way through the layers."""
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload.release_backward_leftovers()
    offload.partition_all_parameters()
    for module in model.modules():
        vars(module)["_parameters"]._in_forward = False  # while it is set, whoever looks at a weight gathers it
