"""What others need to carry the project on: files that agree with each other and with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import orpo

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def read(path: str) -> str:
    return (REPOSITORY / path).read_text(encoding="utf-8")


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == orpo.__version__
    assert citation["license"] == "Apache-2.0"
    assert "2403.07691" in citation["preferred-citation"]["url"]


def test_reports_ask_for_what_is_needed_to_help() -> None:
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug.yml"))
    (doctor,) = (item for item in form["body"] if item["id"] == "doctor")
    assert "orpo doctor --json" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]
    assert "orpo doctor --json" in read(".github/pull_request_template.md")


def test_python_versions_are_the_same_everywhere() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    named = {match[1] for line in project["classifiers"] if (match := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))}
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix")
            if matrix:
                assert set(matrix["python"]) == named
                assert set(matrix["os"]) == {"ubuntu-latest", "macos-latest"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_few_rights_and_no_secrets(path: Path) -> None:
    flow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text(encoding="utf-8")
    for name, job in flow["jobs"].items():
        assert job["timeout-minutes"] <= 60
        assert set(job.get("permissions", {})) <= ({"id-token"} if name == "publish" else set())
        for step in job["steps"]:
            for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.MULTILINE):
                assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), target


def test_workflows_are_right_by_actionlint() -> None:
    if (tool := shutil.which("actionlint")) is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([tool, "-no-color", *WORKFLOWS], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_package_names_no_address_that_is_not_there() -> None:
    """The project has no public home yet; an address in the metadata would lead nowhere."""
    assert "urls" not in tomllib.loads(read("pyproject.toml"))["project"]
