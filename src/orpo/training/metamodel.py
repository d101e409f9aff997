"""A model on the meta device, where tensors have shapes and no content: for what can be asked of it before its weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_ATTENTION_NAME = "orpo_planning"


def meta_model(model_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model with shapes and no content, for counting.

    Raises:
        UserError: its architecture is not one of transformers' causal language models.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION_NAME, _shape_only_attention)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=_ATTENTION_NAME)
    except ValueError as error:
        raise UserError(f"no causal language model can be built: {str(error).splitlines()[0]}", where="model_name_or_path") from error
    model.train()
    return model


def _shape_only_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention that saves what a fused kernel saves (queries, keys, values, output) and computes nothing."""
    import torch

    class SaveAlone(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
            ctx.save_for_backward(query, key, value, output)
            return output

    return SaveAlone.apply(query, key, value), None
