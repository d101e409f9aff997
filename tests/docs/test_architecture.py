"""The map names files that are there, and names every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_file_on_the_map_is_there() -> None:
    files = {path.relative_to(ROOT / "src" / "orpo").as_posix() for path in (ROOT / "src" / "orpo").rglob("*.py")}
    endings = {"/" + file for file in files}
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", MAP)
    assert len(named) > 40
    missing = [name for name in named if not ((ROOT / name).is_file() or any(ending.endswith("/" + name) for ending in endings))]
    assert not missing


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in (ROOT / "src" / "orpo").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {room for room in rooms if f"{room}/" not in MAP} == set()
