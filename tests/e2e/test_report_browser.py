"""The report in a real headless browser: what a hostile run tries comes to nothing, every figure is drawn, a phone shows it whole."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from browser import visit
from orpo.report import write_report
from reportfolders import make_comparison, make_run

pytestmark = pytest.mark.browser


class Canary:
    """A server on loopback that must never be asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        canary = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.asked.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def canary() -> Iterator[Canary]:
    found = Canary()
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()


def hostile(address: str) -> str:
    """Every way to run a script or to fetch something that fits into a text."""
    return (
        f"</title></style></script><script>document.title='pwned'</script><img src={address}/img onerror=\"document.title='pwned'\">"
        f"<link rel=stylesheet href={address}/css><iframe src={address}/frame></iframe><svg onload=\"document.title='pwned'\"></svg>"
        f"\"' autofocus onfocus=\"document.title='pwned'\" x='{{{{ 7*191 }}}}<style>@import '{address}/import';</style>"
        f"<a href=\"javascript:document.title='pwned'\">x</a><base href={address}/>"
    )


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_hostile_folder_runs_nothing_and_fetches_nothing(tmp_path: Path, canary: Canary, kind: str) -> None:
    make = make_run if kind == "run" else make_comparison
    page = write_report(make(tmp_path / "<img src=x onerror=document.title=1>", said=hostile(canary.address))).page
    seen = visit(page, tmp_path / "profile")
    assert re.search(r"<title>(.*?)</title>", seen.dom, re.DOTALL).group(1) == f"&lt;img src=x onerror=document.title=1&gt; – orpo {kind}"
    assert canary.asked == []
    assert seen.console == []  # no script failed, and the policy had nothing to stop
    assert not re.search(r"<(iframe|link|base|object|embed)\b", seen.dom)
    places = re.findall(r'<div class="plot[^"]*" id="figure-', seen.dom)
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="figure-', seen.dom)
    assert len(drawn) == len(places) > 8
    assert "&lt;/title&gt;&lt;/style&gt;&lt;/script" in seen.dom  # a label of a figure, as text


def test_the_browser_would_have_told(tmp_path: Path, canary: Canary) -> None:
    """The same text on a page without escaping and policy runs and fetches: the test above can fail."""
    page = tmp_path / "open.html"
    page.write_text(f"<!doctype html><title>safe</title><p>{hostile(canary.address)}")
    seen = visit(page, tmp_path / "profile")
    assert "<title>pwned</title>" in seen.dom
    assert "/img" in canary.asked


def test_the_policy_stops_what_escaping_would_have_missed(tmp_path: Path, canary: Canary) -> None:
    page = write_report(make_run(tmp_path / "run", tasks=())).page
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace("</header>", hostile(canary.address) + "</header>"), encoding="utf-8")
    seen = visit(page, tmp_path / "profile")
    assert "<title>run – orpo run</title>" in seen.dom
    assert canary.asked == []
    assert any("Content Security Policy" in line for line in seen.console)


@pytest.mark.parametrize("kind", ["run", pytest.param("comparison", marks=pytest.mark.slow)])
def test_a_phone_has_nothing_to_scroll_sideways(tmp_path: Path, kind: str) -> None:
    page = write_report((make_run if kind == "run" else make_comparison)(tmp_path / "folder", said=" " + "averylongword" * 20)).page
    whole = page.read_text(encoding="utf-8")
    whole = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole)  # so that this test may measure
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    # Tables of many columns are read row by row there: none of their cells lies off the screen.
    off = "Math.max(0, ...[...document.querySelectorAll('table.stack')].map(t => t.parentNode.scrollWidth - t.parentNode.clientWidth))"
    wide = f"Math.max({wide}, {off})"
    measure = f"<script>document.title = 'wide ' + ({wide}) + ' of ' + document.documentElement.clientWidth;</script>"
    page.write_text(whole.replace("</html>", measure + "</html>"), encoding="utf-8")
    found = re.search(r"<title>wide (-?\d+) of (\d+)</title>", visit(page, tmp_path / "profile", width=400, height=900).dom)
    assert found is not None
    assert int(found.group(1)) <= 0
    assert int(found.group(2)) <= 500


@pytest.mark.slow
def test_pictures_of_the_page(tmp_path: Path) -> None:
    """Drawn in light and dark, on a screen and on a phone; compared with an empty page, which says nothing about beauty."""
    page = write_report(make_run(tmp_path / "run")).page
    (tmp_path / "empty.html").write_text("<!doctype html><title>x</title>")
    empty = tmp_path / "empty.png"
    visit(tmp_path / "empty.html", tmp_path / "p0", picture=empty)
    pictures = [("light", 1180, False), ("dark", 1180, True), ("phone", 400, False)]
    seen = set()
    for name, width, dark in pictures:
        picture = tmp_path / f"{name}.png"
        visit(page, tmp_path / name, width=width, picture=picture, dark=dark)
        assert picture.stat().st_size > 8 * empty.stat().st_size
        seen.add(picture.read_bytes())
    assert len(seen) == len(pictures)
