"""A judge behind an address that speaks OpenAI's chat protocol: a provider's, or a server of your own (vLLM, transformers serve).

Servers fail. Connections that break, time-outs, 429 and 5xx, and replies that are no reply are tried again with growing pauses. When
nothing helps, the run stops with what it has; a wrong key or model stops at once; a question that the server refuses (400, 413, 422) is
left out and counted.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from orpo.errors import UserError
from orpo.evaluate.judging.judges import Conversation, Done, Reply
from orpo.system.redact import HIDDEN, redact_text

logger = logging.getLogger(__name__)

MAX_REPLY_BYTES = 16 * 2**20
MAX_FAILED_IN_A_ROW = 3
"""So many questions after another without a reply, every attempt included, and the judge counts as gone."""
_REFUSALS = frozenset({400, 413, 422})
_FATAL = frozenset({401, 402, 403, 404, 405})
_READ_BYTES = 65536


class JudgeUnavailable(UserError):
    """The judge stopped answering, or cannot be asked at all. What it had answered is kept."""

    is_final = False
    """Whether asking anything else is useless, too (wrong key, no such model)."""


class _Refused(Exception):
    """The server will not answer this question, however often it is asked."""


class _Failed(Exception):
    """This attempt failed; another one may not."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Round:
    """What the threads of one round of questions share."""

    def __init__(self, num_questions: int, done: Done) -> None:
        self.num_questions, self.done = num_questions, done
        self.stopped = threading.Event()
        self.fatal: JudgeUnavailable | None = None
        self._lock = threading.Lock()
        self._num_failed_in_a_row = 0

    def answered(self, number: int, reply: Reply | None) -> None:
        with self._lock:
            self._num_failed_in_a_row = 0
            self.done(number, reply)

    def failed(self, number: int, error: JudgeUnavailable) -> None:
        """One question that crashes its server must not hold up the others; several in a row mean that nobody is there."""
        with self._lock:
            self._num_failed_in_a_row += 1
            if error.is_final or self._num_failed_in_a_row >= min(MAX_FAILED_IN_A_ROW, self.num_questions):
                self.fatal = self.fatal or error
                self.stopped.set()
            elif not self.stopped.is_set():
                logger.warning("a question stays without a reply: %s", error.what)
                self.done(number, None)


