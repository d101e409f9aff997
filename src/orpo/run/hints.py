"""What a configuration says that cannot be meant: options whose switch is off, and variables that nobody replaces."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from orpo.errors import UserError

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


def _is(key: str, wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: getattr(values.get(key), "value", values.get(key)) == wanted


_ADAPTER = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("use_rslora", "use_dora"),
)
_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_SWITCHES: list[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str]] = [
    (_ADAPTER, _is("use_peft", True), "without `use_peft: true`: all weights are trained"),
    (_4BIT, _is("load_in_4bit", True), "without `load_in_4bit: true`: the model is not quantized to 4 bits"),
    (("max_nonfinite_skips",), _is("on_nonfinite", "skip"), "without `on_nonfinite: skip`: the first such step stops the run"),
    (("eval_steps",), _is("eval_strategy", "steps"), "without `eval_strategy: steps`"),
    (("save_steps",), _is("save_strategy", "steps"), "without `save_strategy: steps`"),
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
    return notes
