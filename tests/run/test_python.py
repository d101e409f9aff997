"""What `from orpo import …` gives: audit, preview, evaluate and compare as functions, whatever was imported before them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from htmlpages import HOSTILE
from orpo import audit, compare, evaluate, preview
from orpo.errors import UserError

SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture
def model(tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    items = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(12)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.mark.parametrize("before", ["", "import orpo.audit.auditor, orpo.evaluate.suite, orpo.compare.methods", "import orpo.cli.audit"])
def test_the_names_are_functions_whatever_was_imported_before(before: str) -> None:
    code = "\n".join(
        [
            before,
            "from orpo import audit, preview, evaluate, compare",
            "assert all(map(callable, (audit, preview, evaluate, compare)))",
            "from orpo.audit import run_audit",
            "from orpo.compare import compare as plain",
            "import orpo.evaluate.pairs",
            "assert callable(orpo.audit) and callable(orpo.evaluate)",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_an_audit_is_printed_and_shown(rows: Path, model: Path) -> None:
    found = audit(str(rows), model=str(model))
    assert found.num_rows == 12
    assert found.tokens is not None
    assert str(found).splitlines() == list(found.lines())
    assert found._repr_html_().startswith("<p><b>")


def test_a_preview_shows_the_ids_of_training_and_no_markup_of_the_data(model: Path) -> None:
    text = HOSTILE[0] if isinstance(HOSTILE, (list, tuple)) else str(HOSTILE)
    shown = preview([{"prompt": text, "chosen": f"good {text}", "rejected": "bad"}], str(model), num=1, max_length=900)
    (row,) = shown.rows
    assert row.segments[0].name == "prompt"
    assert str(shown).startswith("template ")
    page = shown._repr_html_()
    assert "<script" not in page
    assert f"title='id {row.segments[0].tokens[0].id}'" in page
    with pytest.raises(UserError, match="max_lenght"):
        preview("orpo-demo", str(model), max_lenght=9)


def test_evaluate_measures_a_model(rows: Path, model: Path, tmp_path: Path) -> None:
    found = evaluate(str(model), tasks=("pairs",), data=str(rows), output=tmp_path / "eval", has_before=False)
    assert "'num_pairs': 12" in str(found["pairs"]["result"])
    with pytest.raises(UserError):
        evaluate(str(tmp_path / "nothing"), tasks=("pairs",), data=str(rows), output=tmp_path / "eval2")


def test_compare_takes_a_file_and_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_method"):
        compare("recipes/demo.yaml", methods=("no_such_method",), output=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ("", {}, "10000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "passive"}, "None"),
        ("sys.modules['torch'] = None", {}, "None"),
    ],
)
def test_a_script_s_threads_wait_as_a_command_s_where_torch_is_not_loaded_yet(before: str, given: dict[str, str], expected: str) -> None:
    """The first public name loads torch; a stand-in for its home keeps this quick."""
    code = f"import sys, types; {before}\nimport orpo, os\nsys.modules['orpo.run.look'] = types.SimpleNamespace(preview=1)\norpo.preview\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]
