"""The page of shapes: every example on it is read, and says what the page says it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orpo.data.formats import load_preferences
from orpo.data.rows.messages import plain_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "row-shapes.md"
EXAMPLES = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: "-".join(json.loads(text.splitlines()[0]))[:50])
def test_an_example_is_read_as_it_is_meant(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    preferences, dropped, _ = load_preferences(tmp_path / "rows.jsonl")
    assert not dropped
    for preference in preferences:
        ((chosen, rejected),) = preference.pairs
        assert plain_text(preference.responses[chosen]).strip() == "Four."
        assert plain_text(preference.responses[rejected]).strip() == "Five."
        assert "2" in str(preference.prompt) or "3" in str(preference.prompt)


def test_every_shape_of_the_other_page_has_an_example() -> None:
    table = (PAGE.parents[1] / "preference-data.md").read_text(encoding="utf-8").partition("| shape | columns |")[2].partition("\n\n")[0]
    assert table.count("\n| ") == len(re.findall("^## ", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
