"""The package as others get it: names, dependencies, data files, and what a new machine needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orpo

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "datasets", "peft", "numpy", "pandas", "pyarrow"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").split("\n")
    return dict(line.split("==") for line in lines if line)


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def requirements(project: dict[str, Any], *extras: str) -> list[Requirement]:
    """What pip would be asked for, extras that name other extras of this package resolved."""
    found = [Requirement(line) for line in project["dependencies"]]
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == "orpo":
                found += requirements(project, *requirement.extras)
            else:
                found.append(requirement)
    return found


def test_public_names() -> None:
    own = {"ORPOConfig", "ORPOTrainer", "__version__", "audit", "compare", "evaluate", "preview"}
    of_trl_scripts = {"ModelConfig", "ScriptArguments", "get_kbit_device_map", "get_peft_config", "get_quantization_config"}
    assert set(orpo.__all__) == own | of_trl_scripts
    assert set(orpo.__all__) <= set(dir(orpo))
    for name in orpo.__all__:
        assert getattr(orpo, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        orpo.no_such_name  # noqa: B018


def test_import_is_light() -> None:
    loaded = run_python("import sys, orpo; print(*sys.modules)").split()
    assert not HEAVY & set(loaded)


def test_public_names_come_from_the_package() -> None:
    assert run_python("from orpo import ORPOConfig, ORPOTrainer; print(ORPOConfig.__module__, ORPOTrainer.__module__)").split() == [
        "orpo.config.options",
        "orpo.training.trainer",
    ]


def test_the_version_has_one_place(project: dict[str, Any]) -> None:
    assert project["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", orpo.__version__)
    assert f"## {orpo.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence(project: dict[str, Any]) -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_dependencies_are_ranges(project: dict[str, Any]) -> None:
    """A pinned dependency would move a user's own torch."""
    for requirement in requirements(project):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators <= {">=", "<"}, requirement
        assert ">=" in operators, f"{requirement} has no lower bound"
    bounds = {requirement.name: str(requirement.specifier) for requirement in requirements(project)}
    assert bounds["torch"] == ">=2.11"
    assert bounds["transformers"] == "<6,>=5.17"


def test_constraints_are_exact_and_have_no_address() -> None:
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").split("\n"):
        assert re.fullmatch(r"([a-z0-9-]+==[0-9][\w.]*)?", line), line


def test_constraints_fit_the_project(project: dict[str, Any], pins: dict[str, str]) -> None:
    for requirement in requirements(project, "dev", "demo"):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned: make constraints"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}: make constraints"


def test_constraints_leave_cuda_to_torch(pins: dict[str, str]) -> None:
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]


def test_extras_cover_what_the_parts_need(project: dict[str, Any]) -> None:
    assert {"gguf", "audit", "qlora", "demo", "test", "dev"} <= set(project["optional-dependencies"])
    names = {requirement.name for requirement in requirements(project)}
    assert not names & {"trl", "gguf", "bitsandbytes", "datasketch", "plotly", "scikit-learn"}, "heavy parts are extras"


def test_the_documents_list_every_extra(project: dict[str, Any]) -> None:
    page = (REPOSITORY / "docs" / "start" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \| .+ \|$", page.partition("## Extras")[2], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(project["optional-dependencies"])


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "bench", "docs", "faults", "test-lowest", "setup"])
def test_make_has_the_target(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_make_helps() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    out = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "fine-tune a 135M model" in out


def test_ci_runs_lint_and_tests() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    lines = script.read_text(encoding="utf-8").strip().split("\n")
    assert "set -euo pipefail" in lines
    assert lines[-1].startswith("make"), "pytest's closing line is the last"
    assert lines[-1].endswith(" test")
    assert any(line.endswith("lint") for line in lines)
    assert any(line.endswith("docs") for line in lines), "a warning of the site stops a change"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.namelist()


def test_wheel_holds_the_package_and_its_data(wheel: list[str]) -> None:
    assert "orpo/py.typed" in wheel
    assert "orpo/data/demo/GUIDELINE.md" in wheel
    assert {"orpo/recipes/demo.yaml", "orpo/recipes/smollm2-full.yaml"} <= set(wheel)
    assert any(re.fullmatch(r"orpo/data/demo/.*\.jsonl", name) for name in wheel)
    sources = {str(path.relative_to(REPOSITORY / "src")) for path in (REPOSITORY / "src" / "orpo").rglob("*.py")}
    assert sources <= set(wheel)


def test_wheel_holds_nothing_else(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"orpo", f"orpo-{orpo.__version__}.dist-info"}
    assert not [name for name in wheel if name.endswith((".pyc", ".gguf", ".safetensors"))]
