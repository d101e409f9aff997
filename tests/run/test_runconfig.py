"""YAML and flags become one configuration: order, origins, types, and every problem with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo.config.values import NotAcceptedError, from_flag, from_yaml
from orpo.data.reading.sources import DEMO_DATA
from orpo.errors import UserError, UserErrors
from orpo.run.config import RunConfig, as_facts, resolve
from orpo.run.data import open_run_rows
from orpo.run.keys import key_defaults, key_types
from orpo.run.read import read_flags

MINIMAL = "model_name_or_path: some/model\ndataset_name: rows.jsonl\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def problems_of(path: Path | None, *flags: str) -> str:
    with pytest.raises(UserErrors) as caught:
        resolve(path, flags)
    return str(caught.value)


class TestOrder:
    def test_default_file_flag(self, write) -> None:
        path = write(MINIMAL + "learning_rate: 0.001\nseed: 7\n")
        config = resolve(path, ["--learning_rate", "0.002"])
        assert (config["learning_rate"], config.origins["learning_rate"]) == (0.002, "--learning_rate")
        assert (config["seed"], config.origins["seed"]) == (7, f"{path}:4")
        assert (config["orpo_alpha"], config.origins["orpo_alpha"]) == (0.1, "default")

    def test_a_flag_overrides_the_file_under_another_name(self, write) -> None:
        config = resolve(write(MINIMAL + "beta: 0.3\n"), ["--orpo_alpha", "0.5"])
        assert (config["orpo_alpha"], config.origins["orpo_alpha"]) == (0.5, "--orpo_alpha")
        assert resolve(write(MINIMAL + "orpo_alpha: 0.3\n"), ["--beta", "0.5"])["orpo_alpha"] == 0.5

    def test_two_names_in_one_file_must_agree(self, write) -> None:
        assert "run.yaml:3: beta: found 0.3, while orpo_alpha is 0.2" in problems_of(write(MINIMAL + "beta: 0.3\norpo_alpha: 0.2\n"))

    def test_flags_alone(self) -> None:
        config = resolve(None, ["--model_name_or_path=m", "--dataset-name", "a.jsonl", "b.jsonl", "--use_peft", "--max_steps", "-1"])
        assert config["dataset_name"] == ["a.jsonl", "b.jsonl"]
        assert config["use_peft"] is True
        assert config["max_steps"] == -1

    def test_the_file_may_stand_anywhere_among_the_flags(self, write) -> None:
        path = str(write(MINIMAL))
        for flags in (
            [path, "--use_peft"],
            ["--use_peft", path],
            ["--seed", "3", path],
            ["--lora_target_modules", "q_proj", "v_proj", path],
        ):
            assert resolve(None, flags).config_file == path
        assert resolve(None, ["--lora_target_modules", "q_proj", "v_proj", path])["lora_target_modules"] == ["q_proj", "v_proj"]


class TestTypes:
    def test_yaml_reads_some_numbers_as_text(self, write) -> None:
        config = resolve(write(MINIMAL + "learning_rate: 1e-5\nweight_decay: 1E-2\nmax_steps: 1e3\nadam_epsilon: 1e-8\n"))
        assert (config["learning_rate"], config["weight_decay"], config["max_steps"]) == (1e-5, 1e-2, 1000)
        assert isinstance(config["max_steps"], int)

    def test_yaml_reads_no_as_false(self, write) -> None:
        assert resolve(write(MINIMAL + "save_strategy: no\neval_strategy: off\n"))["save_strategy"] == "no"

    def test_a_name_that_looks_like_a_number_stays_text_on_the_command_line(self, write) -> None:
        assert resolve(write(MINIMAL), ["--run_name", "123"])["run_name"] == "123"

    def test_variables_are_not_expanded(self, write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WHERE", "/elsewhere")
        assert resolve(write(MINIMAL + "run_name: ${WHERE}/x\n"))["run_name"] == "${WHERE}/x"

    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("learning_rate", "1e-5", 1e-5),
            ("max_steps", "1_000", 1000),
            ("use_peft", "false", False),
            ("use_peft", "YES", True),
            ("bf16", "none", None),
            ("eval_fraction", "0.1", 0.1),
            ("model_init_kwargs", "{use_cache: false}", {"use_cache": False}),
            ("column_map", '{"prompt": "question"}', {"prompt": "question"}),
            ("lora_modules_to_save", "a, b", ["a", "b"]),
            ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
            ("chat_template", "none", None),
            ("report_to", "none", None),
            ("output_dir", "1", "1"),
            ("fsdp", "full_shard auto_wrap", "full_shard auto_wrap"),
            ("fsdp", "true", True),
        ],
    )
    def test_flag_texts(self, key: str, text: str, value: object) -> None:
        assert from_flag(key_types()[key], text) == value

    @pytest.mark.parametrize("word", ["--fsdp", "--use_peft", "--resume_from_checkpoint"])
    def test_a_switch_may_stand_alone(self, word: str) -> None:
        """Also one that takes words, as transformers' `--fsdp` does."""
        problems: list[UserError] = []
        given_flags, _ = read_flags([word, "--max_steps", "2"], problems)
        assert not problems
        assert given_flags[word[2:]].value is True

    @pytest.mark.parametrize(("key", "text"), [("learning_rate", "fast"), ("max_steps", "1.5"), ("use_peft", "maybe"), ("engine", "quick")])
    def test_flag_texts_that_do_not_fit(self, key: str, text: str) -> None:
        with pytest.raises(NotAcceptedError):
            from_flag(key_types()[key], text)

    @given(st.floats(allow_nan=False) | st.integers(-(2**60), 2**60))
    def test_numbers_survive_the_command_line(self, number: float) -> None:
        assert from_flag(float, repr(number)) == number

    @given(st.sampled_from(sorted(key_types())), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4))
    def test_a_value_fits_or_is_refused(self, key: str, value: object) -> None:
        hint = key_types()[key]
        try:
            fitted = from_yaml(hint, value)
        except NotAcceptedError:
            return
        assert from_yaml(hint, fitted) == fitted or fitted != fitted, "fitting a fitted value must change nothing"


