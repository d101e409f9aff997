"""What `orpo train` runs: defaults, a YAML file and flags resolved into one set of values, each with its origin.

    default  <  file  <  flag

Every problem of both is told in one go, with file and line. Nothing is loaded, downloaded or created here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.config import compat
from orpo.config.checks import best_metric_problems, check_values, value_notes
from orpo.config.objectives import find, known, needs_reference, option_keys, options_without_effect
from orpo.config.optimizers import optimizer_notes
from orpo.config.parallelism import SHARDING_KEYS, not_spread_here
from orpo.config.values import split_list
from orpo.data.reading.sources import DEMO_DATA
from orpo.data.reading.splits import needs_length
from orpo.data.settings import DataSettings
from orpo.errors import UserError, UserErrors
from orpo.models.adapters import read_targets
from orpo.run.hints import notes_without_switch, variable_problems
from orpo.run.keys import key_defaults
from orpo.run.read import Given, load_named_plugins, place_of, read_file, read_flags, translate_layer
from orpo.system.redact import redact

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig

_FREE_OF_IDENTITY = frozenset({"output_dir", "resume_from_checkpoint", "allow_changed_resume", "token_cache"})
_STREAM_KEYS = frozenset({"streaming", "stream_window"})
"""Without a stream they say nothing, and configurations of earlier versions do not have them."""


@dataclass(frozen=True)
class RunConfig:
    """A resolved run.

    Attributes:
        values: every key -> its value.
        origins: every key -> "default", "recipes/demo.yaml:3" or "--learning_rate".
        notes: what the user should know (options without effect, values that are hardly meant).
        config_file: the YAML file, if there was one.
        name: what the run's folder is called where no output_dir says it.
        is_spread_later: it asks for weights in parts, and this process only looks ahead of it.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    notes: tuple[str, ...] = ()
    config_file: str | None = None
    name: str | None = None
    is_spread_later: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def is_given(self, key: str) -> bool:
        """Whether the file or a flag set the key."""
        return self.origins[key] != "default"

    def data_settings(self) -> DataSettings:
        """How the rows of the run are read and tokenised."""
        return DataSettings.of(self.values)

    def training_args(self) -> ORPOConfig:
        """The trainer's options as an `ORPOConfig`."""
        from orpo.config.options import ORPOConfig, field_types

        foreign = option_keys().keys() - {option.key for option in find(self.values["objective"]).options}  # told of as a note
        names = [name for name in {**field_types(), **option_keys()} if name in self.values and name not in foreign]
        left_out = SHARDING_KEYS if self.is_spread_later else ()
        given = {name: self.values[name] for name in names if self.is_given(name) and name not in left_out}
        with warnings.catch_warnings():  # which the notes tell already
            warnings.filterwarnings("ignore", message=r"\w+ has no effect: ", category=UserWarning)
            return ORPOConfig(**{**given, "output_dir": self.output_dir})

    @property
    def identity(self) -> str:
        """Hash of all values that say what is run, but not where it is written."""
        free = _FREE_OF_IDENTITY if self.values["streaming"] else _FREE_OF_IDENTITY | _STREAM_KEYS
        values = {name: value for name, value in sorted(self.values.items()) if name not in free}
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def output_dir(self) -> str:
        """The run's folder. Without an `output_dir` the same configuration always means the same folder, so that it can be resumed."""
        if self.values["output_dir"] is not None:
            return str(Path(self.values["output_dir"]).expanduser())
        stem = self.name or (Path(self.config_file).stem if self.config_file else Path(str(self.values["model_name_or_path"])).name)
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"
        return str(Path("runs") / f"{safe}-{self.identity[:8]}")

    def peft_config(self) -> Any:
        """The `peft.LoraConfig` asked for, or None for full fine-tuning."""
        if not self.values["use_peft"]:
            return None
        from orpo.models.adapters import lora_config

        return lora_config(self.values)

    def train_source(self) -> Any:
        """What to train on, as `orpo.data.reading.sources.as_sources` takes it."""
        return _with_config(self["dataset_name"], self["dataset_config"])

    def eval_source(self) -> tuple[Any, str | None] | None:
        """(source, split) to evaluate on, or None; `eval_fraction` is another matter."""
        name = self["eval_dataset_name"] or (self["dataset_name"] if self["dataset_test_split"] else None)
        if name is None:
            return None
        split = self["dataset_test_split"]
        return _with_config(name if split else demo_test(name), self["dataset_config"]), split


def demo_test(name: Any) -> Any:
    """The test rows of the packaged data, where it is named to evaluate on and no split is."""
    items = name if isinstance(name, list) else [name]
    places = [item if isinstance(item, dict) else {"path": item} for item in items]
    if all(place.get("path") != DEMO_DATA for place in places):
        return name
    return [{"split": "test", **place} if place.get("path") == DEMO_DATA else item for item, place in zip(items, places, strict=True)]


def _with_config(source: Any, config: str | None) -> Any:
    if config is None:
        return source
    items = source if isinstance(source, list) else [source]
    return [{"name": config, **item} if isinstance(item, dict) else {"path": item, "name": config} for item in items]


