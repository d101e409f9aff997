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
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

import orpo.cli
from orpo.cli import command_modules, main, parse
from orpo.config.shipped import FOLDER
from orpo.errors import DataError, GuardStop, SignalStop, UserError
from orpo.run.config import resolve
from orpo.run.keys import key_types

ROOT = Path(__file__).parents[2]
RECIPES = sorted(FOLDER.glob("*.yaml"))
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
        (["xyzzy"], 2, "err", "one of demo, init, recipes, audit, preview"),
        (["train", "--help"], 0, "out", "--orpo_alpha"),
        (["doctor", "--jsn"], 2, "err", "unrecognized arguments: --jsn (did you mean --json?)"),
        (["export", "run", "--output", "x"], 2, "err", "unrecognized arguments: --output x (did you mean --out?)"),
        (["export", "run", "--output=x"], 2, "err", "usage: orpo export"),
        (["report", "run", "--xyzzy"], 2, "err", "unrecognized arguments: --xyzzy\n"),
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_as_the_user_says_or_sleep_soon(given: dict[str, str], expected: str | None) -> None:
    code = "import os, sys; from orpo.cli import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/bin", **given}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.splitlines()[-1] == f"{expected} False"


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

        recipe = yaml.safe_load((FOLDER / "demo.yaml").read_text(encoding="utf-8"))
        del recipe["eval_fraction"]  # a person's own file has no test split
        assert {**recipe, "dataset_test_split": "test"} == DEMO_OPTIONS

    def test_the_paper_s_recipe_has_the_paper_s_values(self) -> None:
        config = resolve(FOLDER / "paper-mistral-7b.yaml")
        keys = ("orpo_alpha", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_prompt_length", "max_length")
        assert [config[key] for key in keys] == [0.1, 5e-6, "inverse_sqrt", 200, 5, 1792, 2048]


class TestProgress:
    now_s = 0.0

    def report(self, is_terminal: bool = False, width: int = 200):
        from io import StringIO

        from rich.console import Console

        from orpo.cli.progress import ProgressReport

        stream = StringIO()
        console = Console(file=stream, force_terminal=is_terminal, width=width, highlight=False)
        return ProgressReport(console, clock=lambda: self.now_s), stream

    def state(self, step: int) -> SimpleNamespace:
        return SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=10)

    LOGS = {  # noqa: RUF012
        "loss": 2.5,
        "nll_loss": 2.0,
        "log_odds_ratio": -0.5,
        "rewards/accuracies": 0.75,
        "rewards/margins": 0.001,
        "logps/chosen": -1.99,
        "logps/rejected": -2.0,
        "tokens_per_second": 1234.5,
        "learning_rate": 1e-5,
    }

    @pytest.mark.parametrize("is_terminal", [False, True])
    def test_a_run_s_lines(self, is_terminal: bool) -> None:
        report, stream = self.report(is_terminal)
        report.on_train_begin(None, self.state(0), None)
        for step in range(1, 11):
            report.on_step_end(None, self.state(step), SimpleNamespace(should_log=False))
        report.on_log(None, self.state(5), None, logs=self.LOGS)
        report.on_log(None, self.state(10), None, logs={"eval_loss": 2.25, "eval_rewards/accuracies": 0.5})
        report.on_save(None, self.state(10), None)
        report.on_train_end(None, self.state(10), None)
        shown = stream.getvalue()
        for part in ("loss 2.500", "nll 2.000", "odds 0.500", "acc 75%", "margin +0.010", "tok/s 1,23", "evaluation: loss 2.250  acc 50%"):
            assert part in shown

    @pytest.mark.parametrize("width", [60, 80, 100, 130])
    def test_the_bar_s_line_fits_and_shows_what_matters_most(self, width: int) -> None:
        """Step, bar, time left and loss at any width; the others as there is room. Every log stays as a line of its own above it."""
        report, stream = self.report(is_terminal=True, width=width)
        report.on_train_begin(None, self.state(0), None)
        lines = []
        for step in (1, 10):
            report.on_step_end(None, self.state(step), SimpleNamespace(should_log=True))
            report.on_log(None, self.state(step), None, logs=self.LOGS)
            (task,) = report._progress.tasks
            report._progress.update(task.id, left="12 h 05 min left")
            lines.append(report._progress.columns[0].render(task).plain)
        report.close()
        for step, line in zip((1, 10), lines, strict=True):
            assert cell_len(line) <= width
            for part in (f"step {step}/10", "━━━━━━━━━━", "12 h 05 min left", "loss 2.500"):
                assert part in line
            assert ("margin +0.010" in line, "tok/s" in line) == (width >= 80, width >= 100), line
        shown = [line.rstrip() for line in Text.from_ansi(stream.getvalue()).plain.splitlines()]
        assert all(cell_len(line) <= width for line in shown)
        for step in (1, 10):
            assert any(line.startswith(f"step {step}/10  loss 2.500  nll 2.000  odds 0.500  acc 75%") for line in shown)

    def test_a_log_says_early_that_the_run_moves(self) -> None:
        report, stream = self.report()
        report.on_train_begin(None, self.state(0), None)
        for step in (1, 2):
            report.on_step_end(None, self.state(step), SimpleNamespace(should_log=False))
        (line,) = stream.getvalue().splitlines()
        assert line.startswith("step 1/10  ")
        assert line.endswith(" left")

    @pytest.mark.parametrize("is_terminal", [False, True])
    def test_a_log_is_never_silent_for_long(self, is_terminal: bool) -> None:
        """Steps of eleven seconds that log nothing, then an evaluation of as slow micro-batches; a terminal has its bar."""
        report, stream = self.report(is_terminal)
        report.on_train_begin(None, self.state(0), None)
        for step in range(1, 10):
            self.now_s += 11
            report.on_step_end(None, self.state(step), SimpleNamespace(should_log=False))
        for _ in range(7):
            self.now_s += 11
            report.on_prediction_step(None, self.state(9), None)
        report.on_evaluate(None, self.state(9), None)
        report.close()
        lines = stream.getvalue().splitlines()
        if is_terminal:
            assert not any(line.startswith(("step 4", "step 7")) for line in lines)
            return
        assert [line.partition("  ")[0] for line in lines] == ["step 1/10", "step 4/10", "step 7/10", "step 9", "step 9", "step 9"]
        assert lines[1].endswith("1 min 06 s left")
        assert lines[3].endswith("evaluating, 1 micro-batches done")

    def test_the_margin_is_in_nats_per_token_whatever_the_weight_of_its_term(self) -> None:
        from orpo.cli.progress import describe_log

        for alpha in (0.1, 1.0):
            logs = {"rewards/margins": alpha * 0.5, "logps/chosen": -1.0, "logps/rejected": -1.5}
            assert describe_log(logs) == "margin +0.500"
            assert describe_log({f"eval_{name}": value for name, value in logs.items()}, "eval_") == "margin +0.500"

    def test_a_non_finite_loss_is_shown(self) -> None:
        report, stream = self.report()
        report.on_train_begin(None, self.state(0), None)
        report.on_log(None, self.state(1), None, logs={"loss": float("nan"), "rewards/accuracies": float("nan")})
        assert "loss nan  acc nan" in stream.getvalue()

    def test_time_left_counts_from_the_resumed_step(self) -> None:
        report, _ = self.report()
        report.on_train_begin(None, self.state(5), None)
        self.now_s += 10
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
    @pytest.mark.parametrize("width", [20, 60, 80, 100, 130])
    @given(words=st.lists(st.text("ab/界-", min_size=1, max_size=30), max_size=30), blanks=st.integers(1, 3), label=st.booleans())
    def test_lines_are_broken_between_words_alone(self, width: int, words: list[str], blanks: int, label: bool) -> None:
        from orpo.system.console import pieces_of

        line = ("folder       " if label else "") + (" " * blanks).join(words)
        pieces = pieces_of(line, width)
        assert " ".join(pieces).split() == line.split()
        for piece in pieces:
            assert cell_len(piece) <= width or min(len(piece.split()), len(piece[13:].split())) <= 1, piece

    @pytest.mark.parametrize("width", [60, 80, 100, 130])
    def test_a_label_s_text_goes_on_below_itself_and_values_stay_with_their_names(self, width: int) -> None:
        from orpo.system.console import pieces_of

        first, *others = pieces_of("model        " + "134.5 M parameters and more " * 9, width)
        assert first.startswith("model        134.5")
        assert all(line.startswith(" " * 13) and line[13] != " " for line in others)
        names = "loss 2.500  nll 2.000  odds 0.500  acc 75%  margin +0.010  tok/s 1,235"
        for line in pieces_of(f"step 10  evaluation: {names}", width):
            assert len(line) <= width
        assert all(any(name in line for line in pieces_of(f"step 10/20  {names}", width)) for name in names.split("  "))

    def test_labels_of_other_widths_and_lines_further_in_hang_too(self) -> None:
        from orpo.system.console import pieces_of

        first, *others = pieces_of(f"ok       {'disk':<15}" + "of words enough for two lines " * 4, 80, 24)
        assert first.startswith("ok       disk           of words")
        assert others
        assert all(line.startswith(" " * 24) and line[24] != " " for line in others)
        first, *others = pieces_of("    " + "what belongs to the line above " * 4, 80)
        assert first.startswith("    what")
        assert all(line.startswith(" " * 6) and line[6] != " " for line in others)

    def test_without_a_terminal_a_line_stays_whole_and_in_one_it_is_broken(self) -> None:
        from io import StringIO

        from rich.console import Console

        from orpo.system.console import say

        text = "a path /tmp/" + "x" * 90 + " :warning: and [b]no markup[/b] " + "word " * 60
        for is_terminal in (False, True):
            stream = StringIO()
            say(Console(file=stream, force_terminal=is_terminal, width=60, highlight=False), text)
            lines = stream.getvalue().splitlines()
            assert (len(lines) == 1) != is_terminal
            assert " ".join(line.strip() for line in lines) == text.strip()

    def test_messages_of_the_library_pass_above_a_bar_that_is_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A handler that wrote to the stream would write into the bar's line, and leave a copy of the bar behind."""
        import logging
        from io import StringIO

        from orpo.cli.progress import ProgressReport
        from orpo.system.console import stderr_console
        from orpo.system.process import configure_logging

        class Terminal(StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr("sys.stderr", stream := Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        logger = logging.getLogger("orpo")
        before = logger.handlers[:], logger.level, logger.propagate
        configure_logging()
        report = ProgressReport(stderr_console())
        try:
            report.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=10), None)
            stream.truncate(0)
            logger.warning("step 3: %s", "the loss is far above its start " * 4)
        finally:
            report.close()
            logger.handlers[:], logger.level, logger.propagate = before
        erased, _, after = stream.getvalue().partition("warning: step 3: the loss is far above its start")
        assert erased.endswith("\x1b[2K")  # the bar's line was taken away first
        assert after.count("step 0/10") >= 1  # and drawn again below
        assert all(cell_len(line) <= 60 for line in Text.from_ansi(stream.getvalue()).plain.splitlines())

    @pytest.mark.parametrize(
        ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4096.0 GiB")]
    )
    def test_bytes(self, number: int, text: str) -> None:
        from orpo.system.console import human_bytes

        assert human_bytes(number) == text

    @pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
    def test_seconds(self, seconds: float, text: str) -> None:
        from orpo.system.console import human_seconds

        assert human_seconds(seconds) == text

    def test_texts_cannot_steer_the_terminal(self) -> None:
        from orpo.system.console import printable

        assert printable("a\x1b[31mred\x07\r\nb\tc") == "a\ufffd[31mred\ufffd\ufffd\nb\tc"


def test_doctor_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--quick"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert facts["device"]["memory"]["total_bytes"] > 2**28
    assert facts["matmul_gflops"] == {}
    assert main(["doctor", "--quick"]) == 0
    assert "compute    " in capsys.readouterr().out


@pytest.mark.parametrize("width", ["40", "80", "200"])
@pytest.mark.parametrize("name", list(command_modules()))
def test_a_usage_error_stands_below_the_usage(
    name: str, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    parser = orpo.cli.build_parser(command_modules(), name)
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    with pytest.raises(SystemExit):
        subparsers.choices[name].error("what is wrong")
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"usage: orpo {name}")
    assert last == f"orpo {name}: error: what is wrong"
