"""The page's server: it listens on this machine alone, or asks for a token.

Answers are lines of JSON that come while they are written; everything else is one request and the conversation's new state.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from orpo.errors import UserError
from orpo.playground.guard import COOKIE, is_loopback, is_same, refusal

if TYPE_CHECKING:
    from types import FrameType

    from orpo.playground.talks import Desk, Talk

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MOST_BODY_BYTES = 4 * 2**20
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""What the page may do: its own script and style, and requests to where it came from."""

_ANSWERS, _DEEDS = ("ask", "edit", "retry"), ("back", "reset", "better", "undo", "stop", "look")


class Service:
    """The requests of the page.

    Args:
        desk: the conversations and the model.
        facts: what the page shows of models, settings and files.
        token: what a visitor must bring; None on this machine alone.
    """

    def __init__(self, desk: Desk, facts: dict[str, Any], token: str | None) -> None:
        self.desk, self.facts, self.token = desk, facts, token

    def app(self) -> Starlette:
        """As an ASGI application."""
        style = "".join((folder / "style.css").read_text(encoding="utf-8") for folder in (HERE.parent / "webpage", HERE))
        contents = {
            "/": (_own("page.html"), "text/html"),
            "/page.js": (_own("page.js"), "text/javascript"),
            "/style.css": (style, "text/css"),
        }
        routes = [Route(path, partial(_send, *content)) for path, content in contents.items()]
        routes += [Route("/facts", self._facts), Route("/talk", self._act, methods=["POST"])]
        return Starlette(routes=routes, middleware=[Middleware(_Guarded, token=self.token)])

    async def _facts(self, request: Request) -> Response:
        return JSONResponse(self.facts)

    async def _act(self, request: Request) -> Response:
        try:
            wish = await _wish_of(request)
            talk = self.desk.talk(wish["talk"])
            if wish["do"] == "stop":
                talk.is_stopped.set()
                return JSONResponse({})
            if talk.is_busy:
                raise UserError("an answer is being written", expected="its end, or a stop")
            if wish["do"] in _ANSWERS:
                return StreamingResponse(self._begin(talk, wish), media_type="application/x-ndjson")
            if wish["do"] != "look":
                self.desk.do(talk, wish)
        except UserError as error:
            return JSONResponse({"error": _shown(error)}, status_code=400)
        return JSONResponse({"state": talk.state()})

    def _begin(self, talk: Talk, wish: dict[str, Any]) -> AsyncIterator[str]:
        """Give a wish to the thread of the models."""
        loop, is_new = asyncio.get_running_loop(), asyncio.Event()
        texts: dict[int, str] = {}
        talk.is_busy = True
        talk.is_stopped.clear()

        def on_text(side: int, text: str) -> None:
            texts[side] = text
            loop.call_soon_threadsafe(is_new.set)

        def end(_: object) -> None:
            talk.is_busy = False
            is_new.set()

        work = loop.run_in_executor(self.desk.model_thread, self.desk.answer, talk, wish, on_text)
        work.add_done_callback(end)
        return _lines(talk, work, texts, is_new)


async def _lines(talk: Talk, work: asyncio.Future[None], texts: dict[int, str], is_new: asyncio.Event) -> AsyncIterator[str]:
    """While the model writes the newest text of each side, then the state. A page that is closed breaks the answer off."""
    shown: dict[int, str] = {}
    try:
        while not work.done():
            await is_new.wait()
            is_new.clear()
            for side, text in list(texts.items()):
                if shown.get(side) != text:
                    shown[side] = text
                    yield _line({"side": side, "text": text})
        problem = work.exception()
        yield _line({"state": talk.state(), **({} if problem is None else {"error": _problem(problem)})})
    finally:
        talk.is_stopped.set()


def _problem(problem: BaseException) -> str:
    if isinstance(problem, UserError):
        return _shown(problem)
    logger.error("an answer failed", exc_info=problem)
    return f"the model could not answer ({type(problem).__name__}); the terminal where the chat was started says more"


def _shown(error: UserError) -> str:
    said = f"{error.where}: {error.what}" if error.where else error.what
    return f"{said}; expected: {error.expected}" if error.expected else said


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


async def _send(content: str, kind: str, request: Request) -> Response:
    return Response(content, media_type=kind)


async def _wish_of(request: Request) -> dict[str, Any]:
    """What the page asks for.

    Raises:
        UserError: it is too long, or nothing that the page sends.
    """
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise UserError("no such request", expected="JSON")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise UserError(f"the text has more than {MOST_BODY_BYTES // 2**20} MiB", expected="a shorter one")
    try:
        wish = json.loads(body)
    except (ValueError, RecursionError):
        wish = None
    if not isinstance(wish, dict) or wish.get("do") not in (*_ANSWERS, *_DEEDS):
        raise UserError("no such request", expected=f"an object with do: {', '.join((*_ANSWERS, *_DEEDS))}")
    if not isinstance(wish.get("talk"), str) or not 8 <= len(wish["talk"]) <= 64:
        raise UserError("the conversation has no name", expected="talk: 8 to 64 characters")
    return wish


class _Guarded:
    """ASGI middleware: refuses strangers, takes the token out of the address into a cookie, and puts the page's policy on every answer."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        request = Request(scope, receive)
        given = request.query_params.get("token")
        answer: Any = self.app
        if self.token is not None and given is not None and is_same(given, self.token):
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        elif why := refusal(request, self.token):
            answer = PlainTextResponse(why + "\n", status_code=403)
        await answer(scope, receive, send_with_policy)


class _Server(uvicorn.Server):
    """A server that breaks answers off before it waits for their requests to end."""

    desk: Desk

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.desk.stop_all()
        super().handle_exit(sig, frame)


def open_socket(host: str, port: int) -> socket.socket:
    """Take the address, before a model is loaded for nothing.

    Raises:
        UserError: it is taken, or none of this machine's.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        is_taken = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EADDRINUSE)
        mend = "--port 0 takes a free one" if is_taken else "--host 127.0.0.1 is this machine, and a port is at most 65535"
        why = getattr(error, "strerror", None) or error
        raise UserError(f"nothing can be served at {host}:{port}: {why}", where="--port", mend=mend) from error
    return found


def read_guideline(path: Path | None) -> str:
    """The user's text, or this package's own.

    Raises:
        UserError: it cannot be read as text.
    """
    try:
        return (path.expanduser() if path else HERE / "guideline.md").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"cannot be read: {why}", where=str(path), expected="a text file, such as Markdown") from error


def serve(desk: Desk, facts: dict[str, Any], place: socket.socket, host: str) -> tuple[uvicorn.Server, str]:
    """A server that is ready to run, and the address to open."""
    place.listen(128)  # who reads the address may ask at once: what comes before the server runs waits
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    config = uvicorn.Config(
        Service(desk, facts, token).app(),
        log_level="warning",
        access_log=False,  # it would keep the token of the address
        server_header=False,
        timeout_graceful_shutdown=3,
        ws="none",
    )
    server = _Server(config)
    server.desk = desk
    port = place.getsockname()[1]
    name = host if is_loopback(host) else socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    return server, address if token is None else f"{address}?token={token}"


def facts_of(desk: Desk, title: str, guideline: str) -> dict[str, Any]:
    """What the page shows beside the conversation."""
    return {
        "title": title,
        "sides": [side.name for side in desk.sides],
        "settings": asdict(desk.settings),
        "guideline": guideline,
        "preferences": str(desk.preferences),
    }
