"""Weights in 4 or 8 bits: made so while loading (bitsandbytes), or stored so already."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.models.dtype import computing_dtype
from orpo.models.options import ModelOptions
from orpo.system.installing import pip_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_bitsandbytes(*, in_4bit: bool) -> None:
    """The package that quantizes is there.

    Raises:
        UserError: it is not; names what installs it.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "load_in_4bit and load_in_8bit need the package bitsandbytes",
            where="load_in_4bit" if in_4bit else "load_in_8bit",
            mend=f"{pip_line('qlora')}, or train a LoRA adapter on the unquantized model",
        )


def quantization_arguments(options: ModelOptions) -> dict[str, Any]:
    """What `from_pretrained` is given beside the rest; nothing where no quantization is asked for.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not (options.load_in_4bit or options.load_in_8bit):
        return {}
    from transformers import BitsAndBytesConfig

    require_bitsandbytes(in_4bit=options.load_in_4bit)
    if options.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=computing_dtype(options.device),
            bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
            bnb_4bit_quant_storage=options.bnb_4bit_quant_storage,
        )
    }


def stored_quantization(model: PreTrainedModel) -> str | None:
    """The method of a model whose files are quantized; None for any other."""
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")
