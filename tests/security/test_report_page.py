"""Nothing in a run runs in its report, and no secret gets into report or card: read by a parser.

The same pages are opened in a real browser by tests/e2e/test_report_browser.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orpo.report import write_report
from orpo.report.card import MARK, card_text, escape, write_card
from orpo.report.facts import read_run
from orpo.system.redact import HIDDEN, redact_words
from orpo.webpage import embedded_json, label, policy
from reportfolders import make_comparison, make_run, run_facts, write_json

HOSTILE = (
    "</title></style></script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "\"' onmouseover=\"document.title='pwned'\" '<svg/onload=alert(1)>{{ 7*191 }}{% for x in y %}${7*191}&lt;b&gt;<!-- ]]>"
    '<a href="javascript:document.title=1">x</a>\u2028\u202e\x00'
)
FOLDER = "<img src=x onerror=document.title=1>"
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "nav",
        "section",
        "article",
        "footer",
        "div",
        "span",
        "p",
        "b",
        "pre",
    ),
    *("h1", "h2", "h3", "h4", "a", "dl", "dt", "dd", "table", "tr", "th", "td", "figure", "figcaption", "details", "summary", "script"),
    *("input", "label", "svg", "line"),
}


class _Page(HTMLParser):
    """Tags, attributes, texts, and scripts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def hostile_page(tmp_path: Path, kind: str) -> str:
    make = make_run if kind == "run" else make_comparison
    folder = make(tmp_path / FOLDER, said=HOSTILE)
    return write_report(folder).page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_texts_are_inert_in_the_report(tmp_path: Path, kind: str) -> None:
    raw = hostile_page(tmp_path, kind)
    page = _Page(raw)
    assert {tag for tag, _ in page.tags} <= TAGS
    attributes = [(name, value or "") for _, found in page.tags for name, value in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert {value[0] for name, value in attributes if name in ("href", "src")} == {"#"}
    assert len(page.scripts) == 3  # the figures' data, plotly, and the page's own
    shown = "".join(page.texts)
    assert shown.count("<img src=x onerror=\"document.title='pwned'\">") > 15
    assert "{{ 7*191 }}{% for x in y %}${7*191}" in shown
    assert "1337" not in shown  # no template ran


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_texts_are_inert_in_the_figures(tmp_path: Path, kind: str) -> None:
    """plotly reads tags in labels, so labels are escaped; and the block that holds them cannot be left."""
    data = _Page(hostile_page(tmp_path, kind)).scripts[0]
    assert "<" not in data
    texts = list(_strings(json.loads(data)))
    assert any("onerror" in found or "title" in found for found in texts)
    assert not [found for found in texts if "<" in found or re.search(r"&(?!(amp|lt|gt|quot|#x27);)", found)]


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for item in inner for found in _strings(item)]


def test_the_policy_names_the_scripts_of_the_page_and_no_address(tmp_path: Path) -> None:
    page = _Page(hostile_page(tmp_path, "run"))
    content = next(found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert content is not None
    directives = dict(part.strip().split(" ", 1) for part in content.split(";"))
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in page.scripts[1:]]
    assert directives["script-src"] == " ".join(hashes)
    assert directives["default-src"] == "'none'"
    assert set(directives) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert directives["img-src"] == "data:"
    assert "script-src 'none'" in policy([])


@pytest.mark.parametrize("whole", ["</script>", "<!--<script>", "\u2028", "\ud800", "a" * 500, "&lt;", "%{x}"])
def test_data_and_labels_come_back_as_they_were(whole: str) -> None:
    found = embedded_json({"x": whole, "y": float("nan")})
    assert "<" not in found
    assert found.isascii()
    assert json.loads(found) == {"x": whole, "y": None}
    assert "<" not in label(whole)
    assert len(label("x" * 500)) == 60


# ---- the card --------------------------------------------------------------------------------------------------------------------------


