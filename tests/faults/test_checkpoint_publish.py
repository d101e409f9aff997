"""Publishing, verifying, keeping and replacing checkpoints."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import disks
from orpo.checkpoint import PeerError, Ranks, find_newest, list_checkpoints, prune, publish, read_manifest, recover, verify
from orpo.errors import CheckpointError, ToldElsewhereError, UserError


def _writer(content: bytes = b"weights") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "state.json").write_bytes(b"{}")

    return write


def _save(run: Path, *steps: int) -> None:
    for step in steps:
        publish(run, step, _writer(b"weights of %d" % step), facts={"data": {"sha256": "ab"}})


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_manifest_says_what_the_protocol_asks_for(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    manifest = verify(tmp_path / "checkpoint-3")
    assert (manifest.step, manifest.world_size, manifest.facts) == (3, 1, {"data": {"sha256": "ab"}})
    assert manifest.files["model.safetensors"].bytes == len(b"weights of 3")
    assert set(manifest.files) == {"model.safetensors", "sub/state.json"}
    assert {"python", "torch", "transformers", "orpo"} <= set(manifest.versions)
    assert manifest.num_bytes == len(b"weights of 3") + 2


@pytest.mark.parametrize("name", ["model.safetensors", "sub/state.json", "manifest.json"])
def test_every_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    _save(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / name
    content = path.read_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        try:
            verify(tmp_path / "checkpoint-1")
        except CheckpointError:
            continue
        # Between JSON tokens a flipped bit can give another blank, which changes nothing that is read.
        assert name == "manifest.json", index
        assert bytes(damaged).split() != content.split() or content[index : index + 1].isspace(), index
        assert read_manifest(tmp_path / "checkpoint-1").step == 1
    path.write_bytes(content)
    verify(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest missing", "manifest cut", "longer"])
def test_damaged_newest_is_passed_over_loudly(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(tmp_path, 5, 10)
    newest = tmp_path / "checkpoint-10"
    weights, manifest = newest / "model.safetensors", newest / "manifest.json"
    {
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-1]),
        "flipped": lambda: weights.write_bytes(b"w" + bytes([weights.read_bytes()[1] ^ 4]) + weights.read_bytes()[2:]),
        "longer": lambda: weights.write_bytes(weights.read_bytes() + b"\0"),
        "missing": weights.unlink,
        "manifest missing": manifest.unlink,
        "manifest cut": lambda: manifest.write_bytes(manifest.read_bytes()[:-40]),
    }[damage]()
    with caplog.at_level(logging.WARNING):
        assert find_newest(tmp_path) == tmp_path / "checkpoint-5"
    assert any(record.levelno == logging.WARNING and "checkpoint-10" in record.message for record in caplog.records)


def test_nothing_to_resume_from_is_none(tmp_path: Path) -> None:
    assert find_newest(tmp_path) is None
    assert find_newest(tmp_path / "absent") is None


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    _save(tmp_path, 9, 10, 100)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert find_newest(tmp_path) == tmp_path / "checkpoint-100"


# --- retention


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [1, 2, 3, 4, 5]),
        (1, None, [4, 5]),
        (1, 2, [2, 4, 5]),
        (1, 5, [4, 5]),
        (2, 2, [2, 4, 5]),
        (3, 2, [2, 4, 5]),
        (3, None, [3, 4, 5]),
        (4, 1, [1, 3, 4, 5]),
        (4, 4, [2, 3, 4, 5]),
        (9, 1, [1, 2, 3, 4, 5]),
        (0, None, [4, 5]),
    ],
)
def test_best_and_the_newest_two_stay_whatever_the_limit(keep: int | None, best: int | None, left: list[int], tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, 5)
    prune(tmp_path, keep=keep, best=None if best is None else f"/moved/run/checkpoint-{best}")
    assert _names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_damaged_checkpoints_do_not_count_among_the_two(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, 5)
    for step in (2, 5):
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"damaged")
    prune(tmp_path, keep=1)
    assert _names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    _save(tmp_path, 6)
    prune(tmp_path, keep=1)
    assert _names(tmp_path) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_damage_after_publication_is_seen_by_retention(tmp_path: Path) -> None:
    """What this process wrote is not read again at every save, unless something touched it."""
    _save(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"weights of X")
    prune(tmp_path, keep=1)
    assert _names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_retention_does_not_read_the_weights_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import orpo.checkpoint.manifest as module

    _save(tmp_path, 1, 2, 3)
    monkeypatch.setattr(module, "hash_file", lambda path: pytest.fail(f"{path} was read"))
    assert prune(tmp_path, keep=1) == [tmp_path / "checkpoint-1"]


# --- replacing and failing


def test_existing_checkpoint_of_the_step_is_replaced(tmp_path: Path) -> None:
    _save(tmp_path, 4)
    publish(tmp_path, 4, _writer(b"second attempt"), facts={})
    assert _names(tmp_path) == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes() == b"second attempt"


def test_foreign_folder_of_the_name_is_kept_beside(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-4"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"somebody's")
    _save(tmp_path, 4)
    verify(foreign)
    beside = next(path for path in tmp_path.iterdir() if ".foreign-" in path.name)
    assert (beside / "pytorch_model.bin").read_bytes() == b"somebody's"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_earlier_state(error: BaseException, tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        publish(tmp_path, 2, write, facts={})
    assert caught.value is error
    assert _names(tmp_path) == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


def test_a_file_that_may_not_be_written_is_told_as_the_users(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "x"))

    with pytest.raises(CheckpointError, match="could not be written.*Permission denied"):
        publish(tmp_path, 2, write, facts={})


def test_a_link_among_the_written_files_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    with pytest.raises(UserError):
        publish(tmp_path / "run", 1, lambda folder: (folder / "model.safetensors").symlink_to(outside), facts={})
    assert _names(tmp_path / "run") == []


def test_staging_of_dead_runs_is_removed_at_start(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / ".staging-checkpoint-2-0badcafe" / "deep").mkdir(parents=True)
    (tmp_path / ".staging-checkpoint-2-0badcafe" / "deep" / "half").write_bytes(b"half")
    (tmp_path / ".staging-notes").mkdir()
    recover(tmp_path)
    assert _names(tmp_path) == [".staging-notes", "checkpoint-1"]


# --- a full disk


@pytest.fixture(params=disks.KINDS)
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system with 4 MiB free."""
    with disks.small_disk(tmp_path / "disk", request.param, 4 * 2**20) as folder:
        yield folder


