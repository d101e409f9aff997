"""The plan of the house, read from the imports: rooms on floors, no circle, files and functions that can be held in the head."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "orpo"

FLOORS = (
    {"errors"},
    {"objective"},
    {"webpage", "system"},
    {"data", "models", "checkpoint"},
    {"audit", "engine", "config"},
    {"run"},
    {"report", "inference"},
    {"training"},
    {"evaluate"},
    {"compare", "onpolicy", "playground"},
    {"cli"},
    {"__init__", "__main__"},
)
"""From the ground up. A room imports from floors below its own, and from nothing beside it."""

PUBLIC_FACE = {"__init__", "__main__", "errors"}
"""The only files that stand outside of any room."""

SHARED_NAMES = {
    # a name that the room's own name tells apart at once: `run/data.py` and `compare/data.py`
    "data", "facts", "options", "pairs", "preview", "export", "process", "comparison", "methods", "tokens",
}  # fmt: skip

MOST_LINES, MOST_FUNCTION_LINES = 450, 70

# What the seams still have to mend; each goes with its seam.


@cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; `__init__` for the package itself. Recipes are copied, not imported."""
    found = {}
    for path in sorted(set(ROOT.rglob("*.py")) - set((ROOT / "recipes").rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of the package that a file imports: at its top, inside functions, and for types alone."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orpo":
            base = node.module.removeprefix("orpo").removeprefix(".")  # type: ignore[union-attr]
            for name in node.names:
                full = f"{base}.{name.name}" if base else name.name
                yield (full if full in modules() else base or "__init__"), node.lineno
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "orpo":
                    yield name.name.removeprefix("orpo").removeprefix(".") or "__init__", node.lineno


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_room_stands_on_a_floor() -> None:
    known = set().union(*FLOORS)
    assert {room_of(module) for module in modules()} == known


def test_rooms_import_from_the_floors_below_them_alone() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for module, path in modules().items()
        for imported, line in imports_of(path)
        if room_of(imported) != room_of(module) and floor[room_of(imported)] >= floor[room_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_files() -> None:
    graph = {module: {imported for imported, _ in imports_of(path)} - {module} for module, path in modules().items()}
    while leaves := {module for module, imported in graph.items() if not imported & graph.keys()}:
        graph = {module: imported for module, imported in graph.items() if module not in leaves}
    # what is left imports itself by some way, or imports what does
    assert not graph, f"these files import each other: {sorted(graph)}"


def test_no_file_lies_outside_of_a_room() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == PUBLIC_FACE


@pytest.mark.parametrize("module", modules())
def test_files_and_functions_can_be_held_in_the_head(module: str) -> None:
    path = modules()[module]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_no_class_name_twice() -> None:
    names = Counter(
        node.name
        for path in modules().values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_file_names_stand_twice_only_where_the_rooms_tell_them_apart() -> None:
    names = Counter(path.stem for path in modules().values() if path.stem not in ("__init__", "__main__"))
    assert {name for name, count in names.items() if count > 1} <= SHARED_NAMES
