"""The benchmark for a GPU, tried on a CPU with tiny shapes: every way out of an arm, the results as they grow, table and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def test_a_dry_run_fills_the_table(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("TRL", "orpo, padded", "orpo, sdpa", "orpo, flex", "Liger's fused ORPO loss")
    monkeypatch.setattr(gpu, "ARMS", tuple(arm for arm in gpu.ARMS if arm.name in wanted))
    assert gpu.main(["--dry", "--minutes", "3", "--cells", "1", "--no-trace", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    arms = results["cells"]["Qwen2.5-3B, HH"]
    assert list(arms) == list(wanted)
    for name in wanted[:3]:
        assert len(arms[name]["seconds"]) == 2
        assert arms[name]["pairs_per_s"] > 0
        assert 0 < arms[name]["share_of_matmul"] < 1
    assert "trains on cuda alone" in arms["orpo, flex"]["cannot"]
    assert "cannot" in arms["Liger's fused ORPO loss"]
    told = capsys.readouterr().out
    assert told.strip() == (tmp_path / "gpu.txt").read_text().strip()
    assert "nothing here says anything of a GPU" in told
    assert "(goal 2.5)" in told
    assert (tmp_path / "gpu.svg").read_text().count("<rect") == 3


def test_without_time_everything_is_named_and_nothing_run(gpu: Any, tmp_path: Path) -> None:
    assert gpu.main(["--dry", "--minutes", "0", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "gpu.txt").read_text()
    assert table.count("no time left") == len(gpu.CELLS) == 8


def test_an_arm_that_fails_costs_the_others_nothing(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(gpu.Arm):
        def build(self, cell: Any, step_rows: int) -> Any:
            raise RuntimeError("no kernel image is available")

    sound = next(arm for arm in gpu.ARMS if arm.name == "orpo, sdpa")
    monkeypatch.setattr(gpu, "ARMS", (Broken("broken", "ours"), sound))
    assert gpu.main(["--dry", "--minutes", "3", "--cells", "1", "--no-trace", "--out", str(tmp_path)]) == 0
    arms = json.loads((tmp_path / "gpu.json").read_text())["cells"]["Qwen2.5-3B, HH"]
    assert arms["broken"] == {"failed": "RuntimeError: no kernel image is available"}
    assert arms["orpo, sdpa"]["pairs_per_s"] > 0


def test_useful_operations_are_those_of_the_packed_row(gpu: Any) -> None:
    import torch

    cell = gpu.load(gpu.TINY["Qwen2.5-3B"], (16, 4, 5), 2, 1, torch.device("cpu"))
    weights = sum(parameter.numel() for parameter in cell.model.parameters())
    (group,) = cell.groups[:1]
    prompt, (first, second) = len(group.prompt_ids), map(len, group.response_ids)
    seen = prompt**2 / 2 + first * prompt + first**2 / 2 + second * prompt + second**2 / 2
    assert gpu.flops_of(cell, [group]) == 6 * weights * (prompt + first + second) + 12 * 2 * 64 * seen


def test_without_a_gpu_the_real_run_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err