def _tensors(folder: Path, mebibytes: int) -> None:
    import torch
    from safetensors.torch import save_file

    (folder / "small.json").write_text("{}")
    save_file({"weight": torch.randn(mebibytes * 2**18)}, folder / "model.safetensors")


@pytest.mark.parametrize("by", ["safetensors", "python"])
def test_full_disk_is_told_with_figures_and_nothing_is_lost(by: str, small_disk: Path) -> None:
    publish(small_disk, 1, lambda folder: _tensors(folder, 2), facts={})

    def write(folder: Path) -> None:
        if by == "python":
            (folder / "a.bin").write_bytes(bytes(2**19))
            (folder / "b.bin").write_bytes(bytes(3 * 2**20))
        _tensors(folder, 2)

    with pytest.raises(CheckpointError) as caught:
        publish(small_disk, 2, write, facts={})
    free = shutil.disk_usage(small_disk).free
    assert f"{free:,} are free" in str(caught.value)
    assert f"it needs {verify(small_disk / 'checkpoint-1').num_bytes:,} bytes" in str(caught.value)
    assert _names(small_disk) == ["checkpoint-1"]
    assert find_newest(small_disk) == small_disk / "checkpoint-1"
    # What was removed gives its room back, so the run can go on with a smaller save.
    publish(small_disk, 2, lambda folder: _tensors(folder, 1), facts={})


