"""The model of a checkpoint that several processes have written, each its parts of the float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.models.find import ModelSource
from orpo.models.options import ModelOptions
from orpo.system.parts import read_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_from_parts(source: ModelSource, config: Any, options: ModelOptions, *, is_quantized: bool) -> PreTrainedModel:
    """Build the model and fill it.

    Raises:
        CheckpointError: something is missing, or unreadable.
        UserError: it is to be quantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    if is_quantized:
        mend = "let the run end and name the run, or load it as it is"
        raise UserError("weights in parts cannot be quantized while they are loaded", where=source.name, mend=mend)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=options.attn_implementation, trust_remote_code=options.trust_remote_code
    )
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    read_parts({**{name: weight.detach() for name, weight in model.named_parameters()}, **buffers}, source.location)
    if (Path(source.location) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.location)
    return model.to(options.dtype) if options.dtype is not None else model
