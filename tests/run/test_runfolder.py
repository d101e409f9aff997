"""run.json is replaced whole, metrics.jsonl only grows or is cut at a checkpoint, and neither holds a secret."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo.errors import CheckpointError, UserError
from orpo.run.folder import RunFolder
from orpo.system.files import write_atomically
from orpo.system.machine import describe_device, versions
from orpo.system.redact import HIDDEN, is_secret_name, redact, redact_text
from orpo.training.metrics import MetricsCallback


class TestRunJson:
    def test_nothing_is_made_before_the_first_write(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "a" / "b")
        assert (run.read(), run.status, run.path.exists()) == (None, None, False)

    def test_writes_add_up(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "run")
        run.write(status="running", seed=3)
        run.write(status="complete", nested={"loss": float("nan")}, device=np.float32(1.5))
        assert run.read() == {"format": 1, "status": "complete", "seed": 3, "nested": {"loss": "nan"}, "device": 1.5}
        assert [path.name for path in run.path.iterdir()] == ["run.json"]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = RunFolder(tmp_path)
        run.write(seed=1)

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            run.write(seed=2)
        monkeypatch.undo()
        assert run.read() == {"format": 1, "seed": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "the half-written file beside it must be gone"

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"seed": 1}'])
    def test_a_foreign_file_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json"):
            RunFolder(tmp_path).read()

    def test_a_link_is_replaced_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("kept")
        (tmp_path / "run.json").symlink_to(tmp_path / "precious")
        write_atomically(tmp_path / "run.json", b"new")
        assert (tmp_path / "precious").read_text() == "kept"
        assert not (tmp_path / "run.json").is_symlink()


class TestMetrics:
    def test_append_and_read(self, tmp_path: Path) -> None:
        log = RunFolder(tmp_path / "run").metrics
        assert (log.num_bytes, list(log.read())) == (0, [])
        log.append({"step": 1, "loss": float("inf"), "text": "a\u2028b\n"})
        log.append({"step": 2})
        assert log.num_bytes == log.path.stat().st_size
        assert list(log.read()) == [{"step": 1, "loss": "inf", "text": "a\u2028b\n"}, {"step": 2}]

    def test_a_line_cut_by_a_kill_is_passed_over(self, tmp_path: Path) -> None:
        log = RunFolder(tmp_path).metrics
        log.append({"step": 1})
        with log.path.open("ab") as file:
            file.write(b'{"step": 2, "lo')
        assert list(log.read()) == [{"step": 1}]

    @given(st.integers(0, 6), st.integers(0, 6))
    def test_resume_leaves_neither_gap_nor_double(
        self, tmp_path_factory: pytest.TempPathFactory, saved_after: int, killed_after: int
    ) -> None:
        log = RunFolder(tmp_path_factory.mktemp("run")).metrics
        length = 0
        for step in range(1, max(saved_after, killed_after) + 1):
            log.append({"step": step})
            if step == saved_after:
                length = log.num_bytes
        log.truncate_to(length)
        for step in range(saved_after + 1, 8):
            log.append({"step": step})
        assert [record["step"] for record in log.read()] == list(range(1, 8))

    def test_cutting_at_a_wrong_place_is_refused(self, tmp_path: Path) -> None:
        log = RunFolder(tmp_path).metrics
        log.append({"step": 1})
        with pytest.raises(CheckpointError, match="no line ends"):
            log.truncate_to(4)
        with pytest.raises(CheckpointError, match="the checkpoint was made at"):
            log.truncate_to(1000)
        assert len(list(log.read())) == 1

    def test_callback_writes_on_the_first_process_alone(self, tmp_path: Path) -> None:
        log = RunFolder(tmp_path).metrics
        callback = MetricsCallback(log)
        for is_first in (True, False):
            state = SimpleNamespace(is_world_process_zero=is_first, global_step=5)
            callback.on_log(None, state, None, logs={"loss": 1.0})  # type: ignore[arg-type]
        (record,) = log.read()
        assert (record["step"], record["loss"]) == (5, 1.0)


class TestSecrets:
    def test_names(self) -> None:
        secret = {"hub_token", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "password", "token", "AWS_SECRET_ACCESS_KEY", "api-key"}
        plain = {"max_tokens_per_microbatch", "label_pad_token_id", "tokenizer", "special_tokens_in_text", "key", "eos_token", "monkey"}
        assert {name for name in secret | plain if is_secret_name(name)} == secret

    @pytest.mark.parametrize(
        "secret",
        ["hf_" + "aB3" * 10, "sk-" + "x1" * 12, "ghp_" + "z9" * 14, "github_pat_" + "q" * 24, "AKIA" + "A1" * 8, "https://me:pa55@host/x"],
    )
    def test_forms(self, secret: str) -> None:
        shown = redact_text(f"cannot load {secret}, sorry")
        assert HIDDEN in shown
        assert secret.replace("https://", "").split("@")[0] not in shown

    def test_values_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRACKER_API_KEY", "correct-horse-battery")
        monkeypatch.setenv("OTHER_TOKEN", "abc")
        assert redact_text("key correct-horse-battery abc") == f"key {HIDDEN} abc"

    def test_run_json_and_metrics_hold_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "plain-secret-value")
        run = RunFolder(tmp_path)
        facts = {"hub_token": {"value": "s3cret", "origin": "file"}, "kwargs": {"token": "s3cret", "x": ["plain-secret-value", None]}}
        run.write(configuration=facts, token=None)
        run.metrics.append({"note": "plain-secret-value"})
        written = run.run_json.read_text() + run.metrics.path.read_text()
        assert "s3cret" not in written
        assert "plain-secret-value" not in written
        assert run.read()["token"] is None

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(alphabet="abc :/", max_size=8), st.lists, max_leaves=8))
    def test_plain_values_stay(self, value: object) -> None:
        assert redact(value) == value


def test_versions_and_device_are_json() -> None:
    import torch

    facts = {"versions": versions(), "device": describe_device(torch.device("cpu"))}
    assert json.loads(json.dumps(facts)) == facts
    assert "torch" in facts["versions"]
