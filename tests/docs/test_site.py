"""The site: it builds without a warning, its reference is the code's, and it opens and searches offline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from browser import visit
from orpo.cli import command_modules
from orpo.config.advice import ADVICE_BY_SIZE
from orpo.data.types import NOTES, REASONS
from orpo.run.keys import key_types

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def generated():
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        import generated
    finally:
        sys.path.pop(0)
    return generated


def test_every_command_and_option_is_in_the_reference(generated) -> None:
    text = generated.commands()
    for name, module in command_modules().items():
        assert f"## orpo {name}\n" in text
        assert module.__doc__.strip().splitlines()[0] in text
    for option in ("--num_processes", "--cross_fit", "--write-clean", "--judge_url", "--model_revision"):
        assert option in text


def test_every_key_has_a_line_with_its_default_and_effect(generated) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `[^|]*` \| (.+) \|$", generated.options(), re.MULTILINE))
    assert rows.keys() == key_types().keys()
    assert rows["orpo_alpha"].startswith("Lambda")


def test_every_code_of_a_row_and_many_messages_are_in_the_index(generated) -> None:
    assert all(f"| `{code}` |" in generated.rows() for code in (*REASONS, *NOTES))
    errors = generated.errors()
    assert errors.count("\n| ") > 200
    assert "load_in_4bit" in errors


def test_numbers_to_start_from_are_those_that_init_writes(generated) -> None:
    for item in ADVICE_BY_SIZE:
        assert f"| {item.orpo_alpha:g} | {item.learning_rate:g} | λ: {item.alpha_source}. Rate: {item.rate_source}. |" in generated.advice()


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md") if "_build" not in page.parts]
    assert not [page for page in pages if page != "index" and not re.search(rf"^(.*<)?{page}>?$", contents, re.MULTILINE)]


def test_pages_outside_that_are_linked_have_a_place_on_the_site(generated) -> None:
    """A link out of docs/ to a page that the site does not hold is a warning, and warnings stop `make docs`."""
    for page in DOCS.rglob("*.md"):
        if "_build" not in page.parts:
            for target in re.findall(r"\]\(((?:\.\./)+[^)#]+\.md)", generated.fill(page.read_text(encoding="utf-8"))):
                assert (page.parent / target).resolve().is_relative_to(DOCS), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html", "-d", folder / "trees"]
    done = subprocess.run([*words, DOCS, folder / "html"], capture_output=True, text=True, timeout=600, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_builds_without_a_warning_and_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "generated:" not in text, f"{page.name} has a part that was not made"
        for address in re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](https?:[^"']+)""", text):
            pytest.fail(f"{page.name} would fetch {address}")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(900)
def test_search_works_offline(site: Path, tmp_path: Path) -> None:
    seen = visit(site / "search.html", tmp_path / "profile", query="?q=retention")
    results = re.search(r'<ul[^>]* class="search[^"]*">(.*?)</ul>', seen.dom, re.DOTALL)
    assert results is not None, seen.dom[-2000:]
    assert "evaluation.html" in results[1]
    assert not seen.console
