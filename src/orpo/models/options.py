"""How a model is loaded, in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How to load; the arguments of `load_model` in one value."""

    revision: str | None = None
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    device: str | torch.device | None = None
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)
    adapter_base: str | None = None
    is_dequantized: bool = False
    is_spread: bool = False
    is_sent: bool = False
