"""The chat's page in a real Chromium, clicked through as a person does it, at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapted import make_adapter_folder
from browser import find_browser
from orpo.data.formats import load_preferences
from orpo.inference.conversation import Chat, Settings, sides_of
from orpo.inference.ready import make_ready

playwright = pytest.importorskip("playwright.sync_api", reason="playwright clicks through the page")
pytestmark = pytest.mark.browser

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
HOSTILE = (
    "</textarea></script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "<svg onload=\"document.title='pwned'\"></svg>[x](javascript:document.title='pwned') ![x](http://127.0.0.1:9/x) {{7*191}} "
    "<b style='position:fixed;inset:0'>**x**</b> \u202egnp.exe \u05e9\u05dc\u05d5\u05dd \u0000 " + "w" * 90
)
BETTER = "This one is better"


class Server:
    """`orpo chat ADAPTER --web` as somebody types it, in a folder of its own."""

    def __init__(self, adapter: Path, folder: Path, *flags: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "orpo", "chat", str(adapter), "--web", "--port", "0", "--max_new_tokens", "12", *flags]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.address = self.process.stdout.readline().strip()  # type: ignore[union-attr]
        assert self.address.startswith("http://127.0.0.1:"), self.process.communicate()

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "preferences.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_browser()
    return make_adapter_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "rules.md").write_text(f"# House rules\n\n1. **Kind** words.\n- {HOSTILE}\n", encoding="utf-8")
    found = Server(adapter, folder, "--guideline", "rules.md")
    yield found
    found.process.terminate()
    assert found.process.wait(60) == 143


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A new visitor; whatever the page complained about or asked elsewhere fails the test."""
    context = chromium.new_context(viewport=getattr(request, "param", DESK), accept_downloads=True)
    found = context.new_page()
    complaints: list[str] = []
    found.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda asked: None if asked.url.startswith((server.address, "data:", "blob:")) else complaints.append(asked.url))
    found.goto(server.address)
    found.wait_for_selector("#send:enabled")
    yield found
    assert found.title() == "orpo chat"
    assert found.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert [one for one in complaints if "400 (Bad Request)" not in one] == []
    context.close()


def ask(page: Any, text: str) -> list[str]:
    """Type a question and wait for both answers."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector("#stop", state="hidden")
    assert page.inner_text("#problem") == ""
    page.wait_for_selector(".answer >> nth=1")
    return answers(page)


def answers(page: Any) -> list[str]:
    return [one.inner_text() for one in page.query_selector_all(".answer .text")]


def turns(page: Any) -> list[str]:
    return [one.inner_text() for one in page.query_selector_all(".turn .text")]


def wait(page: Any, *, answers: int, turns: int) -> None:
    page.wait_for_function(
        "([a, t]) => document.querySelectorAll('.answer').length === a && document.querySelectorAll('.turn').length === t",
        arg=[answers, turns],
    )


@pytest.mark.parametrize("page", [DESK, pytest.param(PHONE, marks=pytest.mark.slow)], indirect=True, ids=["desk", "phone"])
def test_a_conversation_as_it_is_clicked(page: Any, server: Server, adapter: Path, tmp_path: Path) -> None:
    """Both answers are the terminal's; the better one is a click, a row that training reads, and what the conversation goes on with."""
    num_before = len(server.rows())
    ask(page, "Hello")
    ready = make_ready(str(adapter), device="cpu")
    tuned, base = Chat(sides_of(ready, str(adapter), "base"), Settings(max_new_tokens=12)).ask("Hello")
    assert [" ".join(text.split()) for text in answers(page)] == [" ".join(one.text.split()) for one in (tuned, base)]
    assert "[1] tuned" in page.inner_text(".answer >> nth=0")
    assert "[2] base" in page.inner_text(".answer >> nth=1")

    page.click(f"text={BETTER} >> nth=1")
    page.click("text=Undo")
    page.wait_for_selector(f"text={BETTER}")
    assert len(server.rows()) == num_before
    page.click(f"text={BETTER} >> nth=1")
    page.wait_for_selector("text=Undo")
    row = server.rows()[-1]
    assert row["chosen"][0]["content"] == base.text
    assert row["rejected"][0]["content"] == tuned.text

    ask(page, "And then?")
    assert turns(page)[1] == page.evaluate("state.talk[1].content").strip()
    page.click("#retry")
    page.wait_for_selector("text=Better than 4")
    page.click("[aria-label='Answer 4 is better than answer 1']")
    page.wait_for_selector("text=Undo")
    assert [message["role"] for message in server.rows()[-1]["prompt"]] == ["user", "assistant", "user"]
    read, dropped, _ = load_preferences(str(server.folder / "preferences.jsonl"))
    assert (len(read), len(dropped)) == (num_before + 2, 0)

    page.click("#edit")
    assert page.input_value("#question") == "And then?"
    ask(page, "And before?")
    assert turns(page)[2] == "And before?"
    with page.expect_download() as download:
        page.click("#save")
    (saved,) = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    page.reload()
    page.wait_for_selector("#send:enabled")
    wait(page, answers=2, turns=3)
    page.click("#back")
    wait(page, answers=1, turns=1)


@pytest.mark.parametrize("page", [DESK, PHONE], indirect=True, ids=["desk", "phone"])
def test_what_is_hostile_is_text(page: Any, server: Server) -> None:
    """From the person, from the guideline's file, as a system message; the page's title and width are looked at when it closes."""
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.fill("#system", HOSTILE)
    ask(page, HOSTILE)
    shown = HOSTILE.replace("\0", "\ufffd")
    assert page.evaluate("state.messages.map(one => one.role)") == ["system", "user"]
    assert turns(page)[1].replace("\0", "\ufffd") == shown
    guideline = page.inner_text("#guideline")
    assert "House rules" in guideline
    assert "<script>document.title" in guideline
    assert page.query_selector("#guideline strong").inner_text() == "Kind"
    assert page.evaluate("document.querySelectorAll('main img, main script, main svg, main iframe, main a').length") == 0
    page.fill("#system", "another")
    assert page.is_visible("#system-note")
    page.click("#reset")
    wait(page, answers=0, turns=1)
    assert turns(page) == ["another"]


def test_what_cannot_be_answered_is_told_and_nothing_typed_is_lost(page: Any) -> None:
    ask(page, "Hello")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for name, value, told in (("temperature", "-1", "temperature: found -1"), ("max_new_tokens", "0", "max_new_tokens: found 0")):
        before = page.input_value(f"#{name}")
        page.fill(f"#{name}", value)
        page.fill("#question", "Still here")
        page.click("#send")
        page.wait_for_selector(f"#problem:has-text('{told}')")
        assert page.input_value("#question") == "Still here"
        page.fill(f"#{name}", before)
    page.fill("#question", "long " * 2000)
    page.click("#send")
    page.wait_for_selector("#problem:has-text('longer than the model')")
    wait(page, answers=2, turns=1)
    assert turns(page) == ["Hello"]


def test_an_answer_streams_and_is_stopped(page: Any) -> None:
    """Stop is pressed as soon as there is a first letter, of five hundred tokens."""
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.fill("#max_new_tokens", "480")
    page.fill("#temperature", "3")
    page.evaluate(
        "new MutationObserver(() => { if ($('answers').innerText.length > 30) $('stop').click(); })"
        ".observe($('answers'), {subtree: true, childList: true, characterData: true})"
    )
    page.fill("#question", "Hello")
    page.click("#send")
    page.wait_for_selector("text=stopped")
    assert page.is_enabled("#send")
