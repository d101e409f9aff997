"""Programs that serve a merged model, on loopback: they load it, answer as it was trained to, and stop at the end of the turn."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from adapted import adapt
from orpo.cli import main
from orpo.models.export import export_adapter, export_merged
from orpo.models.load import load_model
from tinymodels import build_tiny_model, build_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION, ANSWER = "What is the weather like today?", "It is sunny, and the wind is light."


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose own end is the end of a text, and an adapter that has learnt one answer and the end of a turn; `orpo export` of it."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = build_tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    base = build_tiny_model("llama", vocab_size=384, hidden_size=64, eos_token_id=0, initializer_range=0.05)
    export_merged(base, tokenizer, folder / "base")
    adapted = adapt(load_model(folder / "base", device="cpu").model, r=16, modules_to_save=["lm_head"])
    talk = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    rest = tokenizer(f"{ANSWER}<|im_end|>\n<|im_start|>user\n{QUESTION}", add_special_tokens=False).input_ids  # what comes if nobody stops
    ids = torch.tensor([[*prompt, *rest]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.01
    export_adapter(adapted.eval(), tokenizer, folder / "adapter")
    assert main(["export", str(folder / "adapter"), "--out", str(folder / "merged")]) == 0
    return folder / "merged"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def transformers_serve(model: Path, port: int) -> list[str]:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        pytest.skip('transformers serve is not installed (pip install "transformers[serving]")')
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--device", "cpu"]


def vllm_serve(model: Path, port: int) -> list[str]:
    if (found := shutil.which("vllm")) is None:
        pytest.skip("vllm is not installed: nothing says here that it serves a merged model")
    return [found, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--enforce-eager"]


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server's address, while it runs."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as words:
        process = subprocess.Popen(command, env=environment, stdout=words, stderr=words)
        try:
            end_s = time.monotonic() + 300
            while not is_up(port):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end_s, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.parametrize("server", [transformers_serve, vllm_serve], ids=["transformers", "vllm"])
def test_a_merged_model_is_served_and_ends_its_turn(server: Any, merged: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(server(merged, port), port, tmp_path / "log") as address:
        talk = [{"role": "user", "content": QUESTION}]
        found = ask(address, "chat/completions", model=str(merged), messages=talk, max_tokens=60, temperature=0)
    (choice,) = found["choices"]
    assert choice["message"]["content"].strip() == ANSWER
    assert choice["finish_reason"] == "stop"


def test_the_model_would_go_on_if_nothing_stopped_it(merged: Path) -> None:
    """The test above can fail: without the end of the turn in generation_config.json, the answer goes on."""
    loaded = load_model(merged, device="cpu")
    assert loaded.model.generation_config.eos_token_id == [0, 2]
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    on = loaded.model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=0)
    stopped = loaded.model.generate(prompt, max_new_tokens=40, do_sample=False)
    assert stopped.shape[1] < on.shape[1]
    assert loaded.tokenizer.decode(stopped[0, prompt.shape[1] :]) == f"{ANSWER}<|im_end|>"
