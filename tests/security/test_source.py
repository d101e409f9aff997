"""What the source may not contain: unpickling, shells, unsafe YAML, evaluation of text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import orpo

SOURCE = Path(orpo.__file__).parent
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
SHELLS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput")}


def _keyword(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else keyword.value
    return None


def problems(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {item.name}") for item in node.names if item.name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            yield node.lineno, f"from {node.module}"
        elif isinstance(node, ast.Call):
            yield from _call_problems(node)


def _call_problems(call: ast.Call) -> Iterator[tuple[int, str]]:
    function = call.func
    if isinstance(function, ast.Name) and function.id in ("eval", "exec"):
        yield call.lineno, function.id
    if _keyword(call, "shell") not in (None, False):
        yield call.lineno, "shell="
    if _keyword(call, "allow_pickle") not in (None, False):
        yield call.lineno, "allow_pickle="
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
        return
    name = (function.value.id, function.attr)
    if name in SHELLS:
        yield call.lineno, ".".join(name)
    if name == ("torch", "load") and _keyword(call, "weights_only") is not True:
        yield call.lineno, "torch.load without weights_only=True"
    if name in {("torch", "save"), ("torch", "package")}:
        yield call.lineno, "torch.save"
    if name[0] == "yaml" and name[1] in {"load", "load_all", "unsafe_load", "full_load"}:
        yield call.lineno, f"yaml.{name[1]}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_holds_nothing_unsafe(path: Path) -> None:
    assert list(problems(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "torch.save(x, p)", "eval(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)", "os.system(x)", "np.load(p, allow_pickle=True)", "yaml.load(x, L)",
    ],
)  # fmt: skip
def test_the_search_finds_each(text: str) -> None:
    assert len(list(problems(ast.parse(text)))) == 1


@pytest.mark.parametrize("text", ["torch.load(p, weights_only=True)", "yaml.safe_load(x)", "subprocess.run([x])", "json.loads(x)"])
def test_the_search_lets_pass(text: str) -> None:
    assert not list(problems(ast.parse(text)))
