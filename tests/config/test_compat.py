"""The compatibility table covers the installed TRL: none of its options is an unknown key, and the page is printed from the table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import orpo
from orpo import ORPOConfig
from orpo.config import compat
from orpo.config.options import field_defaults, field_types
from orpo.run.config import resolve
from orpo.run.keys import key_defaults, key_types

DOCS = Path(__file__).parents[2] / "docs" / "trl-compatibility.md"


def trl_options() -> dict[str, tuple[str, Any]]:
    """Option -> (class, default) for what TRL defines or overrides."""
    pytest.importorskip("trl", reason="TRL is an extra of the tests")
    from trl.experimental.orpo import ORPOConfig
    from trl.scripts.utils import ScriptArguments
    from trl.trainer.model_config import ModelConfig

    inherited = {item.name: repr(item.default) for item in dataclasses.fields(TrainingArguments)}
    found: dict[str, tuple[str, Any]] = {}
    for kind in (ORPOConfig, ScriptArguments, ModelConfig):
        for item in dataclasses.fields(kind):
            if kind is not ORPOConfig or item.name not in inherited or inherited[item.name] != repr(item.default):
                found[item.name] = (kind.__name__, item.default)
    return found


def test_every_option_of_trl_is_in_the_table() -> None:
    assert {name for name in trl_options() if name not in compat.BY_NAME} == set()


def test_no_field_of_trl_is_an_unknown_key() -> None:
    """Those that TRL takes over from `TrainingArguments` are fields here too, or in the table."""
    pytest.importorskip("trl", reason="TRL is an extra of the tests")
    from trl.experimental.orpo import ORPOConfig
    from trl.scripts.utils import ScriptArguments
    from trl.trainer.model_config import ModelConfig

    names = {item.name for kind in (ORPOConfig, ScriptArguments, ModelConfig) for item in dataclasses.fields(kind) if item.init}
    assert {"learning_rate", "deepspeed", "dataset_name", "lora_r"} <= names
    assert names - set(field_types()) - set(key_types()) - set(compat.BY_NAME) == {"datasets"} & names


def test_the_defaults_that_notes_speak_of_are_trls_and_ours() -> None:
    """`same default, 16` holds on both sides, `(TRL: 0.05)` is TRL's."""
    ours = {**key_defaults(), **field_defaults()}
    checked = set()
    for name, (_, default) in trl_options().items():
        note = compat.BY_NAME[name].note
        if same := re.search(r"same default, ([\w.-]+)", note):
            assert float(same[1]) == default == ours[name], name
            checked.add(name)
        if theirs := re.search(r"\(TRL: ([\w.-]+?)\)", note):
            told = {"on": True, "off": False}.get(theirs[1], theirs[1])
            assert default == told or float(told) == default, name
            checked.add(name)
    assert {"max_length", "learning_rate", "lora_r", "lora_dropout", "gradient_checkpointing", "dataset_train_split"} <= checked


def test_the_table_names_no_option_that_trl_does_not_have() -> None:
    # Two fields that TRL redeclares for their help texts alone.
    redeclared = {"lr_scheduler_kwargs", "torch_empty_cache_steps", "use_liger_kernel", "gradient_checkpointing", "bf16", "logging_steps"}
    options = {**trl_options(), **dict.fromkeys(redeclared)}
    entries = compat.TRL_ORPO_CONFIG + compat.TRL_SCRIPT_ARGUMENTS + compat.TRL_MODEL_CONFIG
    assert {entry.name for entry in entries if entry.name not in options} == set()


def test_trl_s_own_defaults_pass_without_a_problem_or_a_note() -> None:
    """Somebody who writes out TRL's default of an option must not be told off for it."""
    values = {name: default for name, (_, default) in trl_options().items()}
    assert compat.refusals(values) == []
    assert compat.ignored(values) == []


def test_accepted_names_are_keys_of_ours() -> None:
    known = set(key_types()) | set(field_types()) | {"tokenizer"}
    assert {entry.name for entry in compat.TABLE if entry.status == "accepted" and entry.name not in known} == set()


