"""The examples in docstrings: every name of the reference page has one, and they run as the page says, in its order and in one session."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import orpo
import orpo.objective
from orpo.system.callables import CallablePackage

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
NAMES = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
TRAINS_FOR_LONG = "orpo.compare"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def thing(name: str) -> Any:
    """What the page documents under a name; of a package that can be called, its function."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    return found.called if isinstance(found, CallablePackage) else found


def run(names: list[str], where: Path, known: dict[str, Any]) -> None:
    """The examples of these names in one session."""
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    told: list[str] = []
    for name in names:
        example = doctest.DocTestParser().get_doctest(inspect.getdoc(thing(name)) or "", known, name, str(where), 0)
        runner.run(example, out=told.append, clear_globs=False)
        known.update(example.globs)
    assert not told, "".join(told)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    """What the page says there is: pairs.jsonl, model, orpo.yaml."""
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "orpo.yaml").write_text("model_name_or_path: model\ndataset_name: orpo-demo\nmax_steps: 2\n", encoding="utf-8")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_every_public_name() -> None:
    public = {f"orpo.{name}" for name in orpo.__all__ if name != "__version__"}
    public |= {f"orpo.objective.{name}" for name in orpo.objective.__all__ if inspect.isclass(getattr(orpo.objective, name))}
    public |= {f"orpo.objective.{name}" for name in orpo.objective.__all__ if inspect.isfunction(getattr(orpo.objective, name))}
    assert public <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(thing(name)) or "")


def test_examples_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run([name for name in NAMES if name != TRAINS_FOR_LONG], folder, {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_that_trains_for_long_runs(folder: Path) -> None:
    run([TRAINS_FOR_LONG], folder, {})
