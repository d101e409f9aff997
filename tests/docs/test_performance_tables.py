"""The tables of speed and memory are those of the committed results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "throughput.json").read_text(encoding="utf-8"))


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("throughput", None)
    import throughput

    return throughput


def test_the_page_shows_every_case(throughput: Any) -> None:
    assert throughput.table(RESULTS) in PAGE


def test_the_results_are_of_both_trainers_on_real_rows() -> None:
    for result in RESULTS:
        assert result["rows"] != "made up"
        assert len(result["seconds"]["trl"]) == len(result["seconds"]["orpo"]) == result["num_steps"]
        assert result["throughput_ratio"] == pytest.approx(sum(result["seconds"]["trl"]) / sum(result["seconds"]["orpo"]))


@pytest.mark.parametrize(("data", "words"), [("hh", "prompt-heavy dialogues"), ("sharegpt", "long answers")])
@pytest.mark.parametrize(("method", "name"), [("full", "full fine-tuning"), ("lora", "LoRA")])
def test_the_readme_rounds_them(data: str, words: str, method: str, name: str) -> None:
    (result,) = [
        item
        for item in RESULTS
        if (item["data"], item["method"], item["precision"], item["checkpointing"]) == (data, method, "bf16", False)
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| {words}") and f", {name} |" in line)
    throughput_ratio, memory_ratio = map(float, re.findall(r"([\d.]+) ×", row))
    assert throughput_ratio == round(result["throughput_ratio"], 1)
    assert memory_ratio == round(result["memory_ratio"], 2)


def test_the_figure_of_cost_against_length_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    results = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text(encoding="utf-8"))
    scaling.draw(results["length"], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text() == (ROOT / "docs" / "figures" / "cost-by-length.svg").read_text()
    for point in results["length"]:
        assert f"| {point['prompt_tokens']:,} | {point['ms_per_token']:.2f} | {point['ms_per_token_without_attention']:.2f} |" in PAGE
