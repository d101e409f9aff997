"""`orpo train` on a tiny model: a whole run, doing nothing when complete, resuming after a stop, and refusing what it must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from orpo.cli import main
from orpo.run.folder import COMPLETE, STOPPED, RunFolder

SOURCE = Path(__file__).parents[2] / "src"
NUM_ROWS = 24


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory, tiny_tokenizer_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, model_folder: Path) -> dict[str, object]:
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(NUM_ROWS)]
    rows.append({"prompt": "An empty one", "chosen": "", "rejected": "x"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "eval_fraction": 0.25,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "orpo_alpha": 1.0,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
    }


def write_config(tmp_path: Path, options: dict[str, object]) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_a_run_from_start_to_end_and_again(tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, options)
    assert main(["train", config, "--seed", "5"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "", "stdout is for results"
    for part in ("dropped 1: empty_answer", "step 1/4", "acc", "margin", "held out", "orpo chat", "checkpoint saved"):
        assert part in shown.err

    run = RunFolder(tmp_path / "run")
    facts = run.read()
    assert facts is not None
    assert facts["status"] == COMPLETE
    assert facts["configuration"]["seed"] == {"value": 5, "origin": "--seed"}
    assert facts["configuration"]["learning_rate"]["origin"].startswith(config)
    assert facts["configuration"]["weight_decay"]["origin"] == "default"
    assert facts["data"]["train"]["dropped"] == {"empty_answer": 1}
    assert facts["data"]["num_held_out"] > 0
    assert len(facts["starting_weights_sha256"]) == 64
    assert facts["final_metrics"]["eval_loss"] > 0
    steps = [record["step"] for record in run.metrics.read() if "loss" in record]
    assert steps == [1, 2, 3, 4]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (run.path / "model").iterdir()}

    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(["train", config, "--seed", "5"]) == 0
    assert "nothing was done" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path for path in run.path.rglob("*") if path.is_file()} == {*before, run.path / ".lock"}

    assert main(["train", config, "--seed", "6"]) == 2
    refusal = capsys.readouterr().err
    assert "a finished run of another configuration" in refusal
    assert "seed: 5 -> 6" in refusal


def test_no_secret_reaches_a_file_or_the_terminal(
    tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub token of the configuration, that of the environment, and one inside a nested option."""
    monkeypatch.setenv("HF_TOKEN", "environment-secret-1")
    secrets = {"hub_token": "configured-secret-2", "run_name": "on environment-secret-1", "max_steps": 2}
    config = write_config(tmp_path, {**options, **secrets, "model_init_kwargs": {"token": "nested-secret-3"}})
    assert main(["train", config]) == 0
    shown = capsys.readouterr().err.encode()
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in (b"environment-secret-1", b"configured-secret-2", b"nested-secret-3"):
        assert secret not in shown
        assert [text for text in files if secret in text] == []


def test_an_adapter_run(tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, {**options, "use_peft": True, "lora_r": 2, "max_steps": 2, "eval_fraction": None})
    assert main(["train", config]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "orpo export" in capsys.readouterr().err
    flags = ["--model_name_or_path", str(tmp_path / "run" / "adapter"), "--output_dir", str(tmp_path / "again")]
    assert main(["train", config, *flags]) == 2
    told = capsys.readouterr().err
    assert "use_peft: the model has an adapter already" in told
    assert "leave use_peft out" in told
    assert "peft_config" not in told, "which is an argument of the trainer, and no key"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"max_steps": "many", "learning_rat": 1}, ["max_steps: found the text 'many'", "did you mean 'learning_rate'"]),
        ({"dataset_name": "absent.jsonl"}, ["absent.jsonl: no such file or folder"]),
        ({"model_name_or_path": "./absent"}, ["./absent"]),
        ({"max_length": 3}, ["too_long", "max_length"]),
        ({"per_device_train_batch_size": 64}, ["too few rows", "per_device_train_batch_size"]),
        ({"eval_fraction": None, "eval_dataset_name": "SAME"}, ["evaluation rows have a prompt that is also trained on", "allow_overlap"]),
    ],
)
def test_wrong_input_exits_with_2_and_makes_nothing(
    tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str], change: dict[str, object], messages: list[str]
) -> None:
    options |= {key: options["dataset_name"] if value == "SAME" else value for key, value in change.items()}
    assert main(["train", write_config(tmp_path, options)]) == 2
    shown = capsys.readouterr()
    assert all(message in shown.err for message in messages), shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "run").exists()


def test_a_missing_column_is_told_before_the_model_is_looked_at(
    tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "good": "b", "rejected": "c"}\n')
    assert main(["train", write_config(tmp_path, {**options, "model_name_or_path": "./absent"})]) == 2
    shown = capsys.readouterr().err
    assert "chosen" in shown
    assert "./absent" not in shown


def test_a_foreign_folder_is_left_alone(tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "precious.txt").write_text("kept")
    assert main(["train", write_config(tmp_path, options)]) == 2
    assert "holds weights but no run.json" in capsys.readouterr().err
    assert (tmp_path / "run" / "model" / "precious.txt").read_text() == "kept"


def test_a_stopped_process_resumes_to_the_same_weights(tmp_path: Path, options: dict[str, object]) -> None:
    """A real process: SIGTERM in mid-run saves and exits with 143; the same command finishes, equal to an uninterrupted run."""
    long = {**options, "max_steps": 60, "save_steps": 1000, "eval_fraction": None}
    config = write_config(tmp_path, long)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orpo", "train", config]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        metrics = RunFolder(tmp_path / "run").metrics
        deadline = time.monotonic() + 120
        while metrics.num_bytes == 0 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, shown
    assert "Traceback" not in shown
    facts = RunFolder(tmp_path / "run").read()
    assert facts is not None
    assert facts["status"] == STOPPED
    stopped_at = facts["last_step"]
    assert 0 < stopped_at < 60

    assert main(["train", config]) == 0
    facts = RunFolder(tmp_path / "run").read()
    assert facts is not None
    assert facts["status"] == COMPLETE
    assert [start["step"] for start in facts["starts"]] == [0, stopped_at]
    assert len(facts["starting_weights_sha256"]) == 64

    whole = write_config(tmp_path, {**long, "output_dir": str(tmp_path / "whole")})
    assert main(["train", whole]) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    clock = {"time_unix_s", "tokens_per_second", "pairs_per_second"}
    logs = [
        [{key: value for key, value in record.items() if key not in clock} for record in RunFolder(tmp_path / name).metrics.read()]
        for name in ("run", "whole")
    ]
    trained = [[record for record in log if "train_runtime" not in record] for log in logs]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.jsonl/below", "/proc/no-such-run"])
def test_a_folder_that_cannot_be_is_told_as_the_users_input(
    tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """A file in its way, and a place where even root can make no folder."""
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("there is no /proc here")
    kept = (tmp_path / "rows.jsonl").read_bytes()
    assert main(["train", write_config(tmp_path, {**options, "output_dir": str(tmp_path / place)})]) == 2
    shown = capsys.readouterr().err
    assert "choose another output_dir" in shown
    assert "Traceback" not in shown
    assert (tmp_path / "rows.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-x", "3"], "command line: unknown option '-x'"),
        (["--beta", "0.2", "--orpo_alpha", "0.3"], "- --beta: found 0.2, while orpo_alpha is 0.3"),
        (["--max_steps", "-5"], "--max_steps: found -5\n  expected: a positive number, or -1"),
        (["rows.jsonl"], "a configuration is a YAML file; data are named by --dataset_name"),
    ],
)
def test_wrong_words_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
