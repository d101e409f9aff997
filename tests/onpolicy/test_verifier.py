"""Hostile verifiers: whatever a call does, the others get their scores and nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo.errors import UserError
from orpo.onpolicy.verifier import START_S, Verifier

HOSTILE = """
import os, signal, subprocess, sys, time, ctypes

print("printed while it is imported")

def check(prompt, answer, row):
    if answer == "loop":
        while True: pass
    if answer == "sleep": time.sleep(1000)
    if answer == "memory": return len(bytearray(10**12)) + len("x" * 10**11)
    if answer == "memory2":
        kept = []
        while True: kept.append(bytearray(10**7))
    if answer == "raise": raise KeyError("what")
    if answer == "exit": sys.exit(3)
    if answer == "_exit": os._exit(7)
    if answer == "crash": ctypes.string_at(0)
    if answer == "print":
        print('{"score": 99}', flush=True); sys.stderr.write("noise" * 1000); os.write(1, b"more\\n")
        return 1
    if answer == "parent": os.kill(os.getppid(), signal.SIGKILL)
    if answer == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if answer == "text": return "yes"
    if answer == "none": return None
    if answer == "nan": return float("nan")
    if answer == "deep": return check(prompt, answer, row)
    if answer == "flood":
        for descriptor in range(3, 64):
            try: os.write(descriptor, b"rubbish")
            except OSError: pass
        return 1
    if answer == "orphan":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                open(row["file"], "w").write(str(os.getpid()))
                time.sleep(1000)
            os._exit(0)
        time.sleep(0.3)
        return 1
    if answer == "busy":
        started = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=bool(row["apart"]))
        open(row["file"], "w").write(f"{os.getpid()} {started.pid}\\n")
        while True: pass
    if answer == "row": return row["points"]
    return answer == "good"
"""

FAILURES = {
    "loop": "within", "sleep": "within", "memory": "MemoryError", "memory2": "MemoryError", "raise": "KeyError: 'what' at line 14",
    "exit": "SystemExit", "_exit": "exit code 7", "crash": "signal 11", "stop": "within", "text": "gave a str", "none": "gave a NoneType",
    "nan": "gave nan", "deep": "RecursionError", "parent": "ended the process", "flood": None,
}  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "checks.py"
    path.write_text(HOSTILE)
    return path


def call(verifier: Verifier, answers: list[str], row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    verifier.call(
        [{"prompt": "p", "answer": answer, "row": row} for answer in answers], lambda n, outcome: found.update({answers[n]: outcome})
    )
    return found


def test_hostile_calls_fail_alone(hostile: Path, tmp_path: Path) -> None:
    orphan = tmp_path / "orphan"
    answers = ["good", *FAILURES, "print", "bad", "row", "orphan", "good again"]
    row = {"points": 2.5, "file": str(orphan)}
    # Those that never end, by a short limit; the others by one that a busy machine does not reach.
    endless = [answer for answer, words in FAILURES.items() if words == "within"]
    found = call(Verifier(f"{hostile}:check", time_s=1.0, memory_mib=200, num_workers=4), endless, row)
    found |= call(
        Verifier(f"{hostile}:check", time_s=60.0, memory_mib=200, num_workers=4), [one for one in answers if one not in endless], row
    )
    assert sorted(found) == sorted(answers)
    for answer, words in FAILURES.items():
        if words is not None:
            assert words in found[answer].get("failed", ""), (answer, found[answer])
    scores = {answer: found[answer].get("score") for answer in ("good", "bad", "print", "row", "orphan", "good again")}
    assert scores == {"good": 1.0, "bad": 0.0, "print": 1.0, "row": 2.5, "orphan": 1.0, "good again": 0.0}
    if Path("/proc/self/status").exists() and orphan.exists():
        assert not Path(f"/proc/{orphan.read_text()}").exists(), "what a call has started outlives it"


def test_calls_that_our_own_end_cuts_short_have_no_outcome(hostile: Path) -> None:
    """Ctrl-C, or a scorer that gives up: what was at work then is called again by the same command."""
    found: dict[str, dict[str, Any]] = {}
    answers = ["sleep", "sleep", "good", "good"]

    def done(number: int, outcome: dict[str, Any]) -> None:
        found[f"{answers[number]}{number}"] = outcome
        raise KeyboardInterrupt

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Verifier(f"{hostile}:check", time_s=600.0, num_workers=3).call(
            [{"prompt": "", "answer": one, "row": {}} for one in answers[1:]], done
        )
    assert [outcome for outcome in found.values() if "failed" in outcome] == []
    assert time.monotonic() - began_s < START_S, "nobody waits for a call, or for a start, that has been cut short"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("killed", [False, True])
def test_a_call_at_work_and_what_it_started_end_with_the_command(hostile: Path, tmp_path: Path, apart: bool, killed: bool) -> None:
    """Ctrl-C while a call loops, and a kill of the process that watches it: nobody else knows of the call."""
    told = tmp_path / "pids"
    row = {"file": str(told), "apart": apart}
    verifier = Verifier(f"{hostile}:check", time_s=100_000.0, num_workers=2)

    def done(number: int, outcome: dict[str, Any]) -> None:
        assert wait_for(told.exists)
        assert wait_for(lambda: told.read_text().endswith("\n"))
        if killed:
            os.kill(parent_of(int(told.read_text().split()[0])), signal.SIGKILL)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verifier.call([{"prompt": "", "answer": one, "row": row} for one in ("busy", "good")], done)
    call_pid, started_pid = map(int, told.read_text().split())
    try:
        assert wait_for(lambda: not Path(f"/proc/{call_pid}").exists())
        assert killed or wait_for(lambda: not Path(f"/proc/{started_pid}").exists()), "after a kill it is out of anybody's reach"
    finally:
        for pid in (call_pid, started_pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true, however slow the machine is."""
    until_s = time.monotonic() + 60
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.02)
    return condition()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("num", [1, 2, 8])