def test_full_disk_at_the_first_save_says_what_is_known(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it needs more than [\d,]+ bytes, [\d,]+ are free"):
        publish(small_disk, 1, lambda folder: _tensors(folder, 8), facts={})
    assert _names(small_disk) == []


def test_a_limit_on_file_sizes_is_no_full_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="larger than may be written here") as found:
            publish(tmp_path, 3, _writer(b"x" * 100_000), facts={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ulimit -f" in str(found.value)
    assert not list(tmp_path.iterdir())


def test_disk_full_at_the_manifest_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo.system import files as fs

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(fs, "write_file", full)
    with pytest.raises(CheckpointError, match="no room"):
        _save(tmp_path, 1)
    assert _names(tmp_path) == []


# --- several ranks, as threads


class _ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, world_size: int, shared: dict[str, Any]) -> None:
        super().__init__(rank, world_size)
        self._shared = shared

    def gather(self, value: Any) -> list[Any]:
        self._shared["values"][self.rank] = value
        self._shared["barrier"].wait(20)
        values = list(self._shared["values"])
        self._shared["barrier"].wait(20)
        return values


def _on_ranks(number: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Each rank's result or exception."""
    shared = {"values": [None] * number, "barrier": threading.Barrier(number)}
    results: list[Any] = [None] * number

    def run(rank: int) -> None:
        try:
            results[rank] = work(_ThreadRanks(rank, number, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_each_rank_writes_its_own_and_rank_0_publishes(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Path:
        def write(folder: Path) -> None:
            (folder / "state").mkdir()
            (folder / "state" / f"rng-{ranks.rank}.json").write_text(str(ranks.rank))
            if ranks.is_first:
                _writer()(folder)

        return publish(tmp_path, 7, write, facts={}, ranks=ranks)

    assert _on_ranks(3, work) == [tmp_path / "checkpoint-7"] * 3
    manifest = verify(tmp_path / "checkpoint-7")
    assert manifest.world_size == 3
    assert set(manifest.files) == {"model.safetensors", "sub/state.json", *(f"state/rng-{rank}.json" for rank in range(3))}
    assert (tmp_path / "checkpoint-7" / "state" / "rng-2.json").read_text() == "2"
    assert sorted(path.name for path in (tmp_path / "checkpoint-7").iterdir()) == ["manifest.json", "model.safetensors", "state", "sub"]


@pytest.mark.parametrize("bad", [0, 1])
def test_if_one_rank_fails_none_publishes_and_all_raise(bad: int, tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def work(ranks: Ranks) -> Path:
        def write(folder: Path) -> None:
            (folder / f"file-{ranks.rank}").write_text("x")
            if ranks.rank == bad:
                raise ValueError("this rank's own trouble")

        return publish(tmp_path, 2, write, facts={}, ranks=ranks)

    results = _on_ranks(2, work)
    assert type(results[bad]) is ValueError
    assert isinstance(results[1 - bad], PeerError)
    assert f"rank {bad} failed first" in str(results[1 - bad])
    assert "this rank's own trouble" in str(results[1 - bad])
    assert _names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1}, {1, 2}])
def test_a_disk_that_fails_is_told_by_the_first_rank_that_met_it_with_the_exit_code_of_all(bad: set[int], tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Path:
        def write(folder: Path) -> None:
            if ranks.rank in bad:
                raise OSError(errno.ENOSPC, "No space left on device")

        return publish(tmp_path, 2, write, facts={}, ranks=ranks)

    results = _on_ranks(3, work)
    assert [getattr(error, "exit_code", None) for error in results] == [2, 2, 2]
    assert [rank for rank, error in enumerate(results) if not isinstance(error, ToldElsewhereError)] == [min(bad)]
    assert "no room for the checkpoint" in str(results[min(bad)])


def test_ranks_that_write_the_same_name_are_refused(tmp_path: Path) -> None:
    results = _on_ranks(2, lambda ranks: publish(tmp_path, 1, lambda folder: (folder / "same").write_text("x"), facts={}, ranks=ranks))
    assert "more than once" in str(results[0])
    assert isinstance(results[1], PeerError)
    assert _names(tmp_path) == []
