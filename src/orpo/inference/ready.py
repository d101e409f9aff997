"""A run or a model, ready to answer: weights, tokenizer, and the encoder that training used."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.run.folder import RunFolder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orpo.data.template import TemplateEncoder
    from orpo.models.load import LoadedModel
    from orpo.run.config import RunConfig

logger = logging.getLogger(__name__)
EVAL_FOLDER = "eval"


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
    name: str,
    *,
    chat_template: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    **loading: Any,
) -> Ready:
    """Load a model to ask it.

    Args:
        name: a run's folder, or whatever `orpo.models.load.load_model` takes.
        chat_template: as in training; unset, that of the run, or the tokenizer's own.
        revision, device: as in `load_model`.
        dtype: of the weights; unset, that of the files on a GPU, and float32 elsewhere.
        loading: anything else that `load_model` takes.

    Raises:
        UserError: there is no such model, or its template cannot be used.
    """
    import torch

    from orpo.models.load import load_model
    from orpo.system.machine import bf16_is_fast, choose_device

    target = Target.find(name)
    if dtype is None and choose_device(device).type == "cuda":
        dtype = "auto"
    loaded = load_model(name, revision=revision, dtype=dtype, device=device, **loading)
    # A conversation may be as long as the model takes, whatever length it was trained on.
    free: dict[str, Any] = {"max_length": None, "max_prompt_length": None, "truncation": "drop", "strict_data": False}
    encoder = _encoder(loaded, target, Loading(chat_template=chat_template), None, **free)
    compute_dtype = torch.bfloat16 if bf16_is_fast(loaded.model.device) else torch.float32
    return Ready(loaded, encoder, target.run.read() if target.run else None, compute_dtype)


@dataclass(frozen=True, slots=True)
class Target:
    """A name on the command line, before anything is loaded.

    Attributes:
        name: as it was given.
        run: the run that it is, or that it lies in; None for any other model.
    """

    name: str
    run: RunFolder | None

    @classmethod
    def find(cls, name: str) -> Target:
        """Tell a run's folder, a folder inside a run (`model`, `adapter`, a checkpoint) and any other model apart."""
        path = Path(name).expanduser()
        for folder in (path, path.parent):
            if path.is_dir() and (folder / "run.json").is_file():
                return cls(name, RunFolder(folder))
        return cls(name, None)

    @property
    def config(self) -> RunConfig | None:
        """The run's configuration as it was resolved."""
        facts = self.run.read() if self.run else None
        if not facts:
            return None
        from orpo.run.config import stored_config

        return stored_config(facts)

    @property
    def base(self) -> str | None:
        """The model that the run started from."""
        config = self.config
        return None if config is None else config["model_name_or_path"]

    def folder(self, output: str | Path | None) -> Path:
        """Where results go: the one asked for, the run's `eval`, or `eval/<model>` here."""
        if output is not None:
            return Path(output).expanduser()
        if self.run is not None:
            return self.run.path / EVAL_FOLDER
        return Path(EVAL_FOLDER) / (re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.") or "model")


@dataclass(frozen=True)
class Subject:
    """A loaded model, ready to be evaluated.

    Attributes:
        name: as it was given.
        model, tokenizer, encoder: the encoder is the run's, so that prompts are those of training.
        identity: hash of weights and template: part of every key in the cache.
        facts: of the model, for results.
        compute_dtype: None for the weights' own.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    encoder: TemplateEncoder
    identity: str
    facts: dict[str, Any]
    compute_dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Loading:
    """How models are loaded.

    Attributes:
        device: None for the best one.
        dtype: of computing: "auto" is bfloat16 where that is fast, "float32" is exact.
        chat_template: None for the run's, else the model's own.
        max_length: None for the run's, else the default of a configuration.
        revision: of a hub model.
        trust_remote_code: as for training.
    """

    device: str | None = None
    dtype: str = "auto"
    chat_template: str | None = None
    max_length: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def on(self, local_rank: int) -> Loading:
        """The same for one of several processes of a machine: each takes a GPU of its own, where there is one for it."""
        import torch

        if self.device not in (None, "cuda") or local_rank >= torch.cuda.device_count():
            return self
        return replace(self, device=f"cuda:{local_rank}")


def load_subject(name: str, loading: Loading, *, config: RunConfig | None = None, lengths: RunConfig | None = None) -> Subject:
    """Load a model for evaluation.

    Args:
        name: a run's folder, a model's folder, a hub id, a GGUF file, or the bundled alias.
        loading: how.
        config: the run's whose template and length contract count; None for the model's own run, if it has one. The model before training
            is given the run's, so that both see the same prompts.
        lengths: the run's whose length contract counts though the template does not: of a model that it is compared with, so that no row is
            dropped on one side alone.
    """
    import torch

    from orpo.models.fingerprint import content_key, weights_sha256
    from orpo.models.load import load_model, parse_dtype
    from orpo.system.machine import bf16_is_fast

    target, before = Target.find(name), config
    config = config or target.config
    is_base = config is not None and name == config["model_name_or_path"]
    # Quantized runs are loaded as they were trained, and their base at the revision that they started from.
    loaded = load_model(
        name,
        revision=loading.revision or (config["model_revision"] if config is not None and is_base else None),
        device=loading.device,
        trust_remote_code=loading.trust_remote_code,
        load_in_4bit=config is not None and bool(config["load_in_4bit"]),
        load_in_8bit=config is not None and bool(config["load_in_8bit"]),
    )
    model, tokenizer, facts = loaded
    encoder = _encoder(loaded, target, loading, before, lengths, date=_date_of(target, config))
    if encoder.new_tokens and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        _grow(model, tokenizer, name, encoder.new_tokens, config)
    fast = torch.bfloat16 if bf16_is_fast(facts.device) else None
    wanted = fast if loading.dtype == "auto" else parse_dtype(loading.dtype)
    template = {
        key: value for key, value in encoder.describe().items() if key.startswith(("template", "terminator", "chat_template", "date"))
    }
    identity = content_key(weights=weights_sha256(model), template=template)
    return Subject(name, model, tokenizer, encoder, identity, facts.to_dict(), wanted)


def _grow(model: Any, tokenizer: Any, name: str, new_tokens: Sequence[str], config: RunConfig | None) -> None:
    """Embeddings for the tokens of a template that the model does not know: those of the run's first step, which are drawn by its seed."""
    import torch

    if config is None:
        raise UserError(
            f"the template's tokens {', '.join(new_tokens)} are new to {name}",
            where="chat_template",
            mend="leave --chat_template away, or train the model on it first",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        model.resize_token_embeddings(len(tokenizer))
    logger.warning("%s does not know the template's tokens %s: their embeddings are random", name, ", ".join(new_tokens))


def _date_of(target: Target, config: RunConfig | None) -> str | None:
    """What the template's today was in the run, so that its prompts are asked as they were trained."""
    from orpo.run.data import kept_date

    if target.run is not None:
        return target.run.template_date()
    return kept_date(config) if config is not None else None


def run_encoder(target: Target) -> TemplateEncoder:
    """The encoder that a run trained with, from its own tokenizer; no weights are loaded.

    Raises:
        UserError: the name is no run, or its tokenizer cannot be loaded.
    """
    from orpo.run.data import load_encoder

    config = target.config
    if config is None:
        raise UserError("is no run", where=target.name, expected="a folder with run.json")
    date = target.run.template_date() if target.run is not None else None
    return load_encoder(config, model=target.name, chat_template=_saved_template(config), date=date)


def _saved_template(config: RunConfig) -> str | None:
    """The template of a run for its own tokenizer, which has it: the file that it came from may have changed since, or be gone."""
    return "none" if config["chat_template"] == "none" else None


def _encoder(
    loaded: LoadedModel,
    target: Target,
    loading: Loading,
    config: RunConfig | None,
    lengths: RunConfig | None = None,
    *,
    date: str | None = None,
    **replaced: Any,
) -> TemplateEncoder:
    """The encoder of a loaded model, under the settings of a run: `config`, else its own; the defaults where there is neither.

    `lengths` is a run whose settings count in place of its own, but for the template.
    """
    from orpo.data.settings import DataSettings
    from orpo.data.template import make_encoder
    from orpo.models.newtokens import positions_of
    from orpo.run.keys import key_defaults

    own = target.config
    template = config["chat_template"] if config is not None else _saved_template(own) if own is not None else None
    config = config or lengths or own
    settings = DataSettings.of(key_defaults() if config is None else config.values)
    template, max_length = loading.chat_template or template, loading.max_length or settings.max_length
    settings = replace(settings, **{"chat_template": template, "max_length": max_length, **replaced})
    return make_encoder(loaded.tokenizer, settings, num_positions=positions_of(loaded.model.config), date=date)
