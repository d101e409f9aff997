"""The command line itself: exit codes, streams, help, what each command takes; and the recipes, which run as they stand."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import orpo.cli
from orpo.cli import command_modules, main, parse
from orpo.errors import DataError, GuardStop, SignalStop, UserError
from orpo.runconfig import resolve
from orpo.runkeys import key_types

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SNAPSHOT = ROOT / "tests" / "snapshots" / "cli.json"


def fake_command(monkeypatch: pytest.MonkeyPatch, run) -> None:
    module = ModuleType("fake")
    module.NAME, module.HELP, module.run = "fake", "a command", run  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: parser.add_argument("--json", action="store_true")  # type: ignore[attr-defined]
    monkeypatch.setattr(orpo.cli, "command_modules", lambda: {"fake": module})


def raising(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message", "has_traceback"),
    [
        (UserError("found 3", where="a.yaml:1", expected="4", mend="write 4"), 2, "orpo fake: a.yaml:1: found 3\n  expected: 4", False),
        (DataError("no rows"), 2, "no rows", False),
        (GuardStop("loss is nan at step 3"), 3, "loss is nan at step 3", False),
        (SignalStop(15, "stopped by SIGTERM"), 143, "stopped by SIGTERM", False),
        (SignalStop(2, "stopped by SIGINT"), 130, "stopped by SIGINT", False),
        (KeyboardInterrupt(), 130, "interrupted", False),
        (ZeroDivisionError("division by zero"), 1, "This is a bug in orpo", True),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str, has_traceback: bool
) -> None:
    fake_command(monkeypatch, raising(error))
    assert main(["fake"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert ("Traceback" in shown.err) == has_traceback


def test_sigterm_in_any_command_unwinds_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def run(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)
        return 0

    fake_command(monkeypatch, run)
    assert main(["fake"]) == 143
    assert cleaned == [True]
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_bug_s_traceback_hides_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    fake_command(monkeypatch, raising(RuntimeError("cannot use very-secret-value")))
    assert main(["fake"]) == 1
    assert "very-secret-value" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "stream", "message"),
    [
        ([], 2, "err", "usage: orpo"),
        (["--version"], 0, "out", "orpo "),
        (["--help"], 0, "out", "demo"),
        (["trian"], 2, "err", "there is no command 'trian': did you mean 'train'?"),
        (["xyzzy"], 2, "err", "one of demo, train, check"),
        (["train", "--help"], 0, "out", "--orpo_alpha"),
        (["doctor", "--jsn"], 2, "err", "unrecognized arguments"),
    ],
)
def test_usage(argv: list[str], code: int, stream: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    shown = capsys.readouterr()
    assert message in getattr(shown, stream)
    assert (shown.err if stream == "out" else shown.out) == ""


def test_keys_are_split_from_the_command_s_own_options() -> None:
    args = parse(["check", "--learning_rate", "1e-5", "a.yaml", "--json", "--use_peft", "--max_steps", "-1"])
    assert args.json is True
    assert args.quick is False
    assert args.keys == ["--learning_rate", "1e-5", "a.yaml", "--use_peft", "--max_steps", "-1"]


def test_starting_imports_nothing_heavy() -> None:
    code = "import sys; from orpo.cli import main; main(['--help']); print(sorted({'torch','transformers','datasets'} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/bin"}
    )
    assert shown.stdout.splitlines()[-1] == "[]"


def test_commands_and_options_are_frozen() -> None:
    """A command or flag neither appears nor vanishes by accident. To change one on purpose, edit the snapshot."""
    found = {}
    for name, module in command_modules().items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        options = [option for action in parser._actions for option in action.option_strings or [action.dest]]
        found[name] = sorted(set(options) - {"-h", "--help"})
    frozen = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert {name: found[name] for name in frozen["options"]} == frozen["options"]
    assert sorted(RUN_KEYS := set(key_types()) & set(frozen["keys"])) == frozen["keys"], sorted(set(frozen["keys"]) - RUN_KEYS)


class TestRecipes:
    def test_there_are_some(self) -> None:
        assert {"demo.yaml", "smollm2-full.yaml", "lora-7b.yaml", "paper-mistral-7b.yaml"} <= {path.name for path in RECIPES}

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_each_resolves(self, path: Path) -> None:
        config = resolve(path)
        assert config.notes == ()
        config.training_args()
        assert f"recipes/{path.name}" in path.read_text(encoding="utf-8"), "the comment shows the command"

    def test_the_demo_is_its_recipe(self) -> None:
        from orpo.cli.demo import DEMO_OPTIONS

        recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
        del recipe["eval_fraction"]  # a person's own file has no test split
        assert {**recipe, "dataset_test_split": "test"} == DEMO_OPTIONS

    def test_the_paper_s_recipe_has_the_paper_s_values(self) -> None:
        config = resolve(ROOT / "recipes" / "paper-mistral-7b.yaml")
        keys = ("orpo_alpha", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_prompt_length", "max_length")
        assert [config[key] for key in keys] == [0.1, 5e-6, "inverse_sqrt", 200, 5, 1792, 2048]


class TestProgress:
    def report(self, is_terminal: bool = False):
        from io import StringIO

        from rich.console import Console

        from orpo.cli.progress import ProgressReport

        stream = StringIO()
        return ProgressReport(Console(file=stream, force_terminal=is_terminal, width=200, highlight=False)), stream

    def state(self, step: int) -> SimpleNamespace:
        return SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=10)

    LOGS = {  # noqa: RUF012
        "loss": 2.5,
        "nll_loss": 2.0,
        "log_odds_ratio": -0.5,
        "rewards/accuracies": 0.75,
        "rewards/margins": 0.01,
        "tokens_per_second": 1234.5,
        "learning_rate": 1e-5,
    }

    @pytest.mark.parametrize("is_terminal", [False, True])
    def test_a_run_s_lines(self, is_terminal: bool) -> None:
        report, stream = self.report(is_terminal)
        report.on_train_begin(None, self.state(0), None)
        for step in range(1, 11):
            report.on_step_end(None, self.state(step), None)
        report.on_log(None, self.state(5), None, logs=self.LOGS)
        report.on_log(None, self.state(10), None, logs={"eval_loss": 2.25, "eval_rewards/accuracies": 0.5})
        report.on_save(None, self.state(10), None)
        report.on_train_end(None, self.state(10), None)
        shown = stream.getvalue()
        for part in ("loss 2.500", "nll 2.000", "odds 0.500", "acc 75%", "margin +0.010", "tok/s 1,23", "evaluation: loss 2.250  acc 50%"):
            assert part in shown

    def test_a_non_finite_loss_is_shown(self) -> None:
        report, stream = self.report()
        report.on_train_begin(None, self.state(0), None)
        report.on_log(None, self.state(1), None, logs={"loss": float("nan"), "rewards/accuracies": float("nan")})
        assert "loss nan  acc nan" in stream.getvalue()

    def test_time_left_counts_from_the_resumed_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        report, _ = self.report()
        now = iter([100.0, 110.0])
        monkeypatch.setattr("orpo.cli.progress.time.monotonic", lambda: next(now))
        report.on_train_begin(None, self.state(5), None)
        assert report.time_left(self.state(7)) == "15 s left"

    def test_other_processes_are_silent(self) -> None:
        report, stream = self.report()
        state = self.state(1)
        state.is_world_process_zero = False
        report.on_train_begin(None, state, None)
        report.on_log(None, state, None, logs=self.LOGS)
        report.on_save(None, state, None)
        assert stream.getvalue() == ""


class TestConsole:
    @pytest.mark.parametrize(
        ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4096.0 GiB")]
    )
    def test_bytes(self, number: int, text: str) -> None:
        from orpo.cli.console import human_bytes

        assert human_bytes(number) == text

    @pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
    def test_seconds(self, seconds: float, text: str) -> None:
        from orpo.cli.console import human_seconds

        assert human_seconds(seconds) == text

    def test_texts_cannot_steer_the_terminal(self) -> None:
        from orpo.cli.console import printable

        assert printable("a\x1b[31mred\x07\r\nb\tc") == "a\ufffd[31mred\ufffd\ufffd\nb\tc"


def test_doctor_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--quick"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert facts["device"]["memory"]["total_bytes"] > 2**28
    assert facts["matmul_gflops"] == {}
    assert main(["doctor", "--quick"]) == 0
    assert "compute    " in capsys.readouterr().out
