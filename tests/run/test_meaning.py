"""What was meant is taken or told: words in quotes, lists as text, older flags, negated flags, variables, switches that are off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo.config import compat
from orpo.config.values import members
from orpo.errors import UserError, UserErrors
from orpo.run.config import resolve
from orpo.run.keys import key_types

MINIMAL = "model_name_or_path: some/model\ndataset_name: rows.jsonl\n"
SWITCHES = sorted(key for key, hint in key_types().items() if bool in members(hint) and str not in members(hint))
MAY_BE_NOTHING = sorted(
    key for key, hint in key_types().items() if type(None) in members(hint) and str not in members(hint) and Any not in members(hint)
)
LISTS_OF_TEXTS = sorted(key for key, hint in key_types().items() if list[str] in members(hint) and str not in members(hint))


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(MINIMAL + text, encoding="utf-8")
        return str(path)

    return write_file


def problems_of(path: str | None, *flags: str) -> str:
    with pytest.raises(UserErrors) as caught:
        resolve(path, flags)
    return str(caught.value)


def outcome(path: str | None, *flags: str) -> Any:
    """The configuration's values, or its problems without the places they were found at."""
    try:
        return resolve(path, flags).values
    except UserErrors as error:
        return sorted(problem.what for problem in error.problems)


@pytest.mark.parametrize("key", SWITCHES)
def test_a_quoted_truth_value_is_one(key: str, write) -> None:
    for word in ("'true'", '"False"', "'yes'", "'off'"):
        bare = word.strip("'\"")
        assert outcome(write(f"{key}: {word}\n")) == outcome(write(f"{key}: {bare}\n"))


@pytest.mark.parametrize("key", MAY_BE_NOTHING)
def test_a_quoted_nothing_is_nothing(key: str, write) -> None:
    expected = outcome(write(f"{key}: null\n"))
    for word in ("'null'", "none", "'None'"):
        assert outcome(write(f"{key}: {word}\n")) == expected


