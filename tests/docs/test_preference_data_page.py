"""docs/preference-data.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orpo.audit import KINDS, run_audit
from orpo.data.formats import load_preferences
from orpo.data.rows.pairs import POLICIES, parse_policy
from orpo.data.types import REASONS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "preference-data.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_reason_and_finding_is_on_the_page(page: str) -> None:
    missing = [code for code in (*REASONS, *KINDS) if f"`{code}`" not in page]
    assert not missing


def test_severities_and_leaving_rows_are_those_of_the_code(page: str) -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| ([a-z, ]+) \| (yes)? ?\|", page, re.MULTILINE)
    told = {code: (severity, bool(leaves)) for codes, severity, leaves in rows for code in re.findall(r"`(\w+)`", codes)}
    assert told.keys() == KINDS.keys() - REASONS.keys()
    for code, (severity, leaves) in told.items():
        assert KINDS[code].leaves == leaves, code
        assert KINDS[code].severity in severity, code


def test_every_pair_policy_is_on_the_page(page: str) -> None:
    for policy in POLICIES:
        assert f"`{policy}`" in page
        parse_policy(policy.replace("M", "1"))


def test_the_audit_of_the_demo_data_is_as_shown(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    block = re.search(r"^\$ orpo audit (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = list(run_audit(block[1]).lines())
    assert block[2].rstrip("\n").split("\n") == lines


def test_the_python_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Q?", "chosen": "good", "rejected": "bad"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code[1], "preference-data.md", "exec"), scope)  # noqa: S102 - the page's own example
    assert scope["preferences"] == load_preferences("pairs.jsonl")[0]


def test_links_lead_somewhere(page: str) -> None:
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", page, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert target[1:] in anchors if target.startswith("#") else (PAGE.parent / target).exists(), target
