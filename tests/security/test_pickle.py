"""Nothing in a checkpoint is unpickled: a pickle that leaves a canary when it is opened, in every place a resume looks at."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults.forked import Zygote, marks
from orpo.checkpoint import find_newest, load_optimizer, load_rng, load_scheduler, load_state, read_manifest
from orpo.checkpoint.manifest import MANIFEST_NAME, Manifest, hash_file
from orpo.errors import CheckpointError


class Canary:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a pickle was opened"


def _plain(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def _torch(canary: Path, folder: Path) -> bytes:
    path = folder / "poison.pt"
    torch.save({"state": Canary(canary)}, path)
    content = path.read_bytes()
    path.unlink()
    return content


def test_the_canary_sings_when_it_is_opened(tmp_path: Path) -> None:
    for index, content in enumerate((_plain(tmp_path / "canary"), _torch(tmp_path / "canary", tmp_path))):
        path = tmp_path / f"{index}.pt"
        path.write_bytes(content)
        _ = pickle.loads(content) if index == 0 else torch.load(path, weights_only=False)  # noqa: S301
        assert (tmp_path / "canary").exists()
        (tmp_path / "canary").unlink()


def test_loaders_of_state_refuse_pickles(canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for content in (_plain(canary), _torch(canary, tmp_path)):
        for name in ("optimizer", "scheduler", "rng-0", "tree"):
            (folder / f"{name}.json").write_bytes(content)
        with pytest.raises(CheckpointError):
            load_optimizer(optimizer, folder)
        with pytest.raises(CheckpointError):
            load_scheduler(scheduler, folder)
        with pytest.raises(CheckpointError):
            load_rng(folder)
        (folder / "tree.json").write_text('{"$": "tensor", "name": "00000"}')
        (folder / "tree.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError):
            load_state(folder, "tree")


def _rewrite_manifest(checkpoint: Path) -> None:
    """What an attacker who can write to the folder would do: a manifest that verifies."""
    old = read_manifest(checkpoint)
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    files = {name: hash_file(checkpoint / name) for name in names}
    (checkpoint / MANIFEST_NAME).write_bytes(Manifest(old.step, old.world_size, files, old.facts, old.versions).to_bytes())


@pytest.fixture
def stopped(forks: Zygote, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The newest checkpoint of a run that was killed."""
    run = tmp_path / "run"
    forks.run("train", tmp_path / "log", run_dir=str(run), kill_after="checkpoint-6", lora=getattr(request, "param", False))
    newest = find_newest(run)
    assert newest is not None
    assert newest.name == "checkpoint-6"
    return newest


PASSED_BY = [
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "trainer_state.pkl",
]  # fmt: skip


@pytest.mark.parametrize("stopped", [False, True], indirect=True, ids=["full", "lora"])
def test_pickles_that_other_trainers_would_open_are_passed_by(stopped: Path, forks: Zygote, canary: Path, tmp_path: Path) -> None:
    for name in PASSED_BY:
        (stopped / name).write_bytes(_torch(canary, tmp_path))
    _rewrite_manifest(stopped)
    log = tmp_path / "resumed.log"
    lora = (stopped / "adapter_model.safetensors").exists()
    assert forks.run("train", log, run_dir=str(stopped.parent), lora=lora) == 0, log.read_text()
    assert marks(log)[0] == "step 7"


@pytest.mark.parametrize("stopped", [True], indirect=True, ids=["lora"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("is_named", [True, False], ids=["in the manifest", "beside it"])
def test_weights_as_a_pickle_beside_the_right_ones_stop_the_resume(
    is_named: bool, name: str, stopped: Path, forks: Zygote, canary: Path, tmp_path: Path
) -> None:
    """transformers opens pytorch_model.bin of an adapter's checkpoint before it looks for the adapter."""
    (stopped / name).write_bytes(_torch(canary, tmp_path))
    if is_named:
        _rewrite_manifest(stopped)
    _is_refused(forks, stopped, tmp_path, "weights as a pickle, which is never opened")


@pytest.mark.parametrize("stopped", [True], indirect=True, ids=["lora"])
def test_weights_that_the_manifest_does_not_name_stop_the_resume(stopped: Path, forks: Zygote, tmp_path: Path) -> None:
    shutil.copy(stopped / "adapter_model.safetensors", stopped / "model.safetensors")
    _is_refused(forks, stopped, tmp_path, "a file that its manifest does not name")


def _is_refused(forks: Zygote, checkpoint: Path, tmp_path: Path, text: str) -> None:
    log = tmp_path / "resumed.log"
    assert forks.run("train", log, run_dir=str(checkpoint.parent), lora=True) == 2, log.read_text()
    assert text in log.read_text()
    assert not marks(log)


@pytest.mark.parametrize("stopped", [True], indirect=True, ids=["lora"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "rng-0.json", "scheduler.json"])
def test_a_pickle_in_place_of_a_file_stops_the_resume(name: str, stopped: Path, forks: Zygote, canary: Path, tmp_path: Path) -> None:
    (stopped / name).write_bytes(_torch(canary, tmp_path))
    _rewrite_manifest(stopped)
    _is_refused(forks, stopped, tmp_path, "cannot be read")


@pytest.mark.parametrize("stopped", [True], indirect=True, ids=["lora"])
def test_weights_that_are_there_only_as_a_pickle_stop_the_resume(stopped: Path, forks: Zygote, canary: Path, tmp_path: Path) -> None:
    (stopped / "adapter_model.safetensors").unlink()
    (stopped / "adapter_model.bin").write_bytes(_torch(canary, tmp_path))
    _rewrite_manifest(stopped)
    _is_refused(forks, stopped, tmp_path, "weights as a pickle")