def resolve(
    config_file: str | Path | None = None,
    flags: Sequence[str] = (),
    *,
    base: Mapping[str, Any] | None = None,
    name: str | None = None,
    has_model: bool = True,
    is_launch: bool = True,
) -> RunConfig:
    """Resolve a run's configuration.

    Args:
        config_file: YAML with one key per line, or None.
        base: values between the defaults and the file, of a command that is a configuration of its own; their origin is `name`.
        name: what the run is called.
        has_model: whether a model has to be named; not by a command that only reads the data.
        is_launch: whether the run begins now, with the processes that there are; a command that looks ahead of it in one process spreads
            nothing itself, whatever the configuration asks for.
        flags: command-line arguments (`--learning_rate 1e-5`, `--lora_r=8`, `--use_peft`); one word that is no flag is the file.

    Raises:
        UserErrors: every problem of file, flags and values.
    """
    problems: list[UserError] = []
    words = read_flags(flags, [])[1]
    file = config_file if config_file is not None else words[0] if words else None
    plugins = load_named_plugins(None if file is None else Path(file), flags, problems)
    given_flags, words = read_flags(flags, problems)
    if config_file is not None:
        words.insert(0, str(config_file))
    for word in words[1:]:
        problems.append(UserError(f"found {word!r} beside {words[0]}", where="command line", expected="one configuration file"))
    path = words[0] if words else None
    given_file = read_file(Path(path), problems) if path is not None else {}
    notes: list[str] = []
    layers = [translate_layer(layer, problems, notes) for layer in (given_file, given_flags)]
    notes += compat.unlike_trl([*given_file, *given_flags])
    given = {**{key: Given(value, str(name)) for key, value in (base or {}).items()}, **layers[0], **layers[1], **plugins}
    values, origins = {**key_defaults(), **_objective_options(given)}, {}
    for key, default in values.items():
        origins[key] = given[key].origin if key in given else "default"
        values[key] = given[key].value if key in given else default
    if values["load_in_4bit"] or values["load_in_8bit"]:
        values["use_peft"] = True
    values["lora_target_modules"] = read_targets(values["lora_target_modules"])
    if isinstance(values["report_to"], str) and "," in values["report_to"]:
        values["report_to"] = split_list(values["report_to"])
    problems += _value_problems(values, origins, has_broken_keys=bool(problems), has_model=has_model, is_launch=is_launch)
    if problems:
        raise UserErrors(problems, title=f"The configuration has {len(problems)} problem{'s' if len(problems) > 1 else ''}:")
    notes += [note for _, note in compat.ignored({key: value for key, value in values.items() if origins[key] != "default"})]
    given_keys = [key for key in values if origins[key] != "default"]
    notes += value_notes(values) + notes_without_switch(values, set(given_keys))
    notes += optimizer_notes(values, given_keys) + options_without_effect(values["objective"], given_keys)
    is_spread_later = False
    if not is_launch and (told := not_spread_here(values, os.environ)) is not None:
        notes.append(told)
        is_spread_later = True
    return RunConfig(values, origins, tuple(dict.fromkeys(notes)), path, name, is_spread_later)


def _objective_options(given: Mapping[str, Given]) -> dict[str, Any]:
    """Options of the chosen objective with their defaults, and those of others that are given; no more, so that what is installed beside
    does not make another run of the same configuration."""
    name = given["objective"].value if "objective" in given else "orpo"
    chosen = [option.key for option in known()[name].options] if name in known() else []
    return {key: option.default for key, option in option_keys().items() if key in chosen or key in given}


def _value_problems(
    values: dict[str, Any], origins: dict[str, str], *, has_broken_keys: bool, has_model: bool, is_launch: bool
) -> list[UserError]:
    from orpo.config.options import field_types

    trainer = {key: value for key, value in values.items() if key in field_types() or key in option_keys()}
    own = {key: value for key, value in values.items() if key not in trainer}
    problems = check_values(trainer, field_types(), is_launch=is_launch) + compat.refusals(own)
    problems += _run_problems(values, has_broken_keys=has_broken_keys, has_model=has_model)
    problems += needs_reference(values["objective"]) + variable_problems(values)
    for problem in problems:
        origin = origins.get(problem.where or "", "default")
        if origin != "default":
            problem.where = place_of(str(problem.where), origin)
    return problems


