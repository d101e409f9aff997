"""Loading code from outside: by file, by module, by entry point; what cannot be loaded says why and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo.errors import UserError
from orpo.system import plugins
from orpo.system.plugins import load_installed, load_plugins, loaded_plugins


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_plugins([name], where="--plugins")
    assert caught.value.where == "--plugins"
    return caught.value


def test_a_file_is_loaded_once_and_its_dataclasses_know_their_module(folder: Path) -> None:
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport builtins\n"
    source += "builtins.times_loaded = getattr(builtins, 'times_loaded', 0) + 1\n@dataclass\nclass Mine:\n    number: int = 1\nMine()\n"
    for place in ("a", "b"):
        (folder / place).mkdir()
        (folder / place / "mine.py").write_text(source)
    import builtins

    try:
        first, again = load_plugins(["a/mine.py", str(folder / "a" / "mine.py")])
        assert builtins.times_loaded == 1  # type: ignore[attr-defined]
        load_plugins("b/mine.py")  # of the same name, from another place
        assert builtins.times_loaded == 2  # type: ignore[attr-defined]
    finally:
        del builtins.times_loaded  # type: ignore[attr-defined]
    assert first == again
    assert len(first.sha256) == 64
    assert first in loaded_plugins()


def test_a_module_is_imported_by_its_dotted_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "outside_package").mkdir()
    (folder / "outside_package" / "__init__.py").write_text("")
    (folder / "outside_package" / "inner.py").write_text("value = 3\n")
    (plugin,) = load_plugins("outside_package.inner")
    assert plugin.path.endswith("inner.py")


def test_nothing_named_is_nothing_loaded() -> None:
    assert load_plugins(None) == load_plugins([]) == ()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.py", None, "missing.py does not exist"),
        ("sub/notes.txt", "text", "sub/notes.txt is no Python file"),
        ("no_such_module_here", None, "there is no module 'no_such_module_here'"),
        ("json.no_such_part", None, "there is no module 'json.no_such_part'"),
        ("broken.py", "x = 1\ny = x +\n", "SyntaxError: invalid syntax at {folder}/broken.py:2"),
        ("raising.py", "import json\n\njson.loads('{')\n", "at {folder}/raising.py:3"),
        ("needing.py", "import a_package_that_is_not_there\n", "No module named 'a_package_that_is_not_there' at {folder}/needing.py:1"),
        ("leaving.py", "raise SystemExit(0)\n", "SystemExit: 0 at {folder}/leaving.py:1"),
        ("", None, "found ''"),
        ("..up", None, "found '..up'"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_where(folder: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    assert said.format(folder=folder) in error_of(name).what
    assert load_after_mend(folder, name)


def load_after_mend(folder: Path, name: str) -> bool:
    """A failure leaves nothing behind: the same file loads once it is mended."""
    if name.endswith(".py"):
        (folder / name).write_text("")
        load_plugins(name)
    return True


def test_the_mend_names_the_near_file(folder: Path) -> None:
    (folder / "my_objective.py").write_text("")
    assert "my_objective.py" in str(error_of("my_objectiv.py").mend)
    assert "./my_objective.py" in str(error_of("my_objective").mend)


def install(folder: Path, package: str, points: str) -> None:
    """What pip leaves of a package, as far as entry points need it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


def test_installed_packages_are_found_and_a_broken_one_stops_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = "orpo.test_group"
    install(folder, "sound", f"[{group}]\nsound = outside_sound\n")
    install(folder, "broken", f"[{group}]\nwrecked = outside_broken\n")
    (folder / "outside_sound.py").write_text("")
    (folder / "outside_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(plugins, "_INSTALLED", {})
    failed = load_installed(group)
    assert list(failed) == ["wrecked"]
    assert "ZeroDivisionError" in caplog.text
    assert "the installed package broken" in caplog.text
    assert "sound" in {plugin.name for plugin in loaded_plugins()}
    caplog.clear()
    assert load_installed(group) is failed  # once per process, and so is the warning
    assert not caplog.text