@pytest.mark.parametrize("key", LISTS_OF_TEXTS)
def test_a_text_with_commas_is_a_list_where_no_text_is_asked_for(key: str, write) -> None:
    for text in ("first_one, second_one", "first_one,second_one"):
        assert outcome(write(f"{key}: {text}\n")) == outcome(write(f"{key}: [first_one, second_one]\n"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("all", "all-linear"),
        ("all-linear", "all-linear"),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_layers_to_adapt_as_they_were_meant(written: str, meant: Any, write) -> None:
    quoted = f"'{written}'" if "*" in written else written
    assert resolve(write(f"use_peft: true\nlora_target_modules: {quoted}\n"))["lora_target_modules"] == meant
    assert resolve(write(""), ["--use_peft", "--lora_target_modules", written])["lora_target_modules"] == meant


OLD_SWITCHES = sorted(
    entry.name
    for entry in compat.OLDER_NAMES
    if entry.name not in key_types() and entry.status == "ignored" and any(isinstance(value, bool) for value in entry.harmless)
)


@pytest.mark.parametrize("name", ["overwrite_output_dir", "group_by_length", *OLD_SWITCHES])
def test_older_switches_are_flags_as_they_are_keys(name: str, write) -> None:
    for value in ("true", "false"):
        in_file = outcome(write(f"{name}: {value}\n"))
        assert outcome(write(""), f"--{name}", value) == in_file
        assert outcome(write(""), f"--{name}={value}") == in_file
    assert outcome(write(""), f"--{name}") == outcome(write(f"{name}: true\n"))
    path = write("")
    assert outcome(None, f"--{name}", path) == outcome(write(f"{name}: true\n")), "the file after a bare switch is the file"


@pytest.mark.parametrize(("name", "value"), [("logging_dir", "x"), ("evaluation_strategy", "no"), ("torch_dtype", "bfloat16")])
def test_older_names_with_a_value(name: str, value: str, write) -> None:
    in_file = outcome(write(f"{name}: {value}\n"))
    assert isinstance(in_file, dict), in_file
    assert outcome(write(""), f"--{name}", value) == in_file


@pytest.mark.parametrize("key", SWITCHES)
def test_a_switch_is_turned_off_by_no(key: str, write) -> None:
    expected = outcome(write(f"{key}: false\n"))
    assert outcome(write(""), f"--no_{key}") == expected
    assert outcome(write(""), f"--no-{key.replace('_', '-')}") == expected


def test_no_before_what_is_no_switch_is_unknown(write) -> None:
    assert "unknown key 'no_learning_rate'" in problems_of(write(""), "--no_learning_rate")


@pytest.mark.parametrize("key", ["output_dir", "model_name_or_path", "dataset_name", "eval_dataset_name", "resume_from_checkpoint"])
@pytest.mark.parametrize("text", ["${SCRATCH}/run", "$HOME/run", "%TEMP%/run"])
def test_a_variable_in_a_place_is_refused(key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = {"model_name_or_path": "some/model", "dataset_name": "rows.jsonl", key: text}
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: '{value}'\n" for name, value in lines.items()))
    told = problems_of(str(path))
    assert f": {key}: found '{text}'" in told
    assert f'--{key} "{text}"' in told
    (tmp_path / text).mkdir(parents=True)  # whoever has such a folder means it
    if key == "output_dir":
        assert resolve(path)["output_dir"] == text


def test_a_variable_inside_a_list_and_none_in_a_template(write) -> None:
    assert "found '${DATA}/a.jsonl'" in problems_of(write("eval_dataset_name: [b.jsonl, {path: '${DATA}/a.jsonl'}]\n"))
    assert resolve(write("chat_template: '{{ messages[0].content }} ${PRICE}'\n"))


@pytest.mark.parametrize(
    ("text", "keys", "switch"),
    [
        ("lora_r: 8\n", "lora_r has no effect", "use_peft: true"),
        ("lora_r: 8\nlora_alpha: 16\nlora_dropout: 0.1\n", "lora_r, lora_alpha, lora_dropout have no effect", "use_peft: true"),
        ("use_dora: true\n", "use_dora has no effect", "use_peft: true"),
        ("bnb_4bit_quant_type: fp4\n", "bnb_4bit_quant_type has no effect", "load_in_4bit: true"),
        ("max_nonfinite_skips: 5\n", "max_nonfinite_skips has no effect", "on_nonfinite: skip"),
        ("eval_steps: 5\n", "eval_steps has no effect", "eval_strategy: steps"),
        ("save_steps: 5\nsave_strategy: epoch\n", "save_steps has no effect", "save_strategy: steps"),
        ("early_stopping_threshold: 0.1\n", "early_stopping_threshold has no effect", "early_stopping_patience"),
    ],
)
def test_an_option_whose_switch_is_off_is_told(text: str, keys: str, switch: str, write) -> None:
    notes = resolve(write(text)).notes
    assert any(keys in note and switch in note for note in notes), notes


@pytest.mark.parametrize(
    "text", ["", "use_peft: true\nlora_r: 8\n", "use_dora: false\n", "load_in_4bit: true\nlora_r: 8\n", "save_steps: 5\n"]
)
def test_and_nothing_is_told_where_all_has_effect(text: str, write) -> None:
    assert not [note for note in resolve(write(text)).notes if "no effect" in note]


@pytest.mark.parametrize("key", ["do_train", "do_eval", "do_predict", "objective_options"])
def test_what_only_scripts_set_is_told_as_that(key: str, write) -> None:
    for told in (problems_of(write(f"{key}: true\n")), problems_of(write(""), f"--{key}", "true")):
        assert f"{key} is no key of a run" in told
        assert "leave it out" in told
        assert "did you mean" not in told


def test_places_name_the_flag_as_it_was_typed(write) -> None:
    assert "--learning-rate: found" in problems_of(write(""), "--learning-rate", "fast")
    assert "- --learning-rate: found -1" in problems_of(write(""), "--learning-rate", "-1")
    assert "--beta: orpo_alpha: found -1" in problems_of(write(""), "--beta", "-1")


def test_every_kind_was_found() -> None:
    """The lists above are read from the types: an empty one would test nothing."""
    assert {"use_peft", "strict_data"} <= set(SWITCHES)
    assert {"max_length", "bf16"} <= set(MAY_BE_NOTHING)
    assert {"lora_modules_to_save", "plugins"} <= set(LISTS_OF_TEXTS)


IDLE = {
    "adam_beta1: 0.8\noptim: sgd": "adam_beta1 has no effect with optim: sgd",
    "optim_target_modules: all-linear": "optim_target_modules has no effect",
    "gradient_checkpointing_kwargs: {use_reentrant: false}": "gradient_checkpointing_kwargs has no effect without",
    "lora_init: pissa": "lora_init has no effect without",
    "hub_model_id: me/mine": "hub_model_id has no effect without `push_to_hub: true`",
    "metric_for_best_model: loss": "metric_for_best_model has no effect without rows to evaluate on",
    "lr_scheduler_type: constant\nwarmup_steps: 10": "warmup_steps has no effect with that lr_scheduler_type",
    "accelerator_config: {split_batches: true}": "accelerator_config has no effect",
    "label_names: [labels]": "label_names has no effect",
    "include_for_metrics: [loss]": "include_for_metrics has no effect",
    "ddp_timeout: 60": "ddp_timeout has no effect without several processes",
    "save_on_each_node: true": "save_on_each_node has no effect without several processes",
    "run_name: mine": "run_name has no effect without a tracker",
    "disable_tqdm: true": "disable_tqdm has no effect on a command",
    "model_init_kwargs: {attn_implementation: eager}": "attn_implementation has no effect on the shared engine",
}


@pytest.mark.filterwarnings("error:.*has no effect")
@pytest.mark.parametrize("text", IDLE)
def test_an_option_that_does_nothing_is_told_once(text: str, write) -> None:
    config = resolve(write(f"{text}\n"))
    assert sum(IDLE[text] in note for note in config.notes) == 1
    config.training_args()


@pytest.mark.parametrize("text", ["", "adam_beta1: 0.8\n", "lr_scheduler_type: constant_with_warmup\nwarmup_steps: 10\n"])
def test_options_with_an_effect_are_not(text: str, write) -> None:
    assert resolve(write(text)).notes == ()


def test_options_of_the_hub_on_files_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    given = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path", str(tmp_path / "model")]
    notes = resolve(None, [*given, "--dataset_config", "default", "--model_revision", "abc"]).notes
    assert [note.partition(" has")[0] for note in notes] == ["model_revision", "dataset_config"]
    (tmp_path / "model" / "adapter_config.json").write_text("{}")  # whose base may be the hub's
    assert resolve(None, [*given, "--model_revision", "abc"]).notes == ()


CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
"""The second is a key of newer versions of transformers alone, where it goes before the first."""


@pytest.mark.parametrize("key", [key for key in CHECKPOINTING if key in key_types()])
def test_settings_of_checkpointing_that_nobody_knows(key: str, write) -> None:
    assert f"{key}: unknown setting 'use_reentrnat'" in problems_of(write(f"gradient_checkpointing: true\n{key}: {{use_reentrnat: 1}}\n"))
    assert "did you mean 'use_reentrant'?" in problems_of(None, f"--{key}", "use_reentrnat=true", "--gradient_checkpointing")
    resolve(write(f"gradient_checkpointing: true\n{key}: {{use_reentrant: false}}\n"))


@pytest.mark.skipif("activation_checkpointing_kwargs" in key_types(), reason="this version of transformers has the newer name")
def test_a_newer_name_for_checkpointing_is_led_to_the_one_that_is_here(write) -> None:
    told = problems_of(write("gradient_checkpointing: true\nactivation_checkpointing_kwargs: {use_reentrant: false}\n"))
    assert "did you mean 'gradient_checkpointing_kwargs'" in told


def test_a_backend_that_this_machine_has_no_use_for_is_named_with_one_process_too(write) -> None:
    with pytest.raises(UserError, match="ddp_backend: found 'nccl', and there is no accelerator"):
        resolve(write("ddp_backend: nccl\nuse_cpu: true\n")).training_args()
