"""Every moment at which an export may be killed, or lose its power, leaves the old export or the new one (crashfs)."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from faults.crashfs import Disk, Op, Recorder, build, crash_states
from orpo.checkpoint import recover
from orpo.system import files as fs
from orpo.system.replace import recover_folder, replaced_folder

OLD, NEW = {"config.json": b"old", "weights": b"old weights"}, {"config.json": b"new", "weights": b"new weights", "tokenizer": b"new"}


def _write(target: Path, files: dict[str, bytes]) -> None:
    with replaced_folder(target) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)


def _read(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()} if target.is_dir() else {}


def _recorded(run: Path, patch: pytest.MonkeyPatch) -> tuple[Disk, list[Op]]:
    with patch.context() as inner:
        recorder = Recorder(run, inner)
        _write(run / "model", OLD)
        disk = recorder.start()
        _write(run / "model", NEW)
        recorder.mark("published")
    return disk, recorder.ops


def test_every_power_cut_leaves_one_whole_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    disk, ops = _recorded(run, monkeypatch)
    num_states = 0
    for done, tree in crash_states(disk, ops, seed=0):
        num_states += 1
        state = build(tree, tmp_path / str(num_states))
        recover(state)
        assert _read(state / "model") in ((NEW,) if done == len(ops) else (OLD, NEW)), f"after {done} of {ops}"
        assert [path.name for path in state.iterdir()] == ["model"]
        shutil.rmtree(state)
    assert num_states > 40


@pytest.mark.parametrize("is_after", [False, True])
def test_a_signal_at_every_file_operation_leaves_one_whole_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_after: bool) -> None:
    """A signal's exception is raised before, or just after, each operation in turn; no second start is needed to find an export."""
    names = ("make_dir", "sync_file", "sync_dir", "rename", "unlink", "remove_dir")
    moment = 0
    while True:
        run = tmp_path / str(moment)
        run.mkdir()
        _write(run / "model", OLD)
        count = 0

        def interrupted(real: Any, moment: int) -> Any:
            def operation(*arguments: Any) -> Any:
                nonlocal count
                count += 1
                if count == moment + 1 and not is_after:
                    raise KeyboardInterrupt
                real(*arguments)
                if count == moment + 1:
                    raise KeyboardInterrupt

            return operation

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(fs, name, interrupted(getattr(fs, name), moment))
            with contextlib.suppress(KeyboardInterrupt):
                _write(run / "model", NEW)
        assert _read(run / "model") in (OLD, NEW), f"operation {moment}"
        recover_folder(run / "model")
        assert not list(run.glob(".replaced-*"))
        if count <= moment:
            break
        moment += 1
    assert moment > 8
