"""Who may use the chat's page: this machine and its own pages, or whoever has the token; what is malformed is refused in words."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapted import make_adapter_folder
from orpo.errors import UserError
from orpo.inference.conversation import Settings, sides_of
from orpo.inference.ready import make_ready
from orpo.playground.guard import is_loopback
from orpo.playground.server import facts_of, open_socket, read_guideline, serve
from orpo.playground.talks import MOST_TALKS, Desk

NAME, EVERYWHERE = "a-conversation", "0.0.0.0"  # noqa: S104


class Served:
    """The page's server in a thread of its own; `token` is None for one on this machine alone."""

    def __init__(self, desk: Desk, host: str) -> None:
        self.desk, place = desk, open_socket("127.0.0.1", 0)  # what is called exposed here is not: only the rules are those of a host
        self.port = place.getsockname()[1]
        self.server, address = serve(desk, facts_of(desk, "tiny", read_guideline(None)), place, host)
        self.token = address.partition("?token=")[2] or None
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [place]}, daemon=True)
        self.thread.start()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"content-type": "application/json"} if body is not None else {}
        text = body if isinstance(body, str | bytes) else json.dumps(body) if body is not None else None
        connection.request(method, path, text, {**given, **{name.replace("_", "-"): value for name, value in headers.items()}})
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        connection.close()
        return found

    def do(self, **wish: Any) -> dict[str, Any]:
        _, _, text = self.ask("POST", "/talk", {"talk": NAME, **wish})
        found: dict[str, Any] = json.loads(text.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("page")
    adapter = str(make_adapter_folder(folder))
    ready = make_ready(adapter, device="cpu")
    return Desk(sides_of(ready, adapter, "base"), Settings(max_new_tokens=6), folder / "preferences.jsonl")


def served_as(desk: Desk, host: str) -> Iterator[Served]:
    found = Served(desk, host)
    yield found
    found.server.should_exit = True
    found.thread.join(60)


@pytest.fixture(scope="module")
def local(desk: Desk) -> Iterator[Served]:
    yield from served_as(desk, "127.0.0.1")


@pytest.fixture(scope="module")
def exposed(desk: Desk) -> Iterator[Served]:
    yield from served_as(desk, EVERYWHERE)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("LOCALHOST", True), ("::1", True), ("[::1]", True),
        (EVERYWHERE, False), ("::", False), ("192.168.1.2", False), ("localhost.evil.com", False), ("127.0.0.1.evil.com", False),
        ("", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_page_and_its_policy(local: Served) -> None:
    assert local.token is None
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text/css"), ("/facts", "application/json")):
        status, headers, text = local.ask("GET", path)
        assert (status, headers["content-type"].split(";")[0]) == (200, kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "require-trusted-types-for 'script'" in headers["content-security-policy"]
        assert "http://" not in text.replace("http://127.0.0.1", "")
        assert "https://" not in text


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "localhost.evil.example:80"}, {"host": ""}, {"origin": "http://evil.example"}, {"origin": "null"},
     {"origin": "http://127.0.0.1:1"}, {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}],
    ids=str,
)  # fmt: skip
def test_other_pages_may_not_ask(local: Served, headers: dict[str, str]) -> None:
    """A name that points here (rebinding), and a page elsewhere that sends requests here."""
    status, answered, _ = local.ask("POST", "/talk", {"talk": NAME, "do": "look"}, **headers)
    assert status == 403
    assert "content-security-policy" in answered


def test_a_tunnel_of_another_port_may_ask(local: Served) -> None:
    assert local.ask("POST", "/talk", {"talk": NAME, "do": "look"}, host="localhost:9", origin="http://localhost:9")[0] == 200


def test_whoever_has_the_token_may_ask_from_outside(exposed: Served) -> None:
    assert exposed.token
    for path in ("/", "/facts", "/page.js", "/?token=wrong", "/?token=", "/?token=%ff"):
        assert exposed.ask("GET", path, host="box:80")[0] == 403
    status, headers, _ = exposed.ask("GET", f"/?token={exposed.token}", host="box:80")
    assert (status, headers["location"]) == (303, "/")
    cookie, *rules = headers["set-cookie"].split("; ")
    assert {"httponly", "samesite=strict"} <= {rule.lower() for rule in rules}
    wish = {"talk": NAME, "do": "look"}
    assert exposed.ask("POST", "/talk", wish, host="box:80", cookie=cookie)[0] == 200
    assert exposed.ask("POST", "/talk", wish, host="box:80", cookie=cookie, origin="http://evil.example")[0] == 403
    assert exposed.ask("POST", "/talk", wish, host="box:80", cookie=cookie[:-1])[0] == 403


