"""A model of which this process has the shapes alone: its weights are another process's to read, and come as they are spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orpo.models.options import ModelOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def bare_model(config: Any, options: ModelOptions, **arguments: Any) -> PreTrainedModel:
    """The model of a configuration with its weights on the meta device; buffers are real, as many (rotary frequencies) are in no file.

    Args:
        arguments: more for `AutoModelForCausalLM.from_config`.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    dtype = options.dtype or getattr(config, "dtype", None) or torch.float32
    for name in ("attn_implementation", "experts_implementation"):  # which decide what is computed; all others are about reading files
        if (given := getattr(options, name, None) or options.model_init_kwargs.get(name)) is not None:
            arguments[name] = given
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=options.trust_remote_code, **arguments
        )
    model.tie_weights()  # a weight that is put onto the meta device is another one by then
    return model


def settle_buffers(model: nn.Module, like: nn.Module) -> None:
    """Buffers of a model that was read in a coarser dtype, as they are in another: numbers that it computes for itself were rounded."""
    kept, found = model.state_dict().keys(), dict(model.named_buffers())
    for name, buffer in like.named_buffers():
        if buffer.dtype != found[name].dtype:
            found[name].data = found[name].to(buffer.dtype) if name in kept else buffer


def is_bare(model: nn.Module) -> bool:
    """Whether some weights have no values here."""
    return any(weight.is_meta for weight in model.parameters())


def grow_embeddings(model: Any, num_rows: int) -> None:
    """Rows for new tokens, drawn around the mean of all others; of a model without values as many rows, without values."""
    model.resize_token_embeddings(num_rows, mean_resizing=not is_bare(model))