def test_all_problems_with_their_places(write) -> None:
    text = problems_of(
        write(
            "model_name: m\n"
            "dataset_nam: rows.jsonl\n"
            "learning_rate: fast\n"
            "lora_r: [1]\n"
            "orpo_beta: -1\n"
            "lr: 1e-5\n"
            "tokenizer: m\n"
            "seed: 1\n"
            "seed: 2\n"
            "eval_strategy: steps\n"
        ),
        "--max_stps",
        "3",
        "--engine=quick",
    )
    for part in (
        "run.yaml:2: unknown key 'dataset_nam'\n  to mend it: did you mean 'dataset_name'",
        "run.yaml:3: learning_rate: found the text 'fast'\n  expected: a number",
        "run.yaml:4: lora_r: found a list of 1",
        "run.yaml:5: orpo_beta: found -1",
        "run.yaml:6: unknown key 'lr'\n  to mend it: did you mean 'learning_rate'?",
        "run.yaml:7: unknown key 'tokenizer'",
        "run.yaml:9: seed is given twice, first in line 8",
        "run.yaml:10: eval_strategy: found 'steps', but there is nothing to evaluate on",
        "--max_stps: unknown key 'max_stps'\n  to mend it: did you mean 'max_steps'",
        "--engine: found the text 'quick'",
    ):
        assert part in text
    assert "has 10 problems" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "not a mapping"),
        ("a: b: c\n", "run.yaml:1:5: not valid YAML"),
        ("seed: [1\n", "run.yaml:2:1: not valid YAML"),
        ("seed: !!python/object/apply:os.system ['touch pwned']\n", "never executed"),
        ("3: 4\n", "run.yaml:1: the key is the number 3"),
        ("model:\n  name: x\n", "unknown key 'model'"),
        (
            "a: &a [" + "1," * 50 + "]\nb: &b [" + "*a," * 50 + "]\nc: &c [" + "*b," * 50 + "]\nd: [" + "*c," * 50 + "]\n",
            "more than 20000 values",
        ),
        ("a: &a [*a]\n", "run.yaml"),
        ("seed: " + "[" * 3000, "run.yaml"),
    ],
)
def test_files_that_are_no_configuration(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in problems_of(write(text))
    assert not Path("pwned").exists()


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_bytes(b"a: \xff\n")
    assert "there is demo.yaml" in problems_of(tmp_path / "dmo.yaml")
    assert "demo.yaml:1: is not UTF-8" in problems_of(tmp_path / "demo.yaml")
    assert "one configuration file" in problems_of(tmp_path / "demo.yaml", "second.yaml")


def test_missing_model_and_data() -> None:
    text = problems_of(None)
    assert "model_name_or_path: is missing" in text
    assert "dataset_name: is missing" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval_fraction: 1.5", "eval_fraction: found 1.5"),
        ("eval_fraction: 0.1\ndataset_test_split: test", "is given together with dataset_test_split"),
        ("load_in_4bit: true\nload_in_8bit: true", "is given together with load_in_8bit"),
        ("lora_r: 0", "lora_r: found 0"),
        ("lora_dropout: 1.0", "lora_dropout: found 1.0"),
        ("lora_task_type: SEQ_CLS", "only causal language models"),
        ("datasets: [{path: a, data_dir: b}]", "data_dir is not supported"),
    ],
)
def test_checks_of_a_run_s_own_keys(write, line: str, message: str) -> None:
    assert message in problems_of(write(MINIMAL.replace("dataset_name: rows.jsonl\n", "") + line + "\n", "run.yaml"), *_dataset(line))


def _dataset(line: str) -> list[str]:
    return [] if line.startswith("datasets") else ["--dataset_name", "rows.jsonl"]