@pytest.mark.parametrize(
    "body",
    ["", "x", "[]", "null", "[" * 100_000, b"\xff", {"do": "ask"}, {"do": "answer", "talk": NAME}, {"do": ["ask"], "talk": NAME},
     {"do": "ask", "talk": 5}, {"do": "ask", "talk": ""}, {"do": "ask", "talk": "x" * 65}, '{"do": "ask", "talk": "' + "x" * 2**23 + '"}'],
    ids=lambda body: str(body)[:30],
)  # fmt: skip
def test_what_is_malformed_is_refused_in_words(local: Served, body: Any) -> None:
    status, _, text = local.ask("POST", "/talk", body)
    assert status == 400
    assert json.loads(text)["error"]


@pytest.mark.parametrize(
    "wish",
    [{"do": "ask"}, {"do": "ask", "text": ""}, {"do": "ask", "text": " \n"}, {"do": "ask", "text": 5}, {"do": "retry"},
     {"do": "edit", "text": "x"},
     *({"do": "ask", "text": "x", "settings": {name: value}} for name, value in [
         ("temperature", None), ("temperature", "1"), ("temperature", True), ("temperature", float("nan")), ("temperature", -1),
         ("top_p", 0), ("seed", 0.5), ("seed", float("inf")), ("max_new_tokens", 0), ("max_new_tokens", [1]), ("system", 5)]),
     {"do": "back"}, {"do": "better"}, {"do": "better", "number": 1}, {"do": "better", "number": "1"}, {"do": "undo"}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_leaves_everything_as_it_was(local: Served, wish: dict[str, Any]) -> None:
    local.do(do="reset")
    before = local.do(do="look")["state"]
    assert local.do(**wish)["error"]
    assert local.do(do="look")["state"] == before


def test_halves_of_characters_are_no_trouble(local: Served) -> None:
    local.do(do="reset")
    found = local.do(do="ask", text="a\ud800b", settings={"system": "\udfff"})
    assert "error" not in found
    assert [message["content"] for message in found["state"]["messages"]] == ["?", "a?b"]


def test_a_better_answer_that_cannot_be_written_is_none(local: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    local.do(do="reset", settings={"system": None})
    local.do(do="ask", text="Hello")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(local.desk, "preferences", tmp_path / "file" / "rows.jsonl")
    assert "cannot be written" in local.do(do="better", number=1)["error"]
    assert local.do(do="look")["state"]["better"] is None
    monkeypatch.setattr(local.desk, "preferences", tmp_path / "rows.jsonl")
    assert local.do(do="better", number=1)["state"]["rows"] == 1
    (tmp_path / "rows.jsonl").write_text('{"another": 1}\n')
    assert "stays" in local.do(do="undo")["error"]


def test_old_conversations_are_forgotten(desk: Desk) -> None:
    first = desk.talk("the first one")
    assert desk.talk("the first one") is first
    for number in range(MOST_TALKS):
        desk.talk(f"another one {number}")
    assert desk.talk("the first one") is not first


def run(*flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orpo", "chat", "no-such-model", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "1"], "add --web"),
        (["--guideline", "x"], "add --web"),
        (["--web", "--prompt", "x"], "--prompt is for the terminal"),
        (["--web", "--guideline", "none.md"], "none.md: cannot be read"),
        (["--web", "--temperature", "-1"], "temperature: found -1"),
        (["--temperature", "nan"], "temperature: found nan"),
        (["--web", "--host", "203.0.113.1"], "nothing can be served at 203.0.113.1"),
        (["--web", "--port", "99999"], "nothing can be served"),
    ],
    ids=str,
)
def test_flags_are_looked_at_before_a_model_is_loaded(flags: list[str], told: str, tmp_path: Path) -> None:
    done = run(*flags, folder=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "loading" not in done.stderr


def test_a_port_that_is_taken(local: Served) -> None:
    with pytest.raises(UserError, match="--port 0 takes a free one"):
        open_socket("127.0.0.1", local.port)
