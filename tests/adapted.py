"""Adapters on tiny models, as a run puts them there."""

from __future__ import annotations

from typing import Any

from orpo.models.adapters import put_adapter


def adapt(model: Any, *, r: int = 16, target_modules: Any = None, **settings: Any) -> Any:
    """A fresh LoRA adapter on every linear layer, or on those named."""
    from peft import LoraConfig

    targets = target_modules or "all-linear"
    return put_adapter(model, LoraConfig(**{"r": r, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM", **settings}))