def test_texts_are_inert_in_the_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = make_run(tmp_path / FOLDER, said=f"{HOSTILE}\n---\n# heading\n```\n[link](http://x) | cell")
    card = write_card(folder)
    assert card is not None
    whole = card.read_text(encoding="utf-8")
    read = ModelCard(whole)
    assert read.data.library_name == "transformers"
    outside = re.sub(r"(?s)(`{3,})(python|yaml)\n.*?\n\1", "", read.content.split("---\n", 2)[2].replace(MARK, ""))
    assert not re.search(r"<[a-z/!]", outside)
    assert not re.search(r"(?m)^# heading|^---", outside)
    assert len(re.findall(r"(?<!\\)\]\(", outside)) == 1  # the paper


def test_the_card_holds_no_row_no_answer_and_no_local_path(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    text = card_text(read_run(folder))
    for private in ("parcel", "Thank you for writing", "Red and blue", "/home", "secret-place", "runs/x", str(tmp_path), ".jsonl:17"):
        assert private not in text, private
    for told in (
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "pairs.jsonl",
        "91.7 %",
        "+50.0 points",
        "dropped: empty\\_answer | 6",
        "orpo_alpha: 1.0",
    ):
        assert told in text, told


def test_the_cards_metadata_are_the_hubs(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    facts = run_facts()
    facts["configuration"]["use_peft"]["value"] = True
    facts["configuration"]["dataset_name"]["value"] = ["me/pairs", "/data/local.jsonl"]
    facts["model"] |= {"kind": "hub", "location": "me/base"}
    folder = make_run(tmp_path / "first", tasks=("pairs", "ifeval"))
    write_json(folder / "run.json", facts)
    data = ModelCard(card_text(read_run(folder))).data
    assert (data.base_model, data.datasets, data.library_name) == ("me/base", ["me/pairs"], "peft")
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found[("held-out pairs of me/pairs, local.jsonl", "accuracy")] == 0.917
    assert found[("IFEval", "prompt_strict")] == 0.2
    facts["model"] |= {"kind": "folder", "location": "/home/me/base"}
    write_json(folder / "run.json", facts)
    assert ModelCard(card_text(read_run(folder))).data.base_model is None


def test_somebody_elses_card_is_left_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    assert write_report(folder).card == folder / "README.md"
    assert write_report(folder).card == folder / "README.md"  # its own is renewed
    (folder / "README.md").write_text("# Mine\n")
    assert write_report(folder).card is None
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_markdown_is_escaped() -> None:
    assert escape("a | b\n# c `d` *e* [f](g) <h>") == "a \\| b \\# c \\`d\\` \\*e\\* \\[f\\](g) &lt;h&gt;"


# ---- secrets ---------------------------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "A1b2C3d4" * 4


def test_no_secret_gets_into_report_or_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "a-key-of-the-environment")
    secrets = (TOKEN, "a-key-of-the-environment", "plain-password-value")
    facts = run_facts(f" {TOKEN} a-key-of-the-environment")
    facts["configuration"]["hub_token"] = {"value": "plain-password-value", "origin": "--hub_token"}
    facts["starts"][0]["argv"] = ["train", "x.yaml", "--hub_token", "plain-password-value", f"--hub_token={TOKEN}"]
    folder = make_run(tmp_path / "run", said=f" {TOKEN} a-key-of-the-environment")
    write_json(folder / "run.json", facts)
    report = write_report(folder)
    assert report.card is not None
    for path in (report.page, report.card):
        whole = path.read_text(encoding="utf-8")
        assert not [secret for secret in secrets if secret in whole], path.name
    assert HIDDEN.replace("<", "&lt;").replace(">", "&gt;") in report.page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", "abc", "--seed", "2"], ["--hub_token", HIDDEN, "--seed", "2"]),
        (["--hub_token=abc", "x"], [f"--hub_token={HIDDEN}", "x"]),
        (["--hub_token", "--seed", "2"], ["--hub_token", "--seed", "2"]),
        (["--pad_token", "<pad>"], ["--pad_token", "<pad>"]),
        ([TOKEN], [HIDDEN]),
        (["--judge-api-key", "-x"], ["--judge-api-key", HIDDEN]),
    ],
)
def test_a_command_line_shows_no_secret(words: list[str], shown: list[str]) -> None:
    assert redact_words(words) == shown