@dataclass(frozen=True)
class EndpointJudge:
    """An OpenAI-compatible endpoint.

    Attributes:
        url: base address, `https://host/v1`; `/chat/completions` is added where it is missing.
        model: as the server calls it.
        api_key: sent as a bearer token; never written anywhere.
        temperature: of the judge; 0 as in the published protocols.
        options: further fields of the request; None removes a field (`{"max_tokens": None, "max_completion_tokens": 2048}`).
        wants_logprobs: ask for log-probabilities of the first token.
        num_workers: questions at a time.
        timeout_s: for a whole reply, and for any pause within it.
        num_retries: further attempts for a question.
        first_wait_s, longest_wait_s: pauses double from the first to the longest.
        role: what it is in messages, and the first word of its options' names: one that answers in place of judging is another.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    wants_logprobs: bool = False
    num_workers: int = 4
    timeout_s: float = 120.0
    num_retries: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    role: str = "judge"

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{redact_text(self.url)!r} is no address of a {self.role}", where=f"{self.role}_url", expected="http://… or https://…"
            )
        ranges = {
            "workers": (self.num_workers, self.num_workers >= 1, "at least 1"),
            "timeout": (self.timeout_s, 0 < self.timeout_s < float("inf"), "above 0, in seconds"),
            "retries": (self.num_retries, self.num_retries >= 0, "0 or more"),
        }
        for name, (value, is_right, expected) in ranges.items():
            if not is_right:
                raise UserError(f"found {value!r}", where=f"{self.role}_{name}", expected=expected)
        is_near = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if self.api_key and parts.scheme == "http" and not is_near:
            logger.warning("the %s's key goes to %s without encryption (http)", self.role, parts.hostname)

    @property
    def identity(self) -> dict[str, Any]:
        """Model and settings. Not the address: the same model behind another one gives the same replies."""
        return {
            "kind": "endpoint",
            "model": self.model,
            "temperature": self.temperature,
            "options": self.options,
            "logprobs": self.wants_logprobs,
        }

    def ask(self, conversations: Sequence[Conversation], max_tokens: int, done: Done) -> None:
        """Ask with several threads; see `orpo.evaluate.judging.judges.Judge`."""
        round_ = _Round(len(conversations), done)

        def one(number: int) -> None:
            if round_.stopped.is_set():
                return
            try:
                round_.answered(number, self.reply(conversations[number], max_tokens, round_.stopped))
            except _Refused as error:
                logger.warning("the %s refused a question, which is left out: %s", self.role, error)
                round_.answered(number, None)
            except JudgeUnavailable as error:
                round_.failed(number, error)

        with ThreadPoolExecutor(max_workers=max(1, self.num_workers)) as pool:
            futures = [pool.submit(one, number) for number in range(len(conversations))]
            try:
                for future in futures:
                    future.result()
            # An interrupt must end the other threads' pauses as well: leaving the pool waits for them.
            finally:
                round_.stopped.set()
        if round_.fatal is not None:
            raise round_.fatal

    def reply(self, conversation: Conversation, max_tokens: int, stopped: threading.Event | None = None) -> Reply:
        """One reply, however many attempts it takes.

        Raises:
            JudgeUnavailable: no attempt succeeded, or none can.
        """
        stopped = stopped or threading.Event()
        wait_s = self.first_wait_s
        for attempt in range(self.num_retries + 1):
            try:
                return self._attempt(conversation, max_tokens)
            except _Failed as error:
                last = error
            if attempt == self.num_retries or stopped.is_set():
                break
            # Some chance in it, or threads that failed together would all come back together.
            pause = min(self.longest_wait_s, last.wait_s if last.wait_s is not None else wait_s * random.uniform(0.75, 1.25))
            logger.info("the %s failed (%s); next attempt in %.1f s", self.role, last, pause)
            if stopped.wait(pause):
                break
            wait_s *= 2
        raise JudgeUnavailable(
            f"the {self.role} at {self.shown_url} does not answer: {last} ({attempt + 1} attempts)",
            where=f"{self.role}_url",
            mend=f"all replies so far are kept; run the same command again when the {self.role} is back",
        )

    @property
    def shown_url(self) -> str:
        """The address without a login in it."""
        return redact_text(self.url)

    def _hide(self, text: str) -> str:
        """The text without the key, in case the server repeats it."""
        return redact_text(text.replace(self.api_key, HIDDEN) if self.api_key else text)

    def _attempt(self, conversation: Conversation, max_tokens: int) -> Reply:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(conversation),
            "temperature": self.temperature,
            "max_tokens": max_tokens,
            "stream": False,
        }
        if self.wants_logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        body = {name: value for name, value in {**body, **self.options}.items() if value is not None}
        return self._parse(self._post(json.dumps(body).encode()))

    def _post(self, data: bytes) -> bytes:
        address = self.url.rstrip("/")
        if not address.endswith("/chat/completions"):
            address += "/chat/completions"
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "orpo"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(address, data=data, headers=headers, method="POST")  # noqa: S310 - scheme checked above
        deadline_s = time.monotonic() + self.timeout_s
        try:
            with _opener().open(request, timeout=self.timeout_s) as response:
                return _read(response, deadline_s)
        except urllib.error.HTTPError as error:
            raise self._http_error(error, deadline_s) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(_shown(error)) from error

    def _parse(self, data: bytes) -> Reply:
        """A chat completion's text. Anything else is a failed attempt."""
        try:
            choice = json.loads(data)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            start = self._hide(data[:120].decode("utf-8", "replace"))
            raise _Failed(f"not a chat completion: {start!r}") from error
        if content is None:  # cut before its first visible word
            content = ""
        if not isinstance(content, str):
            raise _Failed(f"a chat completion whose content is a {type(content).__name__}")
        finish = choice.get("finish_reason")
        return Reply(self._hide(content), _first_logprobs(choice.get("logprobs")), finish if isinstance(finish, str) else None)

    def _http_error(self, error: urllib.error.HTTPError, deadline_s: float) -> Exception:
        """What a status means: stop, leave the question out, or try again."""
        try:
            detail = self._hide(" ".join(_read(error, deadline_s).decode("utf-8", "replace").split()))[:300]
        except (_Failed, OSError, http.client.HTTPException):
            detail = ""
        message = f"HTTP {error.code} {error.reason}" + (f": {detail}" if detail else "")
        if error.code in _FATAL or 300 <= error.code < 400:
            mend = {401: "check the key", 403: "check the key", 404: f"check --{self.role}_url and --{self.role}_model"}.get(error.code)
            fatal = JudgeUnavailable(f"the {self.role} at {self.shown_url} cannot be asked: {message}", where=f"{self.role}_url", mend=mend)
            fatal.is_final = True
            return fatal
        if error.code in _REFUSALS:
            return _Refused(message)
        return _Failed(message, _retry_after_s(error.headers.get("Retry-After")))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def _read(response: Any, deadline_s: float) -> bytes:
    """The body, within the deadline: a time-out of the socket alone would wait for ever on a byte now and then."""
    # `read1` gives what has come; `read` would wait for a whole piece, and the deadline below with it.
    read: Callable[[int], bytes] = getattr(response, "read1", response.read)
    parts: list[bytes] = []
    size = 0
    while part := read(_READ_BYTES):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise _Failed(f"the reply is larger than {MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline_s:
            raise _Failed("timed out in the middle of a reply")
    # Read in pieces a broken connection ends as a whole reply does; the count alone tells them apart.
    length = response.headers.get("Content-Length")
    if length is not None and length.isdigit() and size < int(length):
        raise _Failed(f"the connection broke after {size} of {length} bytes")
    return b"".join(parts)


def _first_logprobs(logprobs: Any) -> dict[str, float] | None:
    try:
        return {str(item["token"]): float(item["logprob"]) for item in logprobs["content"][0]["top_logprobs"]}
    except (LookupError, TypeError, ValueError):
        return None


def _retry_after_s(value: str | None) -> float | None:
    """Seconds that the server asks to wait; dates are left to the usual pauses."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _shown(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    text = redact_text(str(reason or error))
    return text if text and text != "None" else type(error).__name__
