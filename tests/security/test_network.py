"""Nothing of the package but the chat's page opens a port, and a run without hub and trackers speaks to nobody."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orpo
from faults.forked import Zygote

SOURCE = Path(orpo.__file__).parent
SERVERS = {
    "socketserver", "http.server", "wsgiref", "xmlrpc.server", "asyncio", "flask", "fastapi", "starlette", "uvicorn", "aiohttp", "tornado",
    "gradio", "streamlit", "multiprocessing.connection.Listener", "multiprocessing.managers",
}  # fmt: skip
"""Modules that are there to serve."""
PAGE = ("playground/server.py", "playground/guard.py")
"""`orpo chat --web`: on this machine alone, or with a token (`tests/playground/test_server.py`)."""
SERVING = {"Listener", "bind", "listen", "accept", "create_server", "start_server", "serve_forever", "open_connection"}


def servers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that could open a port."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, item.name) for item in node.names if _serves(item.name))
        elif isinstance(node, ast.ImportFrom):
            names = {str(node.module), *(f"{node.module}.{item.name}" for item in node.names)}
            yield from ((node.lineno, name) for name in names if _serves(name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SERVING:
            yield node.lineno, node.func.attr


def _serves(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in SERVERS)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_module_serves(path: Path) -> None:
    if path.relative_to(SOURCE).as_posix() not in PAGE:
        assert list(servers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    ["import http.server", "from http.server import HTTPServer", "from http import server", "import gradio as gr", "s.bind(('', 80))"],
)
def test_the_search_finds_each(text: str) -> None:
    assert list(servers(ast.parse(text)))


def train_watched(run_dir: str, facts: str, *, does_listen: bool = False) -> None:
    """Train, evaluate and save in a process that writes down every socket that is bound or connected."""
    import socket

    from faults.jobs import train

    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.bind", "socket.connect", "socket.sendto", "socket.getaddrinfo"):
            seen.append(f"{event} {arguments[1:]!r}" if event != "socket.getaddrinfo" else f"{event} {arguments[:2]!r}")

    sys.addaudithook(hook)
    train(run_dir, options={"max_steps": 4, "report_to": "none"})
    if does_listen:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
    Path(facts).write_text(json.dumps(seen))


@pytest.mark.parametrize("does_listen", [False, True])
def test_a_run_opens_no_port_and_connects_to_nobody(does_listen: bool, forks: Zygote, tmp_path: Path) -> None:
    run, log, facts = tmp_path / "run", tmp_path / "log", tmp_path / "facts.json"
    job = "security.test_network:train_watched"
    assert forks.run(job, log, run_dir=str(run), facts=str(facts), does_listen=does_listen) == 0, log.read_text()
    seen = json.loads(facts.read_text())
    assert len(seen) == int(does_listen), seen
