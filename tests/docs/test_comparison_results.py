"""benchmarks/comparison: the page's tables are those of the committed results, and the results are of whole, fair comparisons."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "comparison"
RESULTS = sorted((FOLDER / "results").glob("*.json"))


@pytest.fixture(scope="module", params=RESULTS, ids=lambda path: path.stem)
def facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_the_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", FOLDER / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"<!-- {path.stem} -->" in page for path in RESULTS)
    assert tables.written(page) == page, "run benchmarks/comparison/tables.py --write"
    for path in RESULTS:
        assert tables.figure(path.stem) == (FOLDER / f"{path.stem}.svg").read_text(encoding="utf-8")
        assert f"({path.stem}.svg)" in page


def test_a_comparison_is_whole(facts: dict[str, Any]) -> None:
    assert facts["status"] == "complete"
    assert list(facts["methods"]) == ["sft", "sft+dpo", "simpo", "orpo"]
    for method in facts["methods"].values():
        assert [run["seed"] for run in method["runs"]] == facts["options"]["seeds"]
        assert not any(run["totals"]["is_partial"] for run in method["runs"])


def test_every_method_had_the_same_rates_and_rows(facts: dict[str, Any]) -> None:
    rates = [{trial["options"]["learning_rate"] for trial in method["trials"]} for method in facts["methods"].values()]
    assert rates == [set(facts["options"]["learning_rates"])] * 4
    for method in facts["methods"].values():
        for run in method["runs"]:
            assert {stage["num_pairs"] for stage in run["stages"]} == {facts["data"]["num_train"]}


def test_no_path_of_a_machine_is_in_the_results() -> None:
    for path in RESULTS:
        assert not re.search(r'"/\w', path.read_text(encoding="utf-8"))


def test_the_explainer_tells_the_same() -> None:
    """docs/how-orpo-works.md has a short form of the table."""
    page = (FOLDER.parents[1] / "docs" / "how-orpo-works.md").read_text(encoding="utf-8")
    facts = json.loads((FOLDER / "results" / "rasbt.json").read_text(encoding="utf-8"))
    for method in facts["methods"].values():
        values = [method["summary"][name]["value"] for name in ("margin", "chosen_logp", "rejected_logp")]
        cells = [f"{100 * method['summary']['accuracy']['value']:.1f} %", *(f"{value:+.3f}".replace("-", "−") for value in values)]
        flops = sum(run["totals"]["flops"] for run in method["runs"]) / len(method["runs"])
        assert f"| {' | '.join([method['label'], *cells, f'{flops / 1e12:.1f} TFLOP'])} |" in page
