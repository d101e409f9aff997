"""benchmarks/onpolicy: the page's tables are those of the committed results, and the prompts are what the page says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "onpolicy"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"onpolicy_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_tables_are_those_of_the_results() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert module("tables").written(page) == page, "run benchmarks/onpolicy/tables.py --write"


def test_cells_are_whole() -> None:
    text = (FOLDER / "results" / "cells.json").read_text(encoding="utf-8")
    assert not re.search(r'"/\w', text), "a path of a machine"
    cells = json.loads(text)["cells"]
    assert cells
    for name, cell in cells.items():
        assert cell["num_prompts"] == len(cell["by_prompt"]) == 100, name
        assert cell["num_answers"] == 200, name
        assert cell["num_unscored"] == 0, name
        assert abs(sum(cell["by_prompt"]) / 100 - cell["value"]) < 1e-9, name


def test_prompts_are_of_one_side_each() -> None:
    tasks = module("tasks")
    for task, make in tasks.ROWS.items():
        train, held_out = ({row["prompt"] for row in rows} for rows in make())
        assert (len(train), len(held_out)) == (tasks.NUM_TRAIN, tasks.NUM_HELD_OUT), task
        assert not train & held_out
    assert not set(tasks.TOPICS[: tasks.NUM_TRAIN_TOPICS]) & set(tasks.TOPICS[tasks.NUM_TRAIN_TOPICS :])


def test_the_checks_tell_right_from_wrong() -> None:
    tasks = module("tasks")
    assert tasks.three_lines("", "1. Red\n2. Blue\n3. Light green\n")
    for wrong in (
        "",
        "1. Red",
        "1. Red\n2. Blue\n3. Green\n4. Pink",
        "Here:\n1. Red\n2. Blue\n3. Green",
        "1. Red\n\n2. Blue\n3. Green",
        "- Red\n- Blue\n- Green",
    ):
        assert not tasks.three_lines("", wrong)
    assert tasks.right_number("", "7 and 5 is 12.", {"answer": 12})
    assert not tasks.right_number("", "twelve", {"answer": 12})
    assert not tasks.right_number("", "12, or 13", {"answer": 12})
