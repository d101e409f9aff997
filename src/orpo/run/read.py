"""Reading what the user wrote: a YAML file and command-line flags, each into key -> value with its origin.

Nothing is resolved here; problems are collected, never raised, so that both are told in one go.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo.config import compat
from orpo.config.shipped import packaged_path
from orpo.config.values import NotAcceptedError, describe, did_you_mean, found, from_flag, from_yaml, members
from orpo.errors import UserError
from orpo.run.keys import key_types
from orpo.system.plugins import load_plugins
from orpo.system.redact import is_secret_name

MAX_CONFIG_BYTES = 1 << 20
_MAX_YAML_NODES = 20_000

# What other tools' configurations call the same thing, too far in spelling for "did you mean".
_OTHER_TOOLS_NAMES = {
    "lr": "learning_rate",
    "lambda": "orpo_alpha",
    "orpo_lambda": "orpo_alpha",
    "pref_beta": "orpo_alpha",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "dataset": "dataset_name",
    "data": "dataset_name",
    "train_file": "dataset_name",
    "validation_file": "eval_dataset_name",
    "val_set_size": "eval_fraction",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "template": "chat_template",
    "adapter": "use_peft",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
}


_SCRIPTS_OWN = {
    "do_train": "`orpo train` trains",
    "do_eval": "a run evaluates where eval_dataset_name, dataset_test_split or eval_fraction gives it rows, by eval_strategy",
    "do_predict": "`orpo eval` asks a finished run",
    "objective_options": "each option of an objective is a key of its own, such as simpo_gamma",
}
"""Fields of `ORPOConfig` that only a script sets."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody wrote, and where."""

    value: Any
    origin: str


def place_of(key: str, origin: str) -> str:
    """Where a value is wrong: line and key of a file, or the flag as it was typed, with the key where that is called otherwise."""
    return origin if origin.removeprefix("--").replace("-", "_") == key else f"{origin}: {key}"


def translate_layer(layer: dict[str, Given], problems: list[UserError], notes: list[str]) -> dict[str, Given]:
    """Older and TRL's names into ours, within one layer, so that a flag may override a file's value under another name."""
    plain, found_problems, found_notes = compat.translate({key: item.value for key, item in layer.items()})
    for problem in found_problems:
        key = problem.where
        if key in layer:
            problem.where = place_of(key, layer[key].origin)
    problems += found_problems
    notes += found_notes
    old_names = {entry.to: name for name in layer if (entry := compat.BY_NAME.get(name)) and entry.to}
    result = {}
    for key, value in plain.items():
        source = layer.get(key) or layer[old_names[key]]
        result[key] = Given(value, source.origin)
    return result


def read_file(path: Path, problems: list[UserError]) -> dict[str, Given]:
    text = _read_text(path, problems)
    if text is None:
        return {}
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            problems.append(UserError("the file is empty", where=str(path), expected="one `key: value` per line"))
            return {}
        if not isinstance(node, yaml.MappingNode):
            problems.append(UserError("the file is not a mapping", where=str(path), expected="one `key: value` per line"))
            return {}
        _check_size(node)
        loader.flatten_mapping(node)
        pairs = [(key, loader.construct_object(key, deep=True), loader.construct_object(item, deep=True)) for key, item in node.value]
    except yaml.YAMLError as error:
        problems.append(_yaml_problem(path, error))
        return {}
    except (RecursionError, ValueError) as error:
        problems.append(UserError(f"cannot be read: {error}", where=str(path), expected="plain YAML"))
        return {}
    finally:
        loader.dispose()
    result: dict[str, Given] = {}
    lines: dict[str, int] = {}
    for key_node, key, value in pairs:
        line = key_node.start_mark.line + 1
        origin = f"{path}:{line}"
        if not isinstance(key, str):
            problems.append(UserError(f"the key is {found(key)}", where=origin, expected="text"))
        elif key in lines:
            problems.append(UserError(f"{key} is given twice, first in line {lines[key]}", where=origin, mend="keep one of them"))
        else:
            lines[key] = line
            _take(result, key, value, origin, problems)
    return result


