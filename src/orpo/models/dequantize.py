"""Plain weights from a model that is stored quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with plain float32 weights, which can be merged into and saved.

    Raises:
        UserError: transformers cannot unpack this kind of quantisation.
    """
    import torch

    try:
        plain: Any = model.dequantize()
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise UserError(
            f"these weights cannot be unpacked: {str(error).strip() or type(error).__name__}",
            where=model.name_or_path or None,
            mend="name the full-precision weights instead: --base MODEL",
        ) from error
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method", "_weight_conversions"):
        vars(plain).pop(mark, None)
    for config in {id(config): config for config in (plain.config, plain.config.get_text_config())}.values():
        vars(config).pop("quantization_config", None)
        vars(config).pop("_pre_quantization_dtype", None)
    return plain.to(torch.float32)  # what was not quantized may have been kept in another precision
