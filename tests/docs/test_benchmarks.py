"""The benchmarks run as they stand: both trainers in turn on a tiny model, made-up rows, no file of real data needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinymodels import build_tiny_model, build_tiny_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling
    import throughput
    import throughput_worker

    return throughput, throughput_worker, scaling


@pytest.mark.slow
@pytest.mark.parity
def test_both_trainers_take_steps_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    build_tiny_model("llama", vocab_size=384, num_layers=2, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--data", "hh", "--method", "full", "--precision", "fp32", "--steps", "2", "--max-length", "2048", "--made-up"]
    command = [sys.executable, "throughput.py", *options, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "results.json")]
    run = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert "| hh, full, fp32 |" in run.stdout
    assert result["rows"] == "made up"
    assert len(result["packed_tokens"]) == len(result["seconds"]["trl"]) == len(result["seconds"]["orpo"]) == 2
    assert min(result["packed_tokens"]) > 4 * 3 * 10  # four groups of three texts
    assert result["throughput_ratio"] > 0.2  # tiny models are all overhead; that it is not ten times slower is all that can be said
    assert 0.2 < result["memory_ratio"] < 2.0
    assert result["machine"]["threads"] == 1
    again = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0
    assert again.stdout == run.stdout  # what is measured already is not measured again


def test_rows_are_made_up_where_there_are_none(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about the lengths of the real ones, and the same ones every time."""
    _, worker, _ = scripts
    monkeypatch.setattr(worker, "FILES", {"hh": Path("absent"), "sharegpt": Path("absent")})
    tokenizer = build_tiny_tokenizer()
    for data, words in worker.WORDS.items():
        rows = worker.load_rows(data, tokenizer, 12, max_length=20_000)
        assert rows == worker.load_rows(data, tokenizer, 12, max_length=20_000)
        assert len(rows) == 12
        for name, expected in zip(("prompt", "chosen", "rejected"), words, strict=True):
            lengths = [len(row[name][0]["content"].split()) for row in rows]
            assert 0.6 * expected < sum(lengths) / len(lengths) < 1.5 * expected
        assert worker.kind_of_rows(data, made_up=False) == "made up"


def test_the_floor_counts_every_product_of_a_step(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of seven linear ones, and the head: three products each where they are trained, two where frozen."""
    import torch

    _, worker, _ = scripts
    model = build_tiny_model("llama", vocab_size=384, num_layers=2)
    monkeypatch.setattr(worker, "_best", lambda product: float(product() is not None))
    assert worker.matmul_floor(model, is_full=True, dtype=torch.float32)(5) == 15 * 3
    assert worker.matmul_floor(model, is_full=False, dtype=torch.float32)(5) == 15 * 2 + 14 * 2 * 3


def test_the_figure_is_drawn_from_the_points(scripts: Any, tmp_path: Path) -> None:
    *_, scaling = scripts
    points = [{"prompt_tokens": size, "ms_per_token": 2.0 + size / 1000, "ms_per_token_without_attention": 2.0} for size in scaling.PROMPTS]
    scaling.draw(points, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert all(f">{size}</text>" in text for size in scaling.PROMPTS)
    flat = next(line for line in text.splitlines() if "polyline" in line and "#d9822b" in line)
    heights = {point.split(",")[1] for point in flat.split('points="')[1].split('"')[0].split()}
    assert len(heights) == 1
