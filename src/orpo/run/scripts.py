"""What TRL's scripts import beside the trainer, under TRL's names: arguments of a script, and what they make.

    parser = HfArgumentParser((ScriptArguments, ORPOConfig, ModelConfig))

`orpo train` has the same options as keys of a run; these classes are for scripts that load model and data themselves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from orpo.config.options import newest_config
from orpo.models.adapters import lora_config, read_targets


@dataclass
class ScriptArguments:
    """Which data a script loads.

    Example:
        >>> from orpo import ORPOConfig, ScriptArguments
        >>> from transformers import HfArgumentParser
        >>> parser = HfArgumentParser((ScriptArguments, ORPOConfig))
        >>> script_args, config = parser.parse_args_into_dataclasses(["--dataset_name", "pairs.jsonl", "--output_dir", "runs/one"])
        >>> script_args.dataset_name
        'pairs.jsonl'
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read it without a copy on disk."})
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "No effect: the optimizer step synchronises gradients alone."})


@dataclass
class ModelConfig:
    """Which model a script loads, in which precision, and with which adapter.

    `model_revision` and `trust_remote_code` can be read here as in TRL, and are options of `ORPOConfig`: two classes of one parser cannot
    both declare a flag.

    Example:
        >>> from orpo import ModelConfig
        >>> ModelConfig(model_name_or_path="model", use_peft=True).lora_r
        16
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id, folder, GGUF file or smollm2-135m-instruct."})
    dtype: str | None = field(default=None, metadata={"help": "Dtype of the weights: auto, float32, bfloat16, float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of the model that the script loads; the engine has its own."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapter."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Layers to adapt; unset: all linear ones."})
    lora_target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt (mixtures of experts)."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers to train whole beside the adapter."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Only CAUSAL_LM."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Frozen weights in 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Frozen weights in 4 bits (bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit number format: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the quantisation constants too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Storage dtype of 4-bit weights."})

    @property
    def model_revision(self) -> str:
        """That of the script's `ORPOConfig`; "main" where none is given, as in TRL."""
        return getattr(newest_config(), "model_revision", None) or "main"

    @property
    def trust_remote_code(self) -> bool:
        """That of the script's `ORPOConfig`."""
        return bool(getattr(newest_config(), "trust_remote_code", False))


def get_peft_config(model_args: ModelConfig) -> Any:
    """The `peft.LoraConfig` for `ORPOTrainer(peft_config=…)`; None where all weights are trained.

    Raises:
        UserError: a value that no adapter can have.

    Example:
        >>> from orpo import ModelConfig, get_peft_config
        >>> get_peft_config(ModelConfig(use_peft=True, lora_r=8)).r
        8
    """
    if not model_args.use_peft:
        return None
    targets = model_args.lora_target_modules
    # One word of a list may be the whole text, as in --lora_target_modules all-linear.
    values = {**asdict(model_args), "lora_target_modules": read_targets(targets[0]) if targets and len(targets) == 1 else targets}
    return lora_config(values)


def get_quantization_config(model_args: ModelConfig) -> Any:
    """The `BitsAndBytesConfig` for `from_pretrained(quantization_config=…)`; None where nothing is quantized.

    Raises:
        UserError: bitsandbytes is not installed.

    Example:
        >>> from orpo import ModelConfig, get_quantization_config
        >>> get_quantization_config(ModelConfig()) is None
        True
    """
    from orpo.models.options import ModelOptions
    from orpo.models.quantized import quantization_arguments

    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    return quantization_arguments(ModelOptions(**{name: getattr(model_args, name) for name in names})).get("quantization_config")


def get_kbit_device_map() -> dict[str, int] | None:
    """For `from_pretrained(device_map=…)` of a quantized model, which cannot be moved: this process's GPU; None without one.

    Example:
        >>> from orpo import get_kbit_device_map
        >>> get_kbit_device_map() in (None, {"": 0})
        True
    """
    import torch
    from accelerate import PartialState

    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None
