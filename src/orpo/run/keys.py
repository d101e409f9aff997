"""The keys of a run's configuration: their names, types and defaults. Those of the trainer come from `ORPOConfig`, the rest are here."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from orpo.data.reading.sources import DEMO_DATA

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class RunKeys:
    """Keys of a run that are not options of the trainer: which model, which data, which adapter. Names are TRL's where TRL has one."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id, folder, GGUF file or smollm2-135m-instruct."})
    dtype: Dtype | None = field(default=None, metadata={"help": "Dtype of frozen weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "TRL's; no effect."})
    dataset_name: str | list[Any] | None = field(
        default=None, metadata={"help": f"Files, folder or hub id, or a list of them; {DEMO_DATA} is the packaged demo data."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split to train on, or train[:90%] of it; unset: train, or the only one."}
    )
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_dataset_name: str | list[Any] | None = field(default=None, metadata={"help": "Data to evaluate on, from another place."})
    eval_fraction: float | None = field(default=None, metadata={"help": "Share of the training data, by prompt, held out for evaluation."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read a hub data set without a copy on disk."})
    rounds: int | None = field(default=None, metadata={"help": "Rounds of sampling, scoring and training; needs on_policy."})
    on_policy: dict[str, Any] | None = field(
        default=None, metadata={"help": "How pairs are made of the model's own answers to the prompts of dataset_name."}
    )
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "TRL's; no effect."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter; its output is multiplied by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapter."})
    lora_target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to adapt; unset: all linear ones."})
    lora_target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt (mixtures of experts)."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers to train whole beside the adapter."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "TRL's; only CAUSAL_LM."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    lora_init: bool | str = field(
        default=True, metadata={"help": "How the adapter starts, as PEFT names it: pissa, pissa_niter_16, olora, gaussian, orthogonal."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Frozen weights in 8 bits (bitsandbytes; on a CPU it saves memory and no time)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Frozen weights in 4 bits (bitsandbytes; on a CPU it saves memory and no time)."}
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "4-bit number format."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the quantisation constants too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Storage dtype of 4-bit weights."})


# Fields of TrainingArguments that scripts set for themselves; in a run's configuration they would do nothing.
_NO_KEYS = frozenset({"do_train", "do_eval", "do_predict", "local_rank", "beta", "objective_options"})


def key_types() -> dict[str, Any]:
    """Every key of a run configuration -> its type annotation; options of the objectives that are known by now among them."""
    from orpo.config.objectives import option_keys

    return {**{key: option.hint for key, option in option_keys().items()}, **_own_key_types()}


@functools.cache
def _own_key_types() -> dict[str, Any]:
    from orpo.config.options import field_types

    trainer = {name: hint for name, hint in field_types().items() if name not in _NO_KEYS}
    return {**typing.get_type_hints(RunKeys), **trainer}


def key_defaults() -> dict[str, Any]:
    """Every key of a run configuration -> its default; without options of other objectives than ORPO, which has its own."""
    from orpo.config.options import field_defaults

    own = {item.name: item.default for item in dataclasses.fields(RunKeys)}
    return {**own, **{name: default for name, default in field_defaults().items() if name in _own_key_types()}}