def _run_problems(values: dict[str, Any], *, has_broken_keys: bool, has_model: bool) -> list[UserError]:
    problems = []
    needed = {
        "model_name_or_path": "a hub id, a folder, a GGUF file, or smollm2-135m-instruct",
        "dataset_name": f"a file, a folder, a hub id, or {DEMO_DATA}",
    }
    for key, expected in needed.items():
        # A misspelt key is told once, as what it is.
        if values[key] in (None, "", []) and not has_broken_keys and (has_model or key != "model_name_or_path"):
            problems.append(UserError("is missing", where=key, expected=expected, mend=f"add `{key}: …` to the file, or --{key} …"))
    for key in ("lora_r", "lora_alpha"):
        if values[key] < 1:
            problems.append(UserError(f"found {values[key]}", where=key, expected="at least 1"))
    if not 0 <= values["lora_dropout"] < 1:
        problems.append(UserError(f"found {values['lora_dropout']}", where="lora_dropout", expected="at least 0 and below 1"))
    fraction = values["eval_fraction"]
    if fraction is not None and not 0 < fraction < 1:
        problems.append(UserError(f"found {fraction}", where="eval_fraction", expected="between 0 and 1, 0.05 for instance"))
    if fraction is not None and (values["dataset_test_split"] or values["eval_dataset_name"]):
        other = "dataset_test_split" if values["dataset_test_split"] else "eval_dataset_name"
        problems.append(UserError(f"is given together with {other}", where="eval_fraction", mend="keep one of them"))
    problems += _stream_problems(values) if values["streaming"] else []
    if values["load_in_4bit"] and values["load_in_8bit"]:
        problems.append(UserError("is given together with load_in_8bit", where="load_in_4bit", mend="keep one of them"))
    has_eval = fraction is not None or values["dataset_test_split"] or values["eval_dataset_name"]
    if values["eval_strategy"] not in ("no", None) and not has_eval:
        problems.append(
            UserError(
                f"found {values['eval_strategy']!r}, but there is nothing to evaluate on",
                where="eval_strategy",
                mend="name dataset_test_split or eval_dataset_name, or hold rows out with eval_fraction",
            )
        )
    objective = known().get(values["objective"])
    return problems + best_metric_problems(values["metric_for_best_model"], has_reward=objective is None or objective.reward is not None)


def _stream_problems(values: Mapping[str, Any]) -> list[UserError]:
    """Data keys that need a source's end, where it is never read to it."""
    problems = []
    if values["eval_fraction"] is not None:
        what = "is a share of all rows, and a stream is never read to its end"
        mend = "name rows of their own: dataset_test_split, or eval_dataset_name; their prompts are left out of training"
        problems.append(UserError(what, where="eval_fraction", mend=mend))
    places = values["dataset_name"] if isinstance(values["dataset_name"], list) else []
    splits = [("dataset_train_split", values["dataset_train_split"])]
    splits += [("dataset_name", place.get("split")) for place in places if isinstance(place, dict)]
    for key, split in splits:
        if isinstance(split, str) and needs_length(split):
            what = f"{split} is counted from the end, and a stream is never read to it"
            problems.append(UserError(what, where=key, expected="a split, or a part counted from its start: train[1000:]"))
    return problems


def stored_config(facts: Mapping[str, Any]) -> RunConfig | None:
    """The configuration of a finished run from its run.json, to ask its model; None where there is none.

    Its plugins are not loaded, since the folder may be a stranger's: whoever asks a model needs no objective, so that one that is not
    known here, and its options, are left out.
    """
    configuration = facts.get("configuration")
    if not isinstance(configuration, dict):
        return None
    stored = {key: item for key, item in configuration.items() if isinstance(item, dict) and "value" in item}
    stored.pop("plugins", None)
    if "objective" in stored and stored["objective"]["value"] not in list(known()):
        del stored["objective"]
    values = {**key_defaults(), **{key: item["value"] for key, item in stored.items()}}
    return RunConfig(values, {key: str(stored.get(key, {}).get("origin", "default")) for key in values})


def as_facts(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The configuration for run.json: key -> value and origin. Secrets are the writer's business (`orpo.system.redact`)."""
    return {key: {"value": _plain(config.values[key]), "origin": config.origins[key]} for key in sorted(config.values)}


def given_facts(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The keys that a file or a flag set -> value and origin, by name; secrets are taken out."""
    shown = redact({key: _plain(value) for key, value in sorted(config.values.items()) if config.is_given(key)})
    return {key: {"value": value, "origin": config.origins[key]} for key, value in shown.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return float(value) if isinstance(value, float) else getattr(value, "value", str(value))


def read_model_config(config: RunConfig, name: str | None = None) -> Any:
    """The transformers configuration of a run's model, of its base where it is an adapter.

    Args:
        name: the model to read it of, such as the run's folder; None for the one that the run starts from.
    """
    import os

    from transformers import AutoConfig

    from orpo.models.adapters import about_base, adapter_base
    from orpo.models.find import explain_failure, find_source
    from orpo.system.machine import hub_answers

    source = find_source(name or config["model_name_or_path"])
    if source.kind == "adapter":
        with about_base(source):
            source = find_source(adapter_base(source)[0])
    try:
        if source.kind == "gguf":
            folder, name = os.path.split(os.path.abspath(source.location))
            return AutoConfig.from_pretrained(folder, gguf_file=name)
        return AutoConfig.from_pretrained(
            source.location,
            revision=config["model_revision"],
            trust_remote_code=bool(config["trust_remote_code"]),
            local_files_only=source.is_local or not hub_answers(),
        )
    except Exception as error:  # transformers and the hub raise a dozen kinds for bad input
        raise explain_failure(error, source, part="model's configuration") from error
