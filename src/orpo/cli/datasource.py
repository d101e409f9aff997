"""The data arguments that `orpo audit` and `orpo preview` share: rows given as paths, or as a run's configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import yaml

from orpo.errors import UserError

_ENCODING = ("chat_template", "max_length", "max_prompt_length", "truncation", "special_tokens_in_text")
_KEYS = ("column_map", "pairs", "nll_scope", *_ENCODING)
"""Options that are keys of a run's configuration, and override it."""


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
    _option(tokens, "max_length", type=int, help="most tokens of a prompt and one answer (default 1024)")
    _option(tokens, "max_prompt_length", type=int, help="most tokens of a prompt")
    _option(tokens, "truncation", choices=("drop", "keep_end", "keep_start"), help="what is done with longer rows (default drop)")
    _option(tokens, "special_tokens_in_text", choices=("warn", "split"), help="special-token text inside the rows' text (default warn)")


def _option(group: Any, *names: str, **settings: Any) -> None:
    """An option under its key's name, with dashes or underscores."""
    flags = [flag for name in names for flag in dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))]
    group.add_argument(*flags, dest=names[0], **settings)


@dataclass(slots=True)
class DataInput:
    """Which rows, and how they are read and tokenised.

    Attributes:
        evaluation: (source, split) of the evaluation data that a run's configuration names, or None.
        model: the model's name, or None.
    """

    source: Any
    split: str | None
    column_map: dict[str, str] | None
    pairs: str
    sft_rows: bool
    evaluation: tuple[Any, str | None] | None
    model: str | None
    revision: str | None
    nll_scope: str
    encoding: dict[str, Any]

    @property
    def reading(self) -> dict[str, Any]:
        """The keyword arguments of `stream_preferences`."""
        return {"split": self.split, "column_map": self.column_map, "pairs": self.pairs, "sft_rows": self.sft_rows}

    def make_encoder(self, **replaced: Any) -> Any:
        """The encoder of training, with the model's tokenizer; `replaced` goes before the arguments."""
        from orpo.data.template import TemplateEncoder
        from orpo.models.load import load_tokenizer

        if self.model is None:
            raise UserError(
                "no model is named",
                where="--model",
                expected="the model whose tokenizer is used",
                mend="add --model smollm2-135m-instruct, for instance, or name a run's CONFIG.yaml in place of the data",
            )
        return TemplateEncoder(load_tokenizer(self.model, revision=self.revision), **{**self.encoding, **replaced})


def read_data_arguments(args: argparse.Namespace) -> DataInput:
    """The data that the arguments name.

    Raises:
        UserError: a column map that cannot be read, or a configuration with problems.
    """
    if any(str(word).endswith((".yaml", ".yml")) for word in args.data):
        return _of_configuration(args)
    given = {
        key: getattr(args, key) for key in ("chat_template", "max_length", "max_prompt_length", "truncation", "special_tokens_in_text")
    }
    return DataInput(
        source=args.data if len(args.data) > 1 else args.data[0],
        split=args.split,
        column_map=read_column_map(args.column_map),
        pairs=args.pairs or "best_worst",
        sft_rows=args.sft_rows,
        evaluation=None,
        model=args.model,
        revision=args.revision,
        nll_scope=getattr(args, "nll_scope", None) or "sequence",
        encoding={key: value for key, value in given.items() if value is not None},
    )


def _of_configuration(args: argparse.Namespace) -> DataInput:
    from orpo.run.config import resolve

    if len(args.data) > 1:
        raise UserError("a configuration and other data together", where=" ".join(args.data), expected="one CONFIG.yaml, or paths")
    flags = [word for key in _KEYS if getattr(args, key, None) is not None for word in (f"--{key}", str(getattr(args, key)))]
    if args.model is not None:
        flags += ["--model_name_or_path", args.model]
    if args.sft_rows:
        flags.append("--sft_rows")
    config = resolve(args.data[0], flags)
    training = config.training_args()
    encoding = {key: getattr(training, key) for key in _ENCODING if key != "max_length" or training.max_length is not None}
    return DataInput(
        source=config.train_source(),
        split=args.split or config["dataset_train_split"],
        column_map=read_column_map(training.column_map),
        pairs=training.pairs,
        sft_rows=training.sft_rows,
        evaluation=config.eval_source(),
        model=config["model_name_or_path"],
        revision=args.revision or config["model_revision"],
        nll_scope=training.nll_scope,
        encoding=encoding,
    )


def read_column_map(value: Any) -> dict[str, str] | None:
    """A column map as a mapping, or as text: YAML, or `prompt=question,chosen=good`.

    Raises:
        UserError: neither.
    """
    if value is None or isinstance(value, dict):
        return value or None
    text = str(value).strip()
    if "=" in text and not text.startswith("{"):
        text = "{" + text.replace("=", ": ") + "}"
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(item, str) for pair in found.items() for item in pair):
        raise UserError(f"{value!r} is no column map", where="--column_map", expected="{prompt: question, chosen: good, rejected: bad}")
    return found
