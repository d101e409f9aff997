"""A checkpoint's manifest cannot reach outside its folder, and pruning touches only what a manifest owns."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo.checkpoint import find_newest, list_checkpoints, prune, publish, recover, verify
from orpo.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, checked_name, hash_file
from orpo.errors import CheckpointError

HOSTILE = [
    "../victim", "../../victim", "sub/../../victim", "/etc/passwd", "./model", "sub//file", "sub/./file", "", ".", "..", "a\\..\\b",
    "C:\\victim", "c:/victim", "model\0", "manifest.json", "sub/", "a\nb",
]  # fmt: skip


def _save(run: Path, *steps: int) -> None:
    for step in steps:
        publish(run, step, lambda folder: (folder / "model.safetensors").write_bytes(b"weights"), facts={})


def _forge(folder: Path, files: dict[str, FileEntry]) -> None:
    """A manifest with a right checksum of its own, as an attacker would write it."""
    manifest = Manifest(99, 1, {}, {}, {})
    body: dict[str, Any] = json.loads(manifest.to_bytes())
    body.pop("manifest_sha256")
    body["files"] = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in files.items()}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_NAME).write_text(json.dumps({**body, "manifest_sha256": digest}))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"somebody's file")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    _save(folder, 1, 2, 3)
    return folder


def test_the_forger_of_these_tests_is_right(run: Path) -> None:
    forged = run / "checkpoint-99"
    forged.mkdir()
    (forged / "file").write_bytes(b"x")
    _forge(forged, {"file": hash_file(forged / "file")})
    assert verify(forged).step == 99


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_leave_the_folder_are_refused(name: str, run: Path, victim: Path) -> None:
    with pytest.raises(CheckpointError):
        checked_name(name, "manifest")
    forged = run / "checkpoint-99"
    _forge(forged, {name: hash_file(victim)})
    with pytest.raises(CheckpointError, match="is not a file inside the checkpoint"):
        verify(forged)
    assert find_newest(run) == run / "checkpoint-3"
    forged.rename(run / "checkpoint-0")
    prune(run, keep=1)
    assert victim.read_bytes() == b"somebody's file"
    assert (run / "checkpoint-0").exists()


@given(name=st.text(max_size=20) | st.lists(st.sampled_from(["..", ".", "/", "a", "\\", "", "~"]), max_size=6).map("/".join))
@example("..")
def test_every_accepted_name_stays_inside(name: str) -> None:
    try:
        checked_name(name, "manifest")
    except CheckpointError:
        return
    inside = os.path.normpath(os.path.join("/run/checkpoint-1", name))
    assert inside.startswith("/run/checkpoint-1/")
    assert inside == f"/run/checkpoint-1/{name}"


@pytest.mark.parametrize("kind", ["file", "folder", "manifest", "checkpoint", "fifo", "fifo of the stated size"])
@pytest.mark.timeout(30)
def test_links_and_special_files_are_not_followed(kind: str, run: Path, victim: Path) -> None:
    checkpoint = run / "checkpoint-3"
    weights = checkpoint / "model.safetensors"
    if kind == "file":
        victim.write_bytes(b"weights")
        weights.unlink()
        weights.symlink_to(victim)
    elif kind == "folder":
        outside = run.parent / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(b"x")
        (checkpoint / "sub").symlink_to(outside)
        _forge(checkpoint, {"sub/file": hash_file(outside / "file")})
    elif kind == "manifest":
        (checkpoint / MANIFEST_NAME).rename(run.parent / "elsewhere.json")
        (checkpoint / MANIFEST_NAME).symlink_to(run.parent / "elsewhere.json")
    elif kind == "checkpoint":
        checkpoint.rename(run.parent / "elsewhere")
        checkpoint.symlink_to(run.parent / "elsewhere")
    else:
        weights.unlink()
        os.mkfifo(weights)  # opening it would wait for ever
        if kind == "fifo of the stated size":
            _forge(checkpoint, {"model.safetensors": FileEntry(0, hashlib.sha256(b"").hexdigest())})
    with pytest.raises(CheckpointError):
        verify(checkpoint)
    assert find_newest(run) == run / "checkpoint-2"


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pruning_leaves_links_and_foreign_folders_alone(run: Path, victim: Path) -> None:
    outside = run.parent / "outside"
    _save(outside, 0)
    (run / "checkpoint-0").symlink_to(outside / "checkpoint-0")
    foreign = run / "checkpoint-00"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"of another tool")
    (run / "checkpoint-notes").mkdir()
    (run / "checkpoint-1-old").mkdir()
    before = _tree(outside)
    _save(run, 4, 5)
    prune(run, keep=1)
    assert _tree(outside) == before
    assert (run / "checkpoint-0").is_symlink()
    assert (foreign / "pytorch_model.bin").read_bytes() == b"of another tool"
    assert {path.name for path in list_checkpoints(run)} == {"checkpoint-00", "checkpoint-4", "checkpoint-5"}
    assert (run / "checkpoint-notes").is_dir()
    assert (run / "checkpoint-1-old").is_dir()


def test_files_that_a_manifest_does_not_name_survive_the_pruning(run: Path, victim: Path) -> None:
    old = run / "checkpoint-1"
    (old / "my-notes.txt").write_text("keep me")
    (old / "sub").mkdir()
    (old / "sub" / "link").symlink_to(victim)
    prune(run, keep=1)
    assert (old / "my-notes.txt").read_text() == "keep me"
    assert (old / "sub" / "link").is_symlink()
    assert not (old / "model.safetensors").exists()
    assert victim.read_bytes() == b"somebody's file"
    assert find_newest(run) == run / "checkpoint-3"


def test_a_linked_folder_in_an_old_checkpoint_is_not_entered(run: Path) -> None:
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    old = run / "checkpoint-1"
    (old / "sub").symlink_to(outside)
    _forge(old, {"sub/file": hash_file(outside / "file"), "model.safetensors": hash_file(old / "model.safetensors")})
    prune(run, keep=1)
    assert (outside / "file").read_bytes() == b"x"


@pytest.mark.parametrize("kind", ["staging", "removed", "replaced"])
def test_tidying_at_start_does_not_follow_links(kind: str, run: Path) -> None:
    outside = run.parent / "outside"
    _save(outside, 7)
    before = _tree(outside)
    hidden = run / f".{kind}-checkpoint-7-0badcafe"
    hidden.symlink_to(outside / "checkpoint-7")
    inside = run / f".{kind}-checkpoint-8-0badcafe"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    recover(run)
    assert _tree(outside) == before
    assert hidden.is_symlink()
    assert find_newest(run) == run / "checkpoint-3"


def test_publishing_over_a_link_keeps_what_it_points_to(run: Path) -> None:
    outside = run.parent / "outside"
    _save(outside, 4)
    (run / "checkpoint-4").symlink_to(outside / "checkpoint-4")
    before = _tree(outside)
    _save(run, 4)
    assert _tree(outside) == before
    assert not (run / "checkpoint-4").is_symlink()
    assert find_newest(run) == run / "checkpoint-4"
