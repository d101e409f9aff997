"""A DeepSpeed configuration, from the file that transformers and accelerate read, as far as it says how weights are spread.

What the run's own options say too must say the same or "auto"; what would be another optimizer, schedule or step is a problem.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from orpo.errors import UserError

_OF_THE_RUN = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""DeepSpeed's names of what an option says."""

_INSTEAD = {
    "optimizer": ("would be a second optimizer", "leave it out: optim, learning_rate, weight_decay and the others say it"),
    "scheduler": ("would be a second schedule", "leave it out: lr_scheduler_type and warmup_steps say it"),
    "amp": ("is apex's, which is not supported", "bf16: true"),
    "train_batch_size": ("follows from the other two", "leave it out, or auto"),
}
_PASSED_ON = frozenset(
    {
        "zero_optimization",
        "wall_clock_breakdown",
        "steps_per_print",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "aio",
        "dump_state",
    }
    | {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "tensorboard", "wandb", "csv_monitor"}
)
_WITHOUT_EFFECT = frozenset({"zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "data_types"})
_NOT_OF_ZERO = ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save")
_REFUSED_OF_ZERO = ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights", "zero_quantized_gradients")


def read_deepspeed(values: Mapping[str, Any], environ: Mapping[str, str], *, where: str) -> tuple[dict[str, Any], list[UserError]]:
    """DeepSpeed's configuration as it is passed on, with a stage of ZeRO, and what is wrong with it.

    Args:
        values: the run's options.
        environ: where accelerate leaves its own.
        where: the option or variable that asks for ZeRO: `deepspeed`, `parallelism` or accelerate's.
    """
    if where == "parallelism":
        return {"zero_optimization": {"stage": int(str(values["parallelism"])[-1])}}, []
    given, problem = _mapping(values.get("deepspeed") if where == "deepspeed" else _of_accelerate(environ), where)
    if problem is not None:
        return {"zero_optimization": {"stage": 2}}, [problem]
    problems = _differing(given, values, where)
    zero, of_zero = _of_zero(given.get("zero_optimization"), where)
    return {**{key: value for key, value in given.items() if key in _PASSED_ON}, "zero_optimization": zero}, problems + of_zero


def _of_accelerate(environ: Mapping[str, str]) -> Any:
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() != "none":
        return file
    zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for name, key in (("OPTIMIZER", "offload_optimizer"), ("PARAM", "offload_param")):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none").lower()
        path = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_NVME_PATH", "none")
        if device != "none":
            zero[key] = {"device": device, **({"nvme_path": path} if device == "nvme" else {})}
    return {"zero_optimization": zero}


def _mapping(given: Any, where: str) -> tuple[dict[str, Any], UserError | None]:
    expected = "a JSON file of DeepSpeed, or a mapping"
    if isinstance(given, str):
        try:
            text = given if given.lstrip().startswith("{") else open(given, encoding="utf-8").read()  # noqa: SIM115
            given = json.loads(text)
        except (OSError, ValueError) as error:
            return {}, UserError(f"cannot be read: {error}", where=where, expected=expected)
    if not isinstance(given, Mapping):
        return {}, UserError(f"found a {type(given).__name__}", where=where, expected=expected)
    return dict(given), None


def _differing(given: Mapping[str, Any], values: Mapping[str, Any], where: str) -> list[UserError]:
    problems = []
    for key, value in given.items():
        if key in _OF_THE_RUN:
            own = values.get(_OF_THE_RUN[key])
            if value != "auto" and own is not None and float(value) != float(own):
                mend = f'"{key}": "auto"'
                problems.append(UserError(f"{key} is {value}, and {_OF_THE_RUN[key]} is {own}", where=where, mend=mend))
        elif key in ("bf16", "bfloat16", "fp16"):
            problems += _precision(key, value, values, where)
        elif key in _INSTEAD:
            if value != "auto":
                problems.append(UserError(f"{key} {_INSTEAD[key][0]}", where=where, mend=_INSTEAD[key][1]))
        elif key not in _PASSED_ON | _WITHOUT_EFFECT:
            close = difflib.get_close_matches(key, [*_PASSED_ON, *_OF_THE_RUN, *_WITHOUT_EFFECT, "bf16"], n=1)
            mend = f"did you mean {close[0]!r}?" if close else "leave it out"
            problems.append(UserError(f"{key} is not supported", where=where, mend=mend))
    return problems


def _precision(key: str, value: Any, values: Mapping[str, Any], where: str) -> list[UserError]:
    is_on = value.get("enabled", True) if isinstance(value, Mapping) else value
    if is_on == "auto":
        return []
    if key == "fp16":
        return [UserError("fp16's scaler needs whole gradients", where=where, mend='bf16: true, and "fp16" left out')] if is_on else []
    own = values.get("bf16")
    if own is not None and bool(is_on) != bool(own):
        return [
            UserError(
                f"{key} is {str(bool(is_on)).lower()}, and the option bf16 is {str(own).lower()}", where=where, mend=f'"{key}": "auto"'
            )
        ]
    return []


def _of_zero(given: Any, where: str) -> tuple[dict[str, Any], list[UserError]]:
    zero = {key: value for key, value in (given or {}).items() if key not in _NOT_OF_ZERO} if isinstance(given or {}, Mapping) else {}
    stage, problems = zero.get("stage", 0), []
    if stage not in (2, 3):
        kind = "ddp" if stage == 0 else "zero2"
        problems.append(
            UserError(f"zero_optimization.stage is {stage}", where=where, expected="2 or 3", mend=f"leave it out, and parallelism: {kind}")
        )
        zero["stage"] = 2
    for key in _REFUSED_OF_ZERO:
        if zero.get(key) not in (None, False, 1, -1):
            problems.append(UserError(f"zero_optimization.{key} is not supported", where=where, mend="leave it out"))
    return zero, problems


def zero_obstacles(values: Mapping[str, Any], where: str, *, is_launch: bool = True) -> list[UserError]:
    """What else must hold for ZeRO: the package, where the run begins, and an optimizer that works on parts."""
    if is_launch and find_spec("deepspeed") is None:
        mend = "pip install wheel, then DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed; or parallelism: fsdp2"
        return [UserError("needs the package deepspeed, which is not installed", where=where, mend=mend)]
    optim = str(getattr(values.get("optim"), "value", values.get("optim") or "adamw_torch"))
    if optim not in _STEPPED_BY_ELEMENT:
        return [
            UserError(
                f"{optim} needs whole weights, and ZeRO gives it one flat part of all of them",
                where="optim",
                expected=", ".join(_STEPPED_BY_ELEMENT),
                mend="optim: adamw_torch, or parallelism: fsdp2",
            )
        ]
    return []


_STEPPED_BY_ELEMENT = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
