"""Whether a run is the same as the one that saved: options that only one of two versions has."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo import ORPOConfig
from orpo.checkpoint import Manifest
from orpo.errors import CheckpointError
from orpo.run.hold import RunHold, options_as_facts


def held(folder: Path, config: dict[str, object], **versions: str) -> RunHold:
    """A hold on a run that goes on from a checkpoint with these options."""
    hold = RunHold(folder)
    hold.checkpoint, hold.manifest = folder / "checkpoint-1", Manifest(1, 1, {}, {"config": config}, versions)
    return hold


def test_every_option_may_be_newer_than_the_checkpoint_as_long_as_it_is_at_its_default(tmp_path: Path) -> None:
    now = options_as_facts(ORPOConfig(output_dir=str(tmp_path)))
    for name in now:
        before = {key: value for key, value in now.items() if key != name}
        held(tmp_path, before).require_same(allow=False, config=now)


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"disable_dropout": False}, {"max_grad_norm": 0.0}], ids=str)
def test_a_newer_option_that_is_set_is_a_difference(change: dict[str, float], tmp_path: Path) -> None:
    now = options_as_facts(ORPOConfig(output_dir=str(tmp_path), **change))
    (name,) = change
    with pytest.raises(CheckpointError, match=f"config.{name}: .absent."):
        held(tmp_path, {key: value for key, value in now.items() if key != name}).require_same(allow=False, config=now)


def test_an_option_that_is_gone_is_told_with_another_version_and_refused_with_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = options_as_facts(ORPOConfig(output_dir=str(tmp_path)))
    before = {**now, "once_here": 1}
    held(tmp_path, before, transformers="5.16.0").require_same(allow=False, config=now)
    assert "options of the checkpoint that this version does not have: once_here" in caplog.text
    with pytest.raises(CheckpointError, match="config.once_here: 1 -> .absent."):
        held(tmp_path, before).require_same(allow=False, config=now)
