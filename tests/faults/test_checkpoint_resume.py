"""Whether a run may resume: the same facts, and nobody else in its folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import orpo
import orpo.checkpoint.lock as lock_module
from orpo.checkpoint import RunLock, compare_facts
from orpo.checkpoint.facts import require_same_facts
from orpo.errors import CheckpointError, UserError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(orpo.__file__).parents[1])}
FACTS = {
    "data": {"sha256": "aa", "num_rows": 10},
    "config": {"learning_rate": 1e-5, "per_device_train_batch_size": 4, "betas": (0.9, 0.99), "logging_steps": 10, "flag": True},
    "world_size": 1,
}


def _changed(part: str, **values: object) -> dict[str, object]:
    return {**FACTS, part: {**FACTS[part], **values}}  # type: ignore[dict-item]


def test_same_facts_pass_also_after_json() -> None:
    assert compare_facts(json.loads(json.dumps(FACTS)), FACTS) == []
    assert require_same_facts(FACTS, FACTS, where="checkpoint-1") == []


@pytest.mark.parametrize(
    ("now", "key", "text"),
    [
        (_changed("data", sha256="bb"), "data.sha256", '"aa" -> "bb"'),
        (_changed("config", learning_rate=2e-5), "config.learning_rate", "1e-05 -> 2e-05"),
        (_changed("config", per_device_train_batch_size=8), "config.per_device_train_batch_size", "4 -> 8"),
        (_changed("config", orpo_alpha=0.2), "config.orpo_alpha", "(absent) -> 0.2"),
        (_changed("config", betas=(0.9, 0.95)), "config.betas", "[0.9, 0.99] -> [0.9, 0.95]"),
        (_changed("config", flag=1), "config.flag", "true -> 1"),
        ({**FACTS, "world_size": 2}, "world_size", "1 -> 2"),
    ],
)
def test_changed_data_configuration_or_world_size_is_refused_with_a_diff(now: dict[str, object], key: str, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_same_facts(FACTS, now, where="checkpoint-1")
    assert f"{key}: {text}" in str(caught.value)
    assert "allow_changed_resume" in str(caught.value)
    assert [difference.key for difference in require_same_facts(FACTS, now, where="checkpoint-1", allow=True)] == [key]


def test_what_changes_no_weight_may_change() -> None:
    assert compare_facts(FACTS, _changed("config", logging_steps=1, output_dir="/elsewhere", save_total_limit=3)) == []


def test_every_difference_is_named_at_once() -> None:
    now = _changed("config", learning_rate=1.0, per_device_train_batch_size=1)
    assert len(compare_facts(FACTS, now)) == 2


# --- the lock


def _holder(run: Path, *, fork: bool = False) -> subprocess.Popen[str]:
    """Another process that holds the folder and says so; with `fork`, it has a child that outlives it, as a data-loader worker may."""
    code = (
        "import os, sys, time\nfrom orpo.checkpoint.lock import RunLock\n"
        f"lock = RunLock({str(run)!r}, beat_s=0.1).__enter__()\n"
        + ("if os.fork() == 0:\n    os.close(1); os.close(2); time.sleep(20); os._exit(0)\n" if fork else "")
        + "print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a forked child"])
def test_second_run_is_refused_and_a_killed_one_leaves_nothing_stale(fork: bool, tmp_path: Path) -> None:
    first = _holder(tmp_path, fork=fork)
    try:
        with pytest.raises(UserError, match=f"another run is using this folder .process {first.pid} on") as caught, RunLock(tmp_path):
            pass
        assert "output_dir" in str(caught.value)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with RunLock(tmp_path):
        pass


def test_released_lock_can_be_taken_again_by_the_same_process(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(UserError), RunLock(tmp_path):
            pass


def _elsewhere(run: Path) -> Path:
    path = run / lock_module.LOCK_NAME
    path.write_text(json.dumps({"host": "another-machine", "pid": 1, "started": "2026-01-01T00:00:00"}))
    return path


def test_run_on_another_machine_counts_while_it_beats(tmp_path: Path) -> None:
    """Where flock does not reach between machines, the holder's beat decides."""
    path = _elsewhere(tmp_path)
    beating = subprocess.Popen([sys.executable, "-c", f"import os, time\nfor _ in range(100): os.utime({str(path)!r}); time.sleep(0.05)"])
    try:
        time.sleep(0.1)
        with pytest.raises(UserError, match="another-machine"), RunLock(tmp_path, beat_s=0.2):
            pass
    finally:
        beating.kill()
        beating.wait()
    with RunLock(tmp_path, beat_s=0.1):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("is_alive", [True, False])
def test_without_flock_the_pid_decides(is_alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if not is_alive:
        process.kill()
        process.wait()
    (tmp_path / lock_module.LOCK_NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid}))
    monkeypatch.setattr(RunLock, "_flock", lambda self, descriptor: False)
    try:
        if is_alive:
            with pytest.raises(UserError, match=str(process.pid)), RunLock(tmp_path):
                pass
        else:
            with RunLock(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", "\0" * 50, '{"pid": "x"}'])
def test_damaged_lock_file_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / lock_module.LOCK_NAME).write_text(content)
    with RunLock(tmp_path, beat_s=0.05):
        pass


def test_the_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / lock_module.LOCK_NAME).symlink_to(victim)
    with pytest.raises(UserError), RunLock(tmp_path):
        pass
    assert victim.read_text() == "mine"


WITHOUT_POSIX = """
import os, sys, types
import fcntl as real
{imports}  # theirs to mend where they need more

def locking(descriptor, mode, number):
    try:
        real.lockf(descriptor, real.LOCK_EX | real.LOCK_NB, number, os.lseek(descriptor, 0, os.SEEK_CUR))
    except BlockingIOError as error:
        raise PermissionError(*error.args)

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "pread", "pwrite", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
from orpo.checkpoint import RunLock
"""
"""What Windows lacks, and its way to lock a part of a file, made of POSIX's."""


def test_the_package_imports_and_locks_where_posix_is_not(tmp_path: Path) -> None:
    code = WITHOUT_POSIX.format(imports="import accelerate, datasets, peft, torch, transformers.trainer")
    code += f"from orpo import ORPOTrainer\nfor _ in range(2):\n    with RunLock({str(tmp_path)!r}):\n        print('held', flush=True)\n"
    first = subprocess.Popen(
        [sys.executable, "-c", f"{code}        input()\n"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    code = WITHOUT_POSIX.format(imports="import torch") + f"with RunLock({str(tmp_path)!r}):\n    pass\n"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert f"another run is using this folder (process {first.pid} on" in second.stderr
    assert first.communicate("\n\n")[0] == "held\n"
    assert first.returncode == 0


def test_unwritable_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunLock(file / "run"):
        pass