def test_mapped_names_lead_to_keys_of_ours() -> None:
    assert {entry.to for entry in compat.TABLE if entry.status == "mapped"} - set(key_types()) == set()
    assert all((entry.to is not None) == (entry.status == "mapped") for entry in compat.TABLE)


def test_every_name_once_and_refusals_explain_themselves() -> None:
    assert len(compat.BY_NAME) == len(compat.TABLE)
    assert all(entry.note and entry.mend and entry.harmless for entry in compat.TABLE if entry.status == "refused")
    assert all(entry.note and entry.harmless for entry in compat.TABLE if entry.status == "ignored")


class TestTranslate:
    def test_maps_and_keeps(self) -> None:
        assert compat.translate({"truncation_mode": "keep_end", "seed": 3}) == ({"seed": 3, "truncation": "keep_end"}, [], [])

    def test_converts_values(self) -> None:
        assert compat.translate({"group_by_length": False})[0] == {"train_sampling_strategy": "random"}

    def test_same_value_under_both_names_is_fine(self) -> None:
        assert compat.translate({"beta": 0.2, "orpo_alpha": 0.2}) == ({"orpo_alpha": 0.2}, [], [])

    def test_contradiction(self) -> None:
        options, problems, _ = compat.translate({"beta": 0.2, "orpo_alpha": 0.3})
        assert [problem.where for problem in problems] == ["beta"]
        assert options == {"orpo_alpha": 0.3}

    def test_null_under_an_old_name_says_nothing(self) -> None:
        assert compat.translate({"beta": None}) == ({}, [], [])

    def test_a_script_in_trl_s_words_hears_once_what_its_defaults_were(self) -> None:
        with pytest.warns(UserWarning, match="lr_scheduler_type linear, warmup_steps 0"):
            orpo.ORPOConfig(beta=0.2)
        for options in ({"orpo_alpha": 0.2}, {"beta": 0.2, "lr_scheduler_type": "linear"}, {"beta": 0.2, "warmup_ratio": 0.1}, {}):
            assert compat.unlike_trl(options) == []
        words = ["--model_name_or_path", "m", "--dataset_name", "d"]
        assert any("cosine" in note for note in resolve(None, [*words, "--beta", "0.2"]).notes)
        assert not resolve(None, [*words, "--orpo_alpha", "0.2"]).notes

    def test_refused_old_name(self) -> None:
        _, problems, _ = compat.translate({"save_safetensors": False})
        assert "False is refused: weights are always saved as safetensors" in str(problems[0])
        assert compat.translate({"save_safetensors": True})[1] == []

    def test_ignored_old_name(self) -> None:
        assert "logging_dir has no effect" in compat.translate({"logging_dir": "logs"})[2][0]


def test_booleans_are_not_numbers() -> None:
    """`0 == False` in Python; label smoothing of 0 is harmless, and so must nothing else be by accident."""
    assert compat.refusals({"label_smoothing_factor": 0}) == []
    assert len(compat.refusals({"label_smoothing_factor": False})) == 1


@pytest.mark.parametrize("given", [{"nothing": 1}, {"split_batches": True}, "nothing.json"])
def test_what_is_ignored_is_told_and_not_acted_on(given: Any) -> None:
    """Whatever it holds: transformers would raise over a key that it does not know, and act on the others."""
    with pytest.warns(UserWarning, match="accelerator_config has no effect"):
        args = ORPOConfig(accelerator_config=given, use_cpu=True)
    assert args.accelerator_config.split_batches is False


@pytest.mark.filterwarnings("error:.*has no effect")
def test_a_copy_has_no_options_that_nobody_gave() -> None:
    assert dataclasses.replace(ORPOConfig(use_cpu=True), orpo_alpha=0.5).orpo_alpha == 0.5


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text(encoding="utf-8") == compat.render(), "run: python -m orpo.config.compat > docs/trl-compatibility.md"
