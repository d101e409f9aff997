"""The same command tomorrow: a finished run that is to have more steps, a checkpoint of another trainer, another version."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo.checkpoint import Manifest, read_manifest
from orpo.cli import main
from orpo.run.folder import COMPLETE, RunFolder

CLOCK = ("time", "runtime", "per_second")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("same")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(folder / "tiny"), "dataset_name": str(folder / "rows.jsonl"), "per_device_train_batch_size": 4,
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "use_cpu": True,
        "bf16": False, "report_to": "none",
    }  # fmt: skip


class Command:
    """`orpo train` with options that may change from start to start."""

    def __init__(self, folder: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        self.run = folder / "run"
        self.options = {**options, "output_dir": str(self.run)}
        self._config, self._capsys = folder / "run.yaml", capsys
        self.text = ""

    def __call__(self, **change: Any) -> int:
        """The exit code; what was said is in `text`, in one line."""
        self._config.write_text(yaml.safe_dump({**self.options, **change}))
        self._capsys.readouterr()
        code = main(["train", str(self._config)])
        self.text = " ".join(self._capsys.readouterr().err.split())
        return code

    @property
    def weights(self) -> bytes:
        return (self.run / "model" / "model.safetensors").read_bytes()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in lines if "train_loss" not in line]


@pytest.fixture
def command(tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, options, capsys)


def advised(text: str) -> str:
    """The model that a message advises to start from."""
    found = re.search(r"model_name_or_path: ([^ ,]+)", text)
    assert found is not None, text
    return found[1]


# --- the date


def to_the_second(folder: Path) -> str:
    """A template under which the same rows are others a second later, unless the date of the first start is kept."""
    head = "<|im_start|>{{ m.role }} {{ strftime_now('%H:%M:%S') }}\n{{ m.content }}<|im_end|>\n"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant {{ strftime_now('%H:%M:%S') }}\n{% endif %}"
    (folder / "clock.jinja").write_text("{% for m in messages %}" + head + "{% endfor %}" + asks)
    return str(folder / "clock.jinja")


def next_second() -> None:
    begun = datetime.now().replace(microsecond=0)
    while datetime.now().replace(microsecond=0) == begun:
        time.sleep(0.05)


def fingerprint(run: Path) -> Any:
    data = (RunFolder(run).read() or {})["data"]
    return data["template"]["date"], data["fingerprint"]


def test_a_run_that_goes_on_prints_the_date_of_its_first_start(command: Command, tmp_path: Path) -> None:
    given = {"chat_template": to_the_second(tmp_path)}
    assert command(**given) == 0, command.text
    before = fingerprint(command.run)
    next_second()
    assert command(max_steps=8, **given) == 0, command.text
    assert "resuming from" in command.text
    assert "the chat template's today is" in command.text
    assert fingerprint(command.run) == before


@pytest.mark.slow
def test_a_run_that_was_stopped_prints_it_too(command: Command, tmp_path: Path) -> None:
    given = {"chat_template": to_the_second(tmp_path), "max_steps": 100_000, "save_steps": 100_000}
    words = [word for key, value in {**command.options, **given}.items() for word in (f"--{key}", str(value))]
    with subprocess.Popen([sys.executable, "-m", "orpo", "train", *words], stderr=subprocess.DEVNULL) as process:
        while not (command.run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    before, step = fingerprint(command.run), (RunFolder(command.run).read() or {})["last_step"]
    next_second()
    assert command(**given | {"max_steps": step + 1}) == 0, command.text
    assert "resuming from" in command.text
    assert fingerprint(command.run) == before


# --- more steps


@pytest.mark.parametrize(
    "schedule",
    [{"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}],
    ids=["constant", "with warm-up"],
)
def test_a_finished_run_goes_on_as_if_it_had_been_longer(
    schedule: dict[str, Any], command: Command, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    whole = Command(tmp_path / "whole", options, capsys)
    assert whole(max_steps=8, **schedule) == 0
    assert command(**schedule) == 0
    short = command.weights
    assert command(max_steps=8, **schedule) == 0, command.text
    assert "resuming from" in command.text
    assert command.weights == whole.weights != short
    assert command.metrics == whole.metrics
    facts = RunFolder(command.run).read() or {}
    assert (facts["status"], facts["last_step"], facts["num_steps"]) == (COMPLETE, 8, 8)
    assert command(max_steps=8, **schedule) == 0
    assert "complete" in command.text


def test_epochs_are_steps_too(command: Command) -> None:
    assert command(max_steps=-1, num_train_epochs=1) == 0
    assert command(max_steps=-1, num_train_epochs=2) == 0, command.text
    assert (RunFolder(command.run).read() or {})["last_step"] == 10


@pytest.mark.parametrize(
    "schedule",
    [{"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}],
    ids=["cosine", "linear", "warm-up by share"],
)
def test_where_the_schedule_depends_on_the_number_of_steps_a_second_run_is_advised_and_the_advice_works(
    schedule: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    assert command(**schedule) == 0
    assert command(max_steps=8, **schedule) == 2
    assert "started for 4 steps, and 8 are wanted now" in command.text
    assert f"lr_scheduler_type: {schedule['lr_scheduler_type']}" in command.text
    assert ("warmup_steps: 0.5 of all steps" in command.text) == ("warmup_steps" in schedule)
    assert RunFolder(command.run).status == COMPLETE
    model = advised(command.text)
    assert command(model_name_or_path=model, output_dir=str(tmp_path / "second"), max_steps=2) == 0, command.text
    assert command(max_steps=8, allow_changed_resume=True, **schedule) == 0, command.text
    assert "resuming although the run was started for 4 steps" in command.text
    assert (RunFolder(command.run).read() or {})["last_step"] == 8


def test_a_finished_run_that_kept_no_checkpoint(command: Command) -> None:
    assert command(save_strategy="no") == 0
    assert command(save_strategy="no", max_steps=8) == 2
    assert "no checkpoint to go on from" in command.text
    assert Path(advised(command.text)) == command.run / "model"


def test_fewer_steps_and_other_changes_are_refused(command: Command) -> None:
    assert command() == 0
    assert command(max_steps=2) == 2
    assert "4 steps are done, and 2 are wanted" in command.text
    assert command(max_steps=8, learning_rate=1e-4) == 2
    assert "holds a finished run of another configuration: learning_rate: 0.001 -> 0.0001" in command.text
    assert command(allow_changed_resume=True) == 0, command.text  # which alone is no change


# --- checkpoints of others


def foreign(folder: Path, *, is_adapter: bool, model: str) -> Path:
    """A checkpoint as transformers' own Trainer writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    if is_adapter:
        loaded = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
    args = TrainingArguments(output_dir=str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    Trainer(loaded, args, train_dataset=rows, processing_class=tokenizer).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_checkpoint_of_another_trainer_gives_its_weights(
    is_adapter: bool, command: Command, tmp_path: Path, options: dict[str, Any]
) -> None:
    checkpoint = foreign(tmp_path / "theirs", is_adapter=is_adapter, model=options["model_name_or_path"])
    assert command(resume_from_checkpoint=str(checkpoint), use_peft=is_adapter) == 2
    assert "a checkpoint of another trainer (transformers, TRL)" in command.text
    assert ("use_peft: false" in command.text) == is_adapter
    assert not command.run.exists()
    assert command(model_name_or_path=advised(command.text)) == 0, command.text
    assert (command.run / ("adapter" if is_adapter else "model")).is_dir()


def test_what_else_may_stand_where_a_checkpoint_is_wanted(command: Command, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each message names something that can be done; a folder that can be resumed is named by its path."""
    assert command() == 0
    second = {"output_dir": str(tmp_path / "second"), "max_steps": 5}
    for wanted, message in {
        str(command.run): "is a run's folder, not a checkpoint",
        str(command.run / "checkpoint-3"): "there is no such folder",
        str(command.run / "model"): "is weights alone",
        str(tmp_path): "is not a checkpoint",
    }.items():
        assert command(resume_from_checkpoint=wanted, **second) == 2
        assert message in command.text
        if "folder" in message:
            assert f"resume_from_checkpoint: {command.run / 'checkpoint-4'}" in command.text
    assert not (tmp_path / "second").exists()
    assert command(resume_from_checkpoint=str(command.run / "checkpoint-4"), **second) == 0, command.text
    assert (RunFolder(tmp_path / "second").read() or {})["last_step"] == 5


def test_going_on_from_a_named_checkpoint_sets_the_later_ones_aside(command: Command) -> None:
    """Or the next start would take one of them, whose lines of metrics.jsonl are gone."""
    assert command() == 0
    weights, metrics = command.weights, command.metrics
    assert command(max_steps=6, resume_from_checkpoint=str(command.run / "checkpoint-2")) == 0, command.text
    assert "checkpoints after step 2 are moved to" in command.text
    assert [path.name for path in (command.run / "earlier-1").iterdir()] == ["checkpoint-4"]
    assert [line["step"] for line in command.metrics] == [1, 2, 3, 4, 5, 6]
    assert command.metrics[:4] == metrics
    assert command.weights != weights
    assert command(max_steps=8, lr_scheduler_type="cosine", resume_from_checkpoint=str(command.run / "checkpoint-4")) == 2
    assert (command.run / "checkpoint-6").is_dir()  # what is refused moves nothing
    assert not (command.run / "earlier-2").exists()


# --- other versions


def rewritten(checkpoint: Path, *, versions: dict[str, str], changed: dict[str, Any], without: str | None = None) -> None:
    """The checkpoint as another version would have written it."""
    manifest = read_manifest(checkpoint)
    config = {key: value for key, value in {**manifest.facts["config"], **changed}.items() if key != without}
    facts = {**manifest.facts, "config": config}
    data = Manifest(manifest.step, manifest.world_size, manifest.files, facts, {**manifest.versions, **versions}).to_bytes()
    (checkpoint / "manifest.json").write_bytes(data)


def test_other_versions_are_named_and_what_only_one_of_them_knows_is_no_difference(command: Command) -> None:
    assert command() == 0
    rewritten(command.run / "checkpoint-4", versions={"transformers": "5.16.0"}, changed={"gone_since": 3}, without="logits_budget_mb")
    assert command(max_steps=5) == 0, command.text
    assert "written with other versions, so results may differ: transformers 5.16.0 (now " in command.text
    assert "options of the checkpoint that this version does not have: gone_since" in command.text


def test_a_refusal_says_the_versions_too(command: Command) -> None:
    assert command() == 0
    rewritten(command.run / "checkpoint-4", versions={"torch": "2.0.0"}, changed={"weight_decay": 0.5})
    assert command(max_steps=5) == 2
    assert "config.weight_decay: 0.5 -> 0.0 versions: torch 2.0.0 (now " in command.text


@pytest.mark.parametrize(("option", "value", "shown"), [("learning_rate", 1e-3, "0.001"), ("disable_dropout", False, "false")])
def test_a_new_option_that_is_not_at_its_default_is_a_difference(option: str, value: Any, shown: str, command: Command) -> None:
    change = {option: value}
    assert command(**change) == 0
    rewritten(command.run / "checkpoint-4", versions={}, changed={}, without=option)
    assert command(max_steps=5, **change) == 2
    assert f"config.{option}: (absent) -> {shown}" in command.text
