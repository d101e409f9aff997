"""Adapters on tiny models, as a run puts them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo.models.adapters import put_adapter


def adapt(model: Any, *, r: int = 16, target_modules: Any = None, **settings: Any) -> Any:
    """A fresh LoRA adapter on every linear layer, or on those named."""
    from peft import LoraConfig

    targets = target_modules or "all-linear"
    return put_adapter(model, LoraConfig(**{"r": r, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM", **settings}))


def make_adapter_folder(folder: Path) -> Path:
    """`adapter` in a folder, on `base` beside it, whose answers it changes."""
    import torch

    from orpo.models.export import export_adapter, export_merged
    from orpo.models.load import load_model
    from tinymodels import build_tiny_model, build_tiny_tokenizer

    export_merged(build_tiny_model("llama", vocab_size=384, max_position_embeddings=1024), build_tiny_tokenizer(), folder / "base")
    loaded = load_model(folder / "base", device="cpu")
    adapted = adapt(loaded.model, r=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return export_adapter(adapted, loaded.tokenizer, folder / "adapter")
