"""A judge on loopback that does what a test tells it to: answers, talks nonsense, dribbles, breaks off, dies.

Speaks just enough of OpenAI's chat protocol. `behave(number, body)` is called for every request and returns one of the actions below.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Say:
    """A proper chat completion."""

    text: str | None
    delay_s: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Status:
    """Any status, headers and body."""

    code: int
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Break:
    """Break the connection: before a byte is sent, or in the middle of the body."""

    in_body: bool = False


@dataclass
class Dribble:
    """One byte at a time, for ever or until the client has had enough."""

    pause_s: float = 0.05


Action = Say | Status | Break | Dribble
Behave = Callable[[int, dict[str, Any]], Action]


class JudgeServer:
    """The server; `requests` and `headers` hold what it was sent, in order of arrival."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}/v1"

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
        with contextlib.suppress(OSError):  # the client may be gone
            _act(handler, self.behave(number, body))


def _act(handler: BaseHTTPRequestHandler, action: Action) -> None:
    if isinstance(action, Break):
        if action.in_body:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [{"mess')
            handler.wfile.flush()
        # A reset, not an orderly end.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        return
    if isinstance(action, Dribble):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(action.pause_s)
        return
    if isinstance(action, Say):
        time.sleep(action.delay_s)
        choice = {"index": 0, "message": {"role": "assistant", "content": action.text}, "finish_reason": "stop", **action.extra}
        action = Status(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode(), {"Content-Type": "application/json"})
    handler.send_response(action.code)
    for name, value in {**action.headers, "Content-Length": str(len(action.body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(action.body)


@contextlib.contextmanager
def judge_server(behave: Behave) -> Iterator[JudgeServer]:
    """Serve while the context lasts."""
    server = JudgeServer(behave)
    thread = threading.Thread(target=server.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.httpd.shutdown()
        server.httpd.server_close()
        thread.join()
