"""The whole command under faults: no memory in mid-run, kills and power cuts at its end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults import jobs
from faults.forked import Zygote
from orpo.checkpoint import find_newest, read_manifest
from orpo.run.folder import COMPLETE, FAILED, RUNNING, RunFolder

JOB = "faults.commandjobs:train"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("command")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(folder / "tiny"), "dataset_name": str(folder / "rows.jsonl"), "per_device_train_batch_size": 4,
        "max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_fraction": 0.25, "use_cpu": True, "bf16": False, "report_to": "none",
    }  # fmt: skip


class Command:
    """`orpo train` on one configuration, run again and again."""

    def __init__(self, forks: Zygote, folder: Path, options: dict[str, Any]) -> None:
        self._forks = forks
        self.run, self.log = folder / "run", folder / "log"
        self._config = folder / "run.yaml"
        self._config.write_text(yaml.safe_dump({**options, "output_dir": str(self.run)}))

    def __call__(self, **arguments: Any) -> int:
        self.log.unlink(missing_ok=True)
        return self._forks.run(JOB, self.log, config=str(self._config), **arguments)

    @property
    def status(self) -> str | None:
        return RunFolder(self.run).status

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Without what the clock says, and without the summary of the process."""
        return [line for line in jobs.metrics(self.run) if "train_loss" not in line]

    @property
    def weights(self) -> bytes:
        return (self.run / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def command(forks: Zygote, options: dict[str, Any], tmp_path: Path) -> Command:
    return Command(forks, tmp_path, options)


@pytest.fixture(scope="module")
def uninterrupted(forks: Zygote, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Command:
    command = Command(forks, tmp_path_factory.mktemp("whole"), options)
    assert command() == 0, command.log.read_text()
    return command


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by what /proc says")
def test_out_of_memory_in_mid_run_is_advice_with_figures_and_tears_nothing(command: Command, uninterrupted: Command) -> None:
    assert command(out_of_memory_at=4) == 2, command.log.read_text()
    text = command.log.read_text()
    assert re.search(r"out of memory: this process has held \d+\.\d\d of \d+\.\d GiB; .*1073741824 bytes", text), text
    assert "max_tokens_per_microbatch: " in text
    assert "Traceback" not in text
    assert command.status == FAILED
    newest = find_newest(command.run)
    assert newest is not None
    assert read_manifest(newest).step == 2
    assert command() == 0, command.log.read_text()
    assert command.weights == uninterrupted.weights


@pytest.mark.parametrize("kill", ["name", "complete"])
def test_kill_while_a_run_ends(kill: str, command: Command, uninterrupted: Command) -> None:
    """The final weights are whole or not there, and a run is complete only when they are."""
    assert command(kill=kill) == -signal.SIGKILL
    assert command.status == RUNNING
    assert (command.run / "model").exists() == (kill == "complete")
    assert command() == 0, command.log.read_text()
    assert command.status == COMPLETE
    assert command.weights == uninterrupted.weights
    assert [path.name for path in command.run.iterdir() if path.name.startswith(".")] == [".lock"]
    assert command.metrics == uninterrupted.metrics


def test_kill_between_the_two_renames_of_a_step_that_is_saved_again(
    forks: Zygote, options: dict[str, Any], uninterrupted: Command, tmp_path: Path
) -> None:
    """A step is saved again where a signal cuts the evaluation short that an earlier signal had put off."""
    command = Command(forks, tmp_path, {**options, "eval_strategy": "steps", "eval_steps": 2})
    assert command(signal_in="step") == 128 + signal.SIGTERM, command.log.read_text()
    assert command(signal_in="evaluation", kill="replaced") == -signal.SIGKILL, command.log.read_text()
    left = sorted(path.name.rpartition("-")[0] or path.name for path in command.run.iterdir() if "checkpoint-4" in path.name)
    assert left == [".replaced-checkpoint-4", ".staging-checkpoint-4"]
    assert command() == 0, command.log.read_text()
    assert f"from {command.run / 'checkpoint-4'}" in " ".join(command.log.read_text().split())
    assert command.weights == uninterrupted.weights
    assert [line["step"] for line in command.metrics if "eval_loss" in line] == [2, 4, 6]


def test_a_second_start_is_refused_until_the_run_is_complete(command: Command, uninterrupted: Command) -> None:
    """Also in the final evaluation, when the training itself is over."""
    assert command(second_start=True) == 0, command.log.read_text()
    text = command.log.read_text()
    assert "second start: 2" in text
    assert re.search(r"another run is using\s+this\s+folder\s+.process\s+\d+\s+on", text), text
    assert command.status == COMPLETE
    assert len((RunFolder(command.run).read() or {})["starts"]) == 1
    assert command.metrics == uninterrupted.metrics


def test_final_weights_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_factory: Any, tiny_tokenizer: Any
) -> None:
    """Or a power cut could leave a run that is called complete with empty weights."""
    from orpo.models.export import export_merged

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which file a descriptor belongs to is told by /proc")
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        events.append(("rename", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    target = export_merged(tiny_model_factory("llama"), tiny_tokenizer, tmp_path / "model")
    (at,) = (number for number, (kind, _) in enumerate(events) if kind == "rename")
    staging = events[at][1]
    files = {f"{staging}/{path.name}" for path in target.iterdir()}
    assert len(files) > 4
    assert files | {staging} <= {place for _, place in events[:at]}
    assert ("sync", str(tmp_path)) in events[at:]
