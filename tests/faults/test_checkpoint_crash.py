"""Every moment of a save at which the machine may stop leaves a checkpoint that verifies.

A SIGKILL cannot show this: what a killed process wrote is safe in the system's cache. Here the file operations of a save are recorded
and each prefix is replayed on a model disk that drops what was not synced (crashfs).
"""

from __future__ import annotations

import ast
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import orpo.checkpoint
from faults.crashfs import Disk, Op, Recorder, build, crash_states
from orpo.checkpoint import find_newest, prune, publish, read_manifest, recover

KEEP = 2


@pytest.fixture(autouse=True)
def _no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of damaged states are looked at on purpose."""
    logging.getLogger("orpo.checkpoint").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("orpo.checkpoint").setLevel(logging.NOTSET)


def _payload(step: int, attempt: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(f"weights {step} {attempt} ".encode() * 4)
        (folder / "adapter").mkdir()
        (folder / "adapter" / "rng-0.json").write_bytes(f"{step}".encode())

    return write


def _save(run: Path, step: int, attempt: int = 0, *, keep: int | None = KEEP) -> None:
    publish(run, step, _payload(step, attempt), facts={"step": step, "attempt": attempt})
    prune(run, keep=keep, best=run / "checkpoint-1")


def _first_save(run: Path, recorder: Recorder) -> Disk:
    disk = recorder.start()
    publish(run, 1, _payload(1, 0), facts={"step": 1, "attempt": 0})
    recorder.mark("published")
    return disk


def _save_and_prune(run: Path, recorder: Recorder) -> Disk:
    for step in (1, 2, 3):
        _save(run, step)
    disk = recorder.start()
    publish(run, 4, _payload(4, 0), facts={"step": 4, "attempt": 0})
    recorder.mark("published")
    prune(run, keep=KEEP, best=run / "checkpoint-1")
    return disk


def _replace_the_only_one(run: Path, recorder: Recorder) -> Disk:
    _save(run, 5, 0)
    disk = recorder.start()
    publish(run, 5, _payload(5, 1), facts={"step": 5, "attempt": 1})
    recorder.mark("published")
    return disk


def _recover_and_save(run: Path, recorder: Recorder) -> Disk:
    """The start after a run that died while saving, while pruning and while replacing."""
    for step in (1, 2, 3):
        _save(run, step, keep=None)
    shutil.copytree(run / "checkpoint-3", run / ".staging-checkpoint-4-0badcafe")
    (run / "checkpoint-2").rename(run / ".removed-checkpoint-2-0badcafe")
    (run / "checkpoint-3").rename(run / ".replaced-checkpoint-3-0badcafe")
    disk = recorder.start()
    recover(run)
    publish(run, 4, _payload(4, 0), facts={"step": 4, "attempt": 0})
    recorder.mark("published")
    return disk


SCENARIOS = {
    # name -> (what is done, steps that may be found before it has returned (0: none), step that must be found after)
    "first save": (_first_save, {0, 1}, 1),
    "save and prune": (_save_and_prune, {3, 4}, 4),
    "replace the only one": (_replace_the_only_one, {5}, 5),
    "recover and save": (_recover_and_save, {3, 4}, 4),
}


def _violations(disk: Disk, ops: list[Op], before: set[int], after: int, folder: Path, *, seed: int = 0) -> tuple[list[str], int]:
    """What a resume finds wrong in the states a crash may leave, and how many states were looked at."""
    problems, num_states = [], 0
    returned = next(index for index, op in enumerate(ops) if op[0] == "mark")
    for done, tree in crash_states(disk, ops, seed=seed):
        num_states += 1
        run = build(tree, folder / f"{num_states}")
        blind = find_newest(run)
        recover(run)
        newest = find_newest(run)
        step = 0 if newest is None else read_manifest(newest).step
        if step not in ({after} if done > returned else before):
            problems.append(f"after {done} of {len(ops)} operations ({ops[done - 1] if done else 'none'}): found {step}")
        if (blind is None) != (newest is None):
            problems.append(f"after {done} operations: {blind} before the tidying, {newest} after it")
        if newest is not None and f"weights {step} ".encode() not in (newest / "model.safetensors").read_bytes():
            problems.append(f"after {done} operations: wrong content")
        if any(path.name.startswith(".") for path in run.iterdir()):
            problems.append(f"after {done} operations: left over {sorted(path.name for path in run.iterdir())}")
        shutil.rmtree(run)
    return problems, num_states


def _record(scenario: str, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Disk, list[Op]]:
    run = folder / "run"
    run.mkdir()
    with patch.context() as inner:
        recorder = Recorder(run, inner)
        disk = SCENARIOS[scenario][0](run, recorder)
    return disk, recorder.ops


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_prefix_of_a_save_leaves_a_checkpoint_that_verifies(scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, ops = _record(scenario, tmp_path, monkeypatch)
    _, before, after = SCENARIOS[scenario]
    problems, num_states = _violations(disk, ops, before, after, tmp_path)
    assert not problems, "\n".join(problems[:10])
    assert num_states > 3 * len(ops) > 30, "the model disk has too few states to show anything"


MUTANTS: dict[str, Callable[[list[Op]], list[Op]]] = {
    "files are not synced": lambda ops: [op for op in ops if op[0] != "sync_file"],
    "folders are not synced": lambda ops: [op for op in ops if op[0] != "sync_dir"],
    "the parent is not synced": lambda ops: [op for op in ops if op != ("sync_dir", ".")],
    "the staging folder is not synced": lambda ops: [op for op in ops if op[0] != "sync_dir" or op[1] == "."],
    "pruned before published": lambda ops: sorted(ops, key=lambda op: ".removed-" not in str(op) and "checkpoint-2" not in str(op)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_disk_finds_each_protection_missing(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would fail if a step of the protocol were left out."""
    scenario = "replace the only one" if "synced" in mutant else "save and prune"
    disk, ops = _record(scenario, tmp_path, monkeypatch)
    _, before, after = SCENARIOS[scenario]
    if mutant == "pruned before published":
        disk, ops = _with_damaged_newest(disk), MUTANTS[mutant](ops)
        before = {2, 4}
    problems, _ = _violations(disk, MUTANTS[mutant](ops), before, after, tmp_path)
    assert problems


def _with_damaged_newest(disk: Disk) -> Disk:
    """The case that keeping two is for: the newest of before the save is damaged, so the one to be pruned is the last good one."""
    node = disk.root.now["checkpoint-3"].now["model.safetensors"]
    node.now = node.safe = b"damaged"
    return disk


def test_nothing_changes_files_past_the_seam() -> None:
    """The recording is complete: no other module of the package calls what changes the file system, but for what `write` is given."""
    changing = {
        "rename",
        "replace",
        "unlink",
        "remove",
        "rmdir",
        "rmtree",
        "removedirs",
        "renames",
        "link",
        "symlink",
        "mkdir",
        "makedirs",
        "move",
    }
    allowed = {
        ("publish.py", "mkdir"),
        ("lock.py", "mkdir"),  # the run's folder itself; made once, before anything is in it
        ("sharded.py", "mkdir"),  # inside the staging folder, as part of what `write` is given
    }
    found = []
    for path in Path(orpo.checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing):
                continue
            is_seam = isinstance(node.func.value, ast.Name) and node.func.value.id == "fs"
            is_text = node.func.attr == "replace" and len(node.args) == 2
            if not is_seam and not is_text and (path.name, None) not in allowed and (path.name, node.func.attr) not in allowed:
                found.append(f"{path.name}:{node.lineno} {node.func.attr}")
    assert not found