class TestMeaning:
    def test_training_args(self, write, tmp_path: Path) -> None:
        path = write(MINIMAL + f"orpo_alpha: 0.5\nwarmup_ratio: 0.2\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n")
        args = resolve(path).training_args()
        assert (args.orpo_alpha, args.warmup_steps, args.output_dir) == (0.5, 0.2, str(tmp_path / "out"))

    def test_the_same_configuration_means_the_same_folder(self, write) -> None:
        first, again = resolve(write(MINIMAL)), resolve(write(MINIMAL))
        assert first.output_dir == again.output_dir
        assert first.output_dir != resolve(write(MINIMAL), ["--seed", "3"]).output_dir
        assert Path(first.output_dir).parent == Path("runs")
        assert Path(resolve(write(MINIMAL, "a b;rm.yaml")).output_dir).name.startswith("a-b-rm-")

    def test_peft(self, write) -> None:
        assert resolve(write(MINIMAL)).peft_config() is None
        config = resolve(write(MINIMAL + "load_in_4bit: true\nlora_r: 4\nlora_target_modules: q_proj\nuse_dora: true\n"))
        lora = config.peft_config()
        assert (lora.r, lora.target_modules, lora.use_dora, lora.lora_dropout) == (4, {"q_proj"}, True, 0.0)

    def test_sources(self, write) -> None:
        assert resolve(write(MINIMAL)).train_source() == "rows.jsonl"
        assert resolve(write(MINIMAL)).eval_source() is None
        assert resolve(write(MINIMAL + "dataset_test_split: test\n")).eval_source() == ("rows.jsonl", "test")
        assert resolve(write(MINIMAL + "eval_dataset_name: held.jsonl\n")).eval_source() == ("held.jsonl", None)
        assert resolve(write(MINIMAL + "dataset_config: en\n")).train_source() == [{"path": "rows.jsonl", "name": "en"}]
        sources = "- path: a\n  split: x\n  fraction: 0.5\n- path: json\n  data_files: b.jsonl\n  fraction: 0.5\n"
        trl = f"model_name_or_path: m\ndatasets:\n{sources}"
        assert resolve(write(trl)).train_source() == [{"path": "a", "split": "x", "weight": 0.5}, {"path": "b.jsonl", "weight": 0.5}]

    def test_the_packaged_data(self, write) -> None:
        config = resolve(write(f"model_name_or_path: m\ndataset_name: {DEMO_DATA}\ndataset_test_split: test\n"))
        assert (config.train_source(), config.eval_source()) == (DEMO_DATA, (DEMO_DATA, "test"))
        elsewhere = resolve(write(MINIMAL + f"eval_dataset_name: [{DEMO_DATA}, held.jsonl]\n"))
        assert elsewhere.eval_source() == ([{"path": DEMO_DATA, "split": "test"}, "held.jsonl"], None)
        alone = resolve(write(f"model_name_or_path: m\ndataset_name: {DEMO_DATA}\neval_dataset_name: {DEMO_DATA}\n"))
        rows = open_run_rows(alone)
        assert rows.held_out is not None
        assert [Path(next(some).where.file).name for some in (rows.train, rows.held_out)] == ["train.jsonl", "test.jsonl"]

    def test_notes_on_options_without_effect(self, write) -> None:
        config = resolve(write(MINIMAL + "attn_implementation: flash_attention_2\nlogging_dir: logs\n"))
        assert [note.split(" ")[0] for note in config.notes] == ["logging_dir", "attn_implementation"]
        assert resolve(write(MINIMAL)).notes == ()

    def test_facts_are_json_with_origins(self, write) -> None:
        facts = as_facts(resolve(write(MINIMAL + "seed: 3\n")))
        assert json.loads(json.dumps(facts))["seed"] == {"value": 3, "origin": facts["seed"]["origin"]}
        assert set(facts) == set(key_defaults())


def test_a_secret_in_the_wrong_place_is_not_repeated(write) -> None:
    secret = "hf_" + "a" * 30
    text = problems_of(write(MINIMAL + f"hub_token: [{secret}]\n"))
    assert "hub_token" in text
    assert secret not in text


def test_a_resolved_run_is_a_value(write) -> None:
    config = resolve(write(MINIMAL))
    assert isinstance(config, RunConfig)
    assert config.is_given("dataset_name")
    assert not config.is_given("seed")


@pytest.mark.parametrize(
    ("rate", "optimizer", "is_told"),
    [
        (5.0, "adamw_torch", True),
        (0.02, "adamw_torch", True),
        (0.01, "adamw_torch", False),
        (8e-6, "adamw_torch", False),
        (0.1, "sgd", False),
    ],
)
def test_a_learning_rate_that_destroys_the_weights_is_told_beforehand(rate: float, optimizer: str, is_told: bool) -> None:
    notes = resolve(None, ["--model_name_or_path", "m", "--dataset_name", "d", "--learning_rate", str(rate), "--optim", optimizer]).notes
    assert any(note.startswith(f"learning_rate {rate:g} is far above") for note in notes) == is_told


@pytest.mark.parametrize("text", ["\tlearning_rate: 1e-5\n", "learning_rate:\t1e-5\n\tseed: 3\n", "column_map:\n\tprompt: question\n"])
def test_a_tab_in_yaml_is_called_one(text: str, write) -> None:
    told = problems_of(write(MINIMAL + text))
    assert "tab" in told
    assert "spaces" in told
    assert "quotes" not in told