def _read_text(path: Path, problems: list[UserError]) -> str | None:
    try:
        with packaged_path(path).open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        near = sorted(item.name for item in path.parent.glob("*.y*ml"))[:5] if path.parent.is_dir() else []
        hint = f"there is {', '.join(near)}" if near else "check the path"
        problems.append(UserError(f"cannot be read ({error.strerror})", where=str(path), expected="a YAML file", mend=hint))
        return None
    if len(data) > MAX_CONFIG_BYTES:
        problems.append(UserError("is larger than 1 MiB", where=str(path), expected="a YAML file with a run's options"))
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problems.append(UserError("is not UTF-8 text", where=f"{path}:{line}", mend="save the file as UTF-8"))
        return None


def _check_size(node: yaml.Node) -> None:
    """Refuse anchors that multiply: a few lines of them stand for more values than memory holds."""
    budget = _MAX_YAML_NODES
    stack = [node]
    while stack:
        current = stack.pop()
        budget -= 1
        if budget < 0:
            raise ValueError(f"more than {_MAX_YAML_NODES} values")
        if isinstance(current, yaml.MappingNode):
            stack += [part for pair in current.value for part in pair]
        elif isinstance(current, yaml.SequenceNode):
            stack += current.value


def _yaml_problem(path: Path, error: yaml.YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    is_tag = isinstance(error, yaml.constructor.ConstructorError)
    mend = "plain values only; tags such as !!python are never executed" if is_tag else "a value with a colon or # in it needs quotes"
    if "\\t" in what:  # "found character '\\t' that cannot start any token"
        what, mend = "a tab", "YAML takes no tabs at the start of a value or line: put spaces in its place"
    if path.suffix not in (".yaml", ".yml"):
        mend = "a configuration is a YAML file; data are named by --dataset_name"
    return UserError(f"not valid YAML: {what}", where=where, mend=mend)


def _take(result: dict[str, Given], key: str, value: Any, origin: str, problems: list[UserError]) -> None:
    """Take one key of a file, fitted to its type, or say what is wrong with it."""
    if key == "datasets":
        key, value = "dataset_name", _from_trl_datasets(value, origin, problems)
    hint = _hint(key)
    if hint is None:
        problems.append(_unknown(key, origin))
        return
    try:
        result[key] = Given(from_yaml(hint, _unswitch(key, value)), origin)
    except NotAcceptedError:
        shown = "a value of the wrong type" if is_secret_name(key) else found(value)
        problems.append(UserError(f"found {shown}", where=f"{origin}: {key}", expected=describe(hint)))


def _unswitch(key: str, value: Any) -> Any:
    """YAML 1.1 reads `no` and `off` as false; for an option whose values include "no" the word was meant."""
    return "no" if value is False and key in ("eval_strategy", "save_strategy", "logging_strategy", "evaluation_strategy") else value


def _from_trl_datasets(value: Any, origin: str, problems: list[UserError]) -> Any:
    """TRL's `datasets:` list, as sources; its `fraction` is our `weight`."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return value
    sources = []
    for item in value:
        source = {{"fraction": "weight"}.get(key, key): part for key, part in item.items() if part is not None}
        if "data_files" in source:
            source["path"] = source.pop("data_files")
        for key in ("data_dir", "columns"):
            if key in source:
                del source[key]
                problems.append(
                    UserError(f"{key} is not supported", where=f"{origin}: datasets", mend="name the files in path, columns in column_map")
                )
        sources.append(source)
    return sources


def _hint(key: str) -> Any:
    """The type of a key, of an older name too."""
    if key in key_types():
        return key_types()[key]
    entry = compat.BY_NAME.get(key)
    if entry is None or key == "tokenizer":
        return None
    return key_types().get(entry.to, Any) if entry.to and entry.convert is None else Any


def _unknown(key: str, origin: str) -> UserError:
    names = [*key_types(), *(entry.name for entry in compat.OLDER_NAMES if entry.name != "tokenizer"), "beta"]
    if key in _SCRIPTS_OWN:
        return UserError(f"{key} is no key of a run", where=origin, mend=f"leave it out: {_SCRIPTS_OWN[key]}")
    if key == "tokenizer":
        mend: str | None = "leave it out; the tokenizer is the model's own"
    elif key.lower() in _OTHER_TOOLS_NAMES:
        mend = f"did you mean {_OTHER_TOOLS_NAMES[key.lower()]!r}?"
    else:
        mend = did_you_mean(key.replace("-", "_"), names)
    return UserError(f"unknown key {key!r}", where=origin, mend=mend or "`orpo train --help` lists the keys; they are flat")


def load_named_plugins(config_file: Path | None, flags: Sequence[str], problems: list[UserError]) -> dict[str, Given]:
    """Load the plugins that file and flags name, before either is read for good: the keys of a plugin's objective are its own.

    Returns:
        `plugins` with all of them, the file's first: those of a flag come on top, or the file's other keys would have no meaning. Empty
        where none is named.
    """
    layers = [read_file(config_file, []) if config_file is not None else {}, read_flags(flags, [])[0]]
    named = [layer["plugins"] for layer in layers if layer.get("plugins") is not None and layer["plugins"].value]
    for given in named:
        try:
            load_plugins(given.value, where=given.origin if given.origin.startswith("--") else f"{given.origin}: plugins")
        except UserError as error:
            problems.append(error)
    names = list(dict.fromkeys(name for given in named for name in given.value))
    return {"plugins": Given(names, named[-1].origin)} if named else {}


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def read_flags(words: Sequence[str], problems: list[UserError]) -> tuple[dict[str, Given], list[str]]:
    """Flags by key, and the words that belong to none."""
    result: dict[str, Given] = {}
    rest: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not _is_flag(word):
            if word.startswith("-") and word != "--":
                problems.append(UserError(f"unknown option {word!r}", where="command line", expected="--key value"))
            else:
                rest.append(word)
            continue
        name, has_value, text = word[2:].partition("=")
        key = name.replace("-", "_")
        hint = _hint(key)
        negated = _hint(key.removeprefix("no_")) if hint is None and key.startswith("no_") else None
        if negated is Any or bool in members(negated):  # as transformers' parser of scripts has them: --no_remove_unused_columns
            key, hint, has_value, text = key.removeprefix("no_"), negated, "=", "false"
        if hint is None:
            problems.append(_unknown(key, f"--{name}"))
            position += 0 if has_value or position >= len(words) or _is_flag(words[position]) else 1
            continue
        if not has_value:
            texts = _flag_words(hint, words[position:])
            position += len(texts)
        else:
            texts = [text]
        if key in result:
            problems.append(UserError("is given twice", where=f"--{key}", mend="keep one of them"))
        elif (value := _flag_value(key, hint, texts, problems, f"--{name}")) is not None:
            result[key] = value
    return result, rest


def _flag_words(hint: Any, following: Sequence[str]) -> list[str]:
    """The words after a flag that are its value: several for a list, none or one for a switch, one else."""
    words: list[str] = []
    for word in following:
        if _is_flag(word):
            break
        words.append(word)
    alternatives = members(hint)
    if hint is Any:  # an older name: a switch, or one value
        return [] if words and words[0].endswith((".yaml", ".yml")) else words[:1]
    if bool in alternatives and str not in alternatives:
        return words[:1] if words and words[0].lower() in ("true", "false", "yes", "no", "on", "off", "1", "0", "none", "null") else []
    if any(item is list or typing.get_origin(item) is list for item in alternatives):
        is_before_file = len(words) > 1 and words[-1].endswith((".yaml", ".yml"))
        return words[:-1] if is_before_file else words
    if bool in alternatives and words and words[0].endswith((".yaml", ".yml")):  # a switch that takes words too, before the file
        return []
    return words[:1]


def _flag_value(key: str, hint: Any, texts: list[str], problems: list[UserError], flag: str) -> Given | None:
    try:
        if not texts:
            if hint is Any or bool in members(hint):
                return Given(True, flag)
            raise NotAcceptedError("")
        return Given(from_flag(hint, texts[0]) if len(texts) == 1 else texts, flag)
    except NotAcceptedError:
        shown = "a value of the wrong type" if is_secret_name(key) else f"the text {texts[0]!r}" if texts else "no value"
        problems.append(UserError(f"found {shown}", where=flag, expected=describe(hint)))
        return None
