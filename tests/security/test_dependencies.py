"""What is installed fits together: pinned versions satisfy the ranges, and so does this environment. No network is needed.

Known vulnerabilities are the business of `make audit-dependencies`, which asks a database on the network.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRAS = ("dev", "demo")
"""Those that constraints.txt pins."""


def _project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**default_environment(), "extra": extra})


def requirements(project: dict[str, Any], extra: str | None = None) -> Iterator[Requirement]:
    """The project's own requirements, or those of an extra with the extras of its own that it names."""
    named = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    for requirement in map(Requirement, named):
        if requirement.name == project["name"]:
            for inner in requirement.extras:
                yield from requirements(project, inner)
        else:
            yield requirement


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """Name -> version of constraints.txt."""
    found = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "==", line
            assert requirement.url is None, line
            found[canonicalize_name(requirement.name)] = Version(exact.version)
    return found


def test_every_range_of_the_project_admits_its_pinned_version(pins: dict[str, Version]) -> None:
    project = _project()
    wanted = [item for extra in (None, *EXTRAS) for item in requirements(project, extra) if _applies(item)]
    assert len(wanted) > 20
    missing = {item.name for item in wanted if canonicalize_name(item.name) not in pins}
    refused = [f"{item} refuses {pins[canonicalize_name(item.name)]}" for item in wanted if _refuses(item, pins)]
    assert (missing, refused) == (set(), [])


def _refuses(requirement: Requirement, versions: dict[str, Version]) -> bool:
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and not requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("extra", [name for name in _project()["optional-dependencies"] if name not in EXTRAS])
def test_other_extras_contradict_no_pin_that_the_project_needs(extra: str, pins: dict[str, Version]) -> None:
    """An extra that wants another version than the one tested with is named here, with the reason."""
    narrower = {"alpaca": {"scikit-learn", "setuptools"}}  # the package needs what later versions of these have dropped
    refused = {item.name for item in requirements(_project(), extra) if _applies(item) and _refuses(item, pins)}
    assert refused <= narrower.get(extra, set())


def conflicts(name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, str]] | None = None) -> Iterator[str]:
    """What `pip check` would say of a distribution and all that it needs: requirements that are missing or not satisfied."""
    seen = set() if seen is None else seen
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        for extra in extras or {""}:
            key = (canonicalize_name(requirement.name), ",".join(sorted(requirement.extras)))
            if not (_applies(requirement) or (extra and _applies(requirement, extra))):
                continue
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                yield f"{name} needs {requirement}, which is not installed"
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{name} needs {requirement}, {version} is installed"
            if key not in seen:
                seen.add(key)
                yield from conflicts(requirement.name, frozenset(requirement.extras), seen)


def test_what_is_installed_satisfies_all_that_the_project_needs() -> None:
    """As `pip check`, but only of what the project needs: the environment may hold more.

    That of the lowest versions is put together without asking what others of its packages would rather have.
    """
    found = list(conflicts("orpo", frozenset(EXTRAS)))
    if is_of_lowest_versions():
        found = [line for line in conflicts("orpo", frozenset({"test"})) if line.startswith("orpo needs")]
    assert found == []


def is_of_lowest_versions() -> bool:
    floors = [item for item in requirements(_project()) if item.name in ("torch", "transformers", "accelerate", "peft", "datasets")]
    lowest = {item.name: min(Version(part.version) for part in item.specifier if part.operator == ">=") for item in floors}
    return all(Version(importlib.metadata.version(name)).release[:2] == floor.release[:2] for name, floor in lowest.items())


def test_a_conflict_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "torch" else real(name))
    assert any("needs torch" in line and "0.0.1 is installed" in line for line in conflicts("orpo"))
