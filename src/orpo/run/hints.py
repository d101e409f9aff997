"""What a configuration says that cannot be meant: options whose switch is off, and variables that nobody replaces."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from orpo.errors import UserError
from orpo.system.place import read_place

_VARIABLE = re.compile(r"\$\{\w+\}|\$[A-Za-z_]\w*|%[A-Za-z_]\w*%")
_PLACES = (
    *("output_dir", "model_name_or_path", "dataset_name", "eval_dataset_name", "resume_from_checkpoint", "plugins", "hub_model_id"),
    *("logging_dir", "deepspeed", "fsdp_config", "accelerator_config"),
)
"""Keys whose texts name places; a chat template may hold a dollar sign of its own."""


def variable_problems(values: Mapping[str, Any]) -> list[UserError]:
    """Places written with a variable, which only a shell replaces: a run would make a folder of that very name."""
    problems = []
    for key in _PLACES:
        for text in _texts(values.get(key)):
            if (variable := _VARIABLE.search(text)) and not os.path.exists(text):
                problems.append(
                    UserError(
                        f"found {text!r}; {variable.group()} is taken as it stands, since nothing in a configuration is replaced",
                        where=key,
                        mend=f'write the path out, or give it as a flag, where the shell replaces it: --{key} "{text}"',
                    )
                )
    return problems


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [item for item in value.values() if isinstance(item, str)]
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


def _name(value: Any) -> Any:
    return getattr(value, "value", value)


def _is(key: str, wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: _name(values.get(key)) == wanted


_ADAPTER = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("use_rslora", "use_dora", "lora_init"),
)
_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_EVALUATION_ROWS = ("eval_fraction", "dataset_test_split", "eval_dataset_name")
_OF_EVALUATIONS = ("per_device_eval_batch_size", "eval_on_start", "metric_for_best_model", "greater_is_better")
_OF_THE_HUB = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "hub_token")
_OF_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_OF_SEVERAL_PROCESSES = (
    *("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout"),
    *("log_level_replica", "log_on_each_node", "save_on_each_node"),
)
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that transformers makes without a warm-up."""
_SWITCHES: list[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str]] = [
    (_ADAPTER, _is("use_peft", True), "without `use_peft: true`: all weights are trained"),
    (_4BIT, _is("load_in_4bit", True), "without `load_in_4bit: true`: the model is not quantized to 4 bits"),
    (("max_nonfinite_skips",), _is("on_nonfinite", "skip"), "without `on_nonfinite: skip`: the first such step stops the run"),
    (("eval_steps",), _is("eval_strategy", "steps"), "without `eval_strategy: steps`"),
    (("save_steps",), _is("save_strategy", "steps"), "without `save_strategy: steps`"),
    (
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        lambda values: bool(values.get("gradient_checkpointing") or values.get("activation_checkpointing")),
        "without `gradient_checkpointing: true`",
    ),
    (("memory_budget_gib",), _is("gradient_checkpointing", "auto"), "without `gradient_checkpointing: auto`"),
    (_OF_EVALUATIONS, lambda values: any(values.get(key) for key in _EVALUATION_ROWS), "without rows to evaluate on"),
    (("eval_delay",), lambda values: not _is("eval_strategy", "no")(values), "without `eval_strategy: steps` (or epoch)"),
    (_OF_THE_HUB, _is("push_to_hub", True), "without `push_to_hub: true`"),
    (("run_name",), lambda values: values.get("report_to") not in (None, "none", [], ["none"]), "without a tracker (report_to)"),
    (_OF_TRACKIO, lambda values: "trackio" in str(values.get("report_to")), "without `report_to: trackio`"),
    (("warmup_steps",), lambda values: str(_name(values.get("lr_scheduler_type"))) not in _WITHOUT_WARMUP, "with that lr_scheduler_type"),
    (_OF_SEVERAL_PROCESSES, lambda values: not _is_alone(values), "without several processes"),
    (("early_stopping_threshold",), lambda values: values.get("early_stopping_patience") is not None, "without early_stopping_patience"),
]
"""(options, whether they have an effect, why they have none)."""


def notes_without_switch(values: Mapping[str, Any], given: set[str]) -> list[str]:
    """One note for the options that were given and do nothing, since what turns them on was not."""
    notes = []
    for keys, is_on, why in _SWITCHES:
        # A switch that is off where it says so itself (use_dora: false) asks for nothing.
        idle = [key for key in keys if key in given and values[key] not in (None, False)]
        if idle and not is_on(values):
            notes.append(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {why}")
    if "disable_tqdm" in given:
        notes.append("disable_tqdm has no effect on a command, which has a progress line of its own; in Python it is transformers'")
    loading = values.get("model_init_kwargs")
    if isinstance(loading, Mapping) and "attn_implementation" in loading and _name(values.get("engine")) != "padded":
        notes.append("model_init_kwargs: attn_implementation has no effect on the shared engine, which brings its own attention")
    return notes + _notes_of_local_places(values, given)


def _is_alone(values: Mapping[str, Any]) -> bool:
    try:
        return read_place(os.environ).world_size == 1
    except UserError:  # told when the processes meet
        return False


def _notes_of_local_places(values: Mapping[str, Any], given: set[str]) -> list[str]:
    """Options of the hub for what lies on this machine."""
    notes = []
    model = values.get("model_name_or_path")
    is_here = "model_revision" in given and isinstance(model, str) and os.path.exists(model)
    # An adapter's base and a folder's code may well come from the hub.
    if is_here and not (values.get("trust_remote_code") or os.path.exists(os.path.join(str(model), "adapter_config.json"))):
        notes.append(f"model_revision has no effect: {model} is on this machine, which keeps no revisions")
    data = [text for key in ("dataset_name", "eval_dataset_name") for text in _texts(values.get(key))]
    if values.get("dataset_config") and "dataset_config" in given and data and all(os.path.isfile(text) for text in data):
        notes.append("dataset_config has no effect on files of this machine: it chooses among those of a hub data set")
    return notes
