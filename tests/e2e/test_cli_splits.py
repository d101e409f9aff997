"""Every command refuses a split that is not there, and takes slices, whatever the rows lie in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from orpo.cli import main

WRONG = ("validation", "TRAIN", "eval", "nothing[:5]")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory, tiny_tokenizer_factory) -> Path:
    """A tiny model and the same rows as one file and as a folder with two splits."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(24)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (home / "pairs.jsonl").write_text("".join(lines))
    (home / "folder").mkdir()
    (home / "folder" / "train.jsonl").write_text("".join(lines[:16]))
    (home / "folder" / "test.jsonl").write_text("".join(lines[16:]))
    return home


def config_file(home: Path, tmp_path: Path, data: str, **keys: str) -> str:
    options = {
        "model_name_or_path": str(home / "model"),
        "dataset_name": data if data == "orpo-demo" else str(home / data),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "bf16": False,
        "use_cpu": True,
        **keys,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return str(tmp_path / "run.yaml")


def commands(home: Path, tmp_path: Path, data: str, split: str) -> dict[str, list[str]]:
    """Each command as it names a split."""
    source, model = data if data == "orpo-demo" else str(home / data), str(home / "model")
    return {
        "train": ["train", config_file(home, tmp_path, data), "--dataset_train_split", split],
        "check": ["check", config_file(home, tmp_path, data), "--quick", "--dataset_train_split", split],
        "plan": ["plan", config_file(home, tmp_path, data), "--dataset_train_split", split],
        "audit": ["audit", source, "--split", split, "--workers", "1"],
        "preview": ["preview", source, "--split", split, "--model", model],
        "eval": [
            "eval",
            model,
            "--tasks",
            "pairs",
            "--data",
            source,
            "--split",
            split,
            "--output",
            str(tmp_path / "eval"),
            "--device",
            "cpu",
        ],
    }


COMMANDS = ("train", "check", "plan", "audit", "preview", "eval")


@pytest.mark.parametrize("data", ["orpo-demo", "pairs.jsonl", "folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_split_that_is_not_there(command: str, data: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in [*WRONG, *(["test"] if data == "pairs.jsonl" else [])]:
        assert main(commands(home, tmp_path, data, split)[command]) == 2, split
        shown = capsys.readouterr()
        assert f"no split '{split.partition('[')[0]}'" in shown.out + shown.err
        assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("data", ["orpo-demo", "pairs.jsonl", "folder"])
@pytest.mark.parametrize("command", ["train", "check", "plan", "audit", "preview"])
def test_an_evaluation_split_that_is_not_there(
    command: str, data: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(home, tmp_path, data, dataset_test_split="validation")
    assert main([command, path, *{"check": ["--quick"], "audit": ["--workers", "1"]}.get(command, [])]) == 2
    shown = capsys.readouterr()
    assert "no split 'validation'" in shown.out + shown.err


@pytest.mark.parametrize("data", ["orpo-demo", "pairs.jsonl", "folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_slice(command: str, data: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(commands(home, tmp_path, data, "train[25%:75%]")[command]) == 0, capsys.readouterr()


def test_one_file_is_both_halves(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(home, tmp_path, "pairs.jsonl", dataset_train_split="train[:75%]", dataset_test_split="train[75%:]")
    assert main(["check", path, "--quick"]) == 0
    assert "18 of 18 rows to train on, 6 held out" in "".join(capsys.readouterr())
