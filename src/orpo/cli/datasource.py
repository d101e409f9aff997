"""The data arguments that `orpo audit` and `orpo preview` share: rows given as paths, or as a run's configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.data.settings import DataSettings
    from orpo.data.template import TemplateEncoder
    from orpo.run.config import RunConfig

_SAME_NAMES = ("column_map", "pairs", "nll_scope", "chat_template", "chat_template_kwargs", "max_length", "max_prompt_length", "truncation")
_KEYS = {
    **{name: name for name in (*_SAME_NAMES, "special_tokens_in_text")},
    "split": "dataset_train_split",
    "model": "model_name_or_path",
    "revision": "model_revision",
}
"""Options that are keys of a run's configuration, and override it: option -> key."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders or hub ids; or one CONFIG.yaml, for the data of that run")
    data = parser.add_argument_group("reading the rows")
    _option(data, "split", help="split to read where there are several (default: the only one, or train)")
    _option(data, "column_map", metavar="MAP", help="our column names to the data's, such as '{prompt: question, chosen: good}'")
    _option(data, "pairs", help="pairs of rows with several judged answers: best_worst (default), all, adjacent, margin:M")
    _option(data, "sft_rows", action="store_true", help="take rows with one answer and none to reject as SFT-only rows")
    tokens = parser.add_argument_group("as the model sees them")
    _option(tokens, "model", "model_name_or_path", metavar="MODEL", help="hub id, folder, GGUF file or smollm2-135m-instruct")
    _option(tokens, "revision", "model_revision", help="revision of the model on the hub")
    _option(tokens, "chat_template", help="chatml, none, a Jinja file, or the template itself (default: the tokenizer's)")
    _option(tokens, "chat_template_kwargs", metavar="JSON", help="variables for the chat template: '{\"enable_thinking\": false}'")
    _option(tokens, "max_length", type=int, help="most tokens of a prompt and one answer (default 1024)")
    _option(tokens, "max_prompt_length", type=int, help="most tokens of a prompt")
    _option(tokens, "truncation", choices=("drop", "keep_end", "keep_start"), help="what is done with longer rows (default drop)")
    _option(tokens, "special_tokens_in_text", choices=("warn", "split"), help="special-token text inside the rows' text (default warn)")


def _option(group: Any, *names: str, **settings: Any) -> None:
    """An option under its key's name, with dashes or underscores."""
    flags = [flag for name in names for flag in dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))]
    group.add_argument(*flags, dest=names[0], **settings)


@dataclass(frozen=True, slots=True)
class DataInput:
    """Rows that are only looked at.

    Attributes:
        config: what was named, as the configuration of a run; `model_name_or_path` may be None.
        settings: how it reads and tokenises; no row stops the reading, since all of them are to be seen.
        is_run: whether a run's configuration was named, and not data alone.
    """

    config: RunConfig
    settings: DataSettings
    is_run: bool

    @property
    def source(self) -> Any:
        """What is trained on, as `orpo.data.reading.sources.as_sources` takes it."""
        return self.config.train_source()

    @property
    def model(self) -> str | None:
        """The model's name, if one was named."""
        name: str | None = self.config["model_name_or_path"]
        return name

    def load_encoder(self, tokenizer: str | None = None, **replaced: Any) -> TemplateEncoder:
        """The encoder of training; `replaced` goes before the settings.

        Args:
            tokenizer: taken in place of the model's.

        Raises:
            UserError: neither a model nor a tokenizer was named, or it cannot be loaded.
        """
        from orpo.run.data import load_encoder

        if self.model is None and tokenizer is None:
            raise UserError(
                "no model is named",
                where="--model",
                expected="the model whose tokenizer is used",
                mend="add --model smollm2-135m-instruct, for instance, or name a run's CONFIG.yaml in place of the data",
            )
        return load_encoder(self.config, tokenizer=tokenizer, **{"strict_data": False, **replaced})


def read_data_arguments(args: argparse.Namespace) -> DataInput:
    """The data that the arguments name.

    Raises:
        UserError: a column map that cannot be read, or a configuration with problems.
    """
    from orpo.run.config import resolve

    is_run = any(str(word).endswith((".yaml", ".yml")) for word in args.data)
    if is_run and len(args.data) > 1:
        raise UserError("a configuration and other data together", where=" ".join(args.data), expected="one CONFIG.yaml, or paths")
    given = {key: getattr(args, name, None) for name, key in _KEYS.items()}
    flags = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    if args.sft_rows:
        flags.append("--sft_rows")
    if is_run:
        config = resolve(args.data[0], flags, is_launch=False)
    else:
        data = args.data if len(args.data) > 1 else args.data[0]
        config = resolve(None, flags, base={"dataset_name": data}, name="the command line", has_model=False)
    return DataInput(config, replace(config.data_settings(), strict_data=False), is_run)
