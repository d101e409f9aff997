"""A run or a model, ready to answer: weights, tokenizer, and the encoder that training used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.runfolder import RunFolder

if TYPE_CHECKING:
    import torch

    from orpo.data.template import TemplateEncoder
    from orpo.models import LoadedModel


@dataclass(frozen=True)
class Ready:
    """What it takes to answer prompts.

    Attributes:
        loaded: model, tokenizer and facts.
        encoder: renders prompts as training did.
        run: the run's facts, where the name was a run's folder.
        compute_dtype: bfloat16 where the device is fast at it.
    """

    loaded: LoadedModel
    encoder: TemplateEncoder
    run: dict[str, Any] | None
    compute_dtype: torch.dtype


def make_ready(
    name: str, *, chat_template: str | None = None, revision: str | None = None, dtype: str | None = None, device: str | None = None
) -> Ready:
    """Load a model to ask it.

    Args:
        name: a run's folder, or whatever `orpo.models.load_model` takes.
        chat_template: as in training; unset, that of the run, or the tokenizer's own.
        revision, device: as in `load_model`.
        dtype: of the weights; unset, that of the files on a GPU, and float32 elsewhere.

    Raises:
        UserError: there is no such model, or its template cannot be used.
    """
    import torch

    from orpo.data.template import TemplateEncoder
    from orpo.devices import bf16_is_fast, choose_device
    from orpo.models import load_model

    run = run_of(name)
    if dtype is None and choose_device(device).type == "cuda":
        dtype = "auto"
    loaded = load_model(name, revision=revision, dtype=dtype, device=device)
    if chat_template is None and run is not None and run.get("data", {}).get("template", {}).get("template") == "none":
        chat_template = "none"  # any other template of a run is the saved tokenizer's own
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    encoder = TemplateEncoder(loaded.tokenizer, chat_template=chat_template, max_length=context or 4096)
    return Ready(loaded, encoder, run, torch.bfloat16 if bf16_is_fast(loaded.model.device) else torch.float32)


def run_of(name: str | Path) -> dict[str, Any] | None:
    """The facts of the run that this folder is or lies in (`runs/a`, `runs/a/model`, `runs/a/checkpoint-20`), else None."""
    path = Path(name)
    for folder in (path, path.parent):
        if folder.is_dir() and (folder / "run.json").is_file():
            return RunFolder(folder).read()
    return None
