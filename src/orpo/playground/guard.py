"""Who may ask: pages of this server alone, on this machine alone, or whoever has the token where the server can be reached from outside."""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.requests import Request

COOKIE = "orpo-token"
_LOCAL_NAMES = {"localhost", "ip6-localhost"}


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host.lower() in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refusal(request: Request, token: str | None) -> str | None:
    """Why a request is not answered; None where it may be.

    Without a token the name under which the page was asked for must be one of this machine's own: a web page elsewhere can make a name of
    its own point here (DNS rebinding). A page elsewhere can also send requests here without reading the answers; its browser says where it
    is from.
    """
    host = request.headers.get("host", "")
    name = _name_of(host)
    if token is None and not is_loopback(name):
        return f"this page is for this machine alone, not for {name[:100]!r}; open it as http://127.0.0.1, or start it with --host"
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return "another web page may not use this one"
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and request.method != "GET":
        return "another web page may not use this one"
    if token is not None and not is_same(request.cookies.get(COOKIE, ""), token):
        return "open the address with ?token=… that was printed where the chat was started"
    return None


def is_same(given: str, token: str) -> bool:
    """Compare in a time that says nothing about where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _name_of(host: str) -> str:
    """Without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
