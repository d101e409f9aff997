"""Names and secrets around a real run: no shell sees a path, no secret lands in what a run writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.forked import TOKEN, Zygote
from orpo.checkpoint import find_newest


@pytest.mark.parametrize(
    "name", ["$(touch canary)", "a; touch canary", "`touch canary`", "x && touch canary #", "-rf", "a'b\"c", "é ü 日本", " space "]
)
def test_shell_metacharacters_in_a_path_are_only_letters(name: str, forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / name, tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), options={"max_steps": 3}) == 0, log.read_text()
    assert find_newest(run) == run / "checkpoint-3"
    assert not list(tmp_path.rglob("canary"))
    assert not (Path.cwd() / "canary").exists()


def test_tokens_in_environment_and_configuration_stay_there(forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"max_steps": 3, "hub_token": TOKEN, "hub_model_id": "me/model", "run_name": f"with {TOKEN}"}
    assert forks.run("train", log, run_dir=str(run), options=options) == 0, log.read_text()
    files = [path for path in [log, *run.rglob("*")] if path.is_file()]
    assert len(files) > 8
    holders = [path.name for path in files if TOKEN.encode() in path.read_bytes()]
    assert holders == []
