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


def test_the_results_are_of_both_trainers_on_real_rows_or_the_page_says_otherwise() -> None:
    for result in RESULTS:
        assert result["rows"] != "made up" or f"`{result['data']}` are made-up rows" in PAGE
        assert len(result["seconds"]["trl"]) == len(result["seconds"]["orpo"]) == result["num_steps"]
        assert result["throughput_ratio"] == pytest.approx(sum(result["seconds"]["trl"]) / sum(result["seconds"]["orpo"]))


def test_the_counts_of_a_layer_are_those_of_the_results_and_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators, not times: an operator more in a layer shows here, and `python benchmarks/launches.py --out …` writes them anew."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import launches

    results = json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text(encoding="utf-8"))
    assert launches.table(results) in PAGE
    today = launches.measure(["4 UltraFeedback groups"])
    for way, found in today["4 UltraFeedback groups"].items():
        # Another version of transformers may write a norm in a few operators more.
        assert found["operators"] <= results["4 UltraFeedback groups"][way]["operators"] * 1.1, way
        assert found["attention_calls"] == results["4 UltraFeedback groups"][way]["attention_calls"], way


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


def test_the_table_of_tokenising_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tokenising

    results = json.loads((ROOT / "benchmarks" / "results" / "tokenising.json").read_text(encoding="utf-8"))
    assert tokenising.table(results) in PAGE


def test_the_table_of_an_adapter_s_rate_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import lora_rate

    results = json.loads((ROOT / "benchmarks" / "results" / "lora_rate.json").read_text(encoding="utf-8"))
    assert lora_rate.table(results) in (ROOT / "docs" / "guides" / "hyperparameters.md").read_text(encoding="utf-8")