def test_an_end_at_any_moment_of_a_start_is_an_end(hostile: Path, num: int) -> None:
    """The first outcome ends it while the other processes are being started."""

    def done(number: int, outcome: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Verifier(f"{hostile}:check", time_s=600.0, num_workers=num).call([{"prompt": "", "answer": "good", "row": {}}] * num * 2, done)
    assert time.monotonic() - began_s < START_S
    assert not [one for one in threading.enumerate() if one.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("def other(prompt, answer): return 1", "check", "no function 'check' (found: other)"),
        ("import no_such_module", "check", "ModuleNotFoundError"),
        ("def check(prompt: return", "check", "SyntaxError"),
        ("def check(answer): return 1", "check", "two arguments"),
        ("import sys; sys.exit(0)", "check", "SystemExit"),
        ("import os; os._exit(0)", "check", "ended the process"),
        ("check = 3", "check", "no function"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_before_anything_is_sampled(tmp_path: Path, text: str, name: str, words: str) -> None:
    (tmp_path / "checks.py").write_text(text)
    with pytest.raises(UserError) as found:
        Verifier(f"{tmp_path / 'checks.py'}:{name}").check()
    assert words in str(found.value)


@pytest.mark.parametrize("spec", ["checks.py", "checks:f", "checks.py:", ":f", "gone.py:f", "checks.py:a b"])
def test_specs(spec: str) -> None:
    with pytest.raises(UserError, match="verify"):
        Verifier(spec)


def test_a_file_may_import_its_neighbours_and_no_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "choice.py").write_text("POINTS = 7")
    (tmp_path / "checks.py").write_text("import choice\ndef check(prompt, answer): return choice.POINTS")
    assert call(Verifier(f"{tmp_path / 'checks.py'}:check"), ["a"], {}) == {"a": {"score": 7.0}}


def test_texts_of_any_kind_arrive_as_they_are(tmp_path: Path) -> None:
    texts = ["\u2028line", "\x00", "tab\t\r\n", "\U0001f600", "é" * 100_000, "\ud800"]
    (tmp_path / "checks.py").write_text(f"TEXTS = {texts!r}\ndef check(prompt, answer): return TEXTS.index(answer)")
    found = call(Verifier(f"{tmp_path / 'checks.py'}:check"), texts, {})
    assert [found[text].get("score") for text in texts] == [0, 1, 2, 3, 4, 5], found
