"""llama.cpp itself, for tests: a server in a process of its own (tests/llamaserver.py) that answers on a loopback port."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("llamaserver.py")


class LlamaCpp:
    """One GGUF file as llama.cpp reads it."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **body: Any) -> Any:
        """The server's answer to one request."""
        request = urllib.request.Request(f"{self.address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text that may hold special tokens, without what a tokenizer puts around it."""
        return list(self.ask("tokenize", content=text, add_special=False, parse_special=True)["tokens"])

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """Messages through the chat template in the file, with the opening of the answer."""
        return str(self.ask("apply-template", messages=messages)["prompt"])

    def greedy(self, ids: list[int], num_tokens: int, *, num_probs: int = 0) -> dict[str, Any]:
        """The likeliest continuation: `tokens`, `stop_type`, and per token the likeliest tokens' log-probabilities."""
        return dict(
            self.ask(
                "completion",
                prompt=ids,
                n_predict=num_tokens,
                temperature=0,
                n_probs=num_probs,
                return_tokens=True,
                samplers=["temperature"],
                cache_prompt=False,
            )
        )


@contextmanager
def serving(path: Path) -> Iterator[LlamaCpp]:
    """A server for one file, ended with the block.

    Raises:
        AssertionError: llama.cpp does not take the file; with its last words.
    """
    with tempfile.TemporaryFile("w+") as words:  # not a pipe, which fills up and stops the server
        process = subprocess.Popen(
            [sys.executable, str(SERVER), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            process.communicate()
            words.seek(0)
            raise AssertionError(words.read()[-2000:])
        try:
            yield LlamaCpp(address)
        finally:
            process.communicate()  # ends its input
