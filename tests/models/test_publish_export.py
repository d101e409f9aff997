"""`orpo export`: to a hub that is a loopback server, in several files, and on quantized bases."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from adapted import adapt
from orpo.models.export import export_adapter, export_merged
from orpo.models.load import load_model
from orpo.run.folder import RunFolder
from tinymodels import build_tiny_model, build_tiny_tokenizer

IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def moved(adapted: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


class Hub(BaseHTTPRequestHandler):
    """The few calls of an upload: make a repository, ask how files are sent, one commit with them inside."""

    calls: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_known():
            return
        if self.path.endswith("/repos/create"):
            self.calls.append(("create", json.loads(body)))
            self.answer(200, {"url": f"{self.address()}/me/model"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in self.path:
            self.calls.append(("commit", [json.loads(line) for line in body.splitlines()]))
            self.answer(200, {"commitUrl": f"{self.address()}/me/model/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer(200, {})

    def is_known(self) -> bool:
        if self.headers["Authorization"] == "Bearer hf_right":
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def do_GET(self) -> None:
        if self.is_known():
            self.answer(200, {"sha": "1" * 40, "siblings": [], "id": "me/model"})

    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    handler = type("Recording", (Hub,), {"calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.calls = handler.calls  # type: ignore[attr-defined]
    yield server
    server.shutdown()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An adapter as a run leaves it, with what must never be published beside it."""
    build_tiny_model("llama", vocab_size=384).save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base", device="cpu")
    run = tmp_path / "run"
    export_adapter(moved(adapt(loaded.model, r=2)), loaded.tokenizer, run / "adapter")
    RunFolder(run).write(status="complete")
    (run / "README.md").write_text("---\nlibrary_name: peft\n---\nThe card.")
    (run / "metrics.jsonl").write_text('{"loss": 1}\n')
    (run / "adapter" / "rows.jsonl").write_text('{"prompt": "secret"}\n')
    return run


def orpo_export(hub: Any, run: Path, *flags: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:  # noqa: S107
    address = "http://127.0.0.1:9" if hub is None else f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "orpo", "export", str(run), "--to", "hub", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def sent_by(hub: Any) -> dict[str, bytes]:
    ((_, lines),) = [call for call in hub.calls if call[0] == "commit"]
    return {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}


def test_weights_tokenizer_and_card_are_published_privately(hub: Any, run_dir: Path, tmp_path: Path) -> None:
    done = orpo_export(hub, run_dir, "--repo_id", "me/model", "--json")
    assert done.returncode == 0, done.stderr
    ((_, created),) = [call for call in hub.calls if call[0] == "create"]
    assert created.get("private", created.get("visibility")) in (True, "private")
    files = sent_by(hub)
    assert files["README.md"] == (run_dir / "README.md").read_bytes()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert not any("jsonl" in name or name == "run.json" for name in files)
    assert json.loads(done.stdout)["files"] == sorted(files)
    for name, content in files.items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert torch.equal(logits(load_model(tmp_path / "got", device="cpu").model), logits(load_model(run_dir, device="cpu").model))


def test_a_dry_run_lists_the_files_and_sends_nothing(hub: Any, run_dir: Path) -> None:
    done = orpo_export(hub, run_dir, "--merge", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "README.md" in done.stdout
    assert "nothing was sent" in done.stdout
    assert hub.calls == []


@pytest.mark.slow
def test_a_public_merged_model(hub: Any, run_dir: Path) -> None:
    assert orpo_export(hub, run_dir, "--repo_id", "me/model", "--merge", "--public").returncode == 0
    assert hub.calls[0][1].get("private", hub.calls[0][1].get("visibility")) in (False, None, "public")
    assert "model.safetensors" in sent_by(hub)


@pytest.mark.slow
def test_a_hub_that_refuses_or_is_not_there(hub: Any, run_dir: Path) -> None:
    refused = orpo_export(hub, run_dir, "--repo_id", "me/model", token="hf_wrong")
    assert refused.returncode == 2
    assert "HF_TOKEN" in refused.stderr
    assert "hf_wrong" not in refused.stderr
    absent = orpo_export(None, run_dir, "--repo_id", "me/model")
    assert absent.returncode == 2
    assert "the hub refused" in absent.stderr
    for flags, message in (([], "which repository"), (["--repo_id", "a/b/c"], "--repo_id"), (["--repo_id", "m", "--out", "x"], "--out")):
        wrong = orpo_export(hub, run_dir, *flags)
        assert wrong.returncode == 2
        assert message in wrong.stderr


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path: Path) -> None:
    model = build_tiny_model("llama", vocab_size=384)
    folder = export_merged(model, build_tiny_tokenizer(), tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("model-*.safetensors")}
    assert torch.equal(logits(load_model(folder, device="cpu").model), logits(model))


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules to save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_every_kind_of_adapter_is_merged(kind: str, is_in_place: bool, tmp_path: Path) -> None:
    architecture = "qwen3_moe" if kind == "experts" else "llama"
    build_tiny_model(architecture, vocab_size=384).save_pretrained(tmp_path / "base")
    tokenizer = build_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = moved(adapt(load_model(tmp_path / "base", device="cpu").model, r=2, **KINDS[kind]))
    expected = logits(adapted)
    adapter = export_adapter(adapted, tokenizer, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(adapter, device="cpu").model), expected, rtol=0, atol=1e-5)
    merged = export_merged(adapted, tokenizer, tmp_path / "merged", is_in_place=is_in_place)
    torch.testing.assert_close(logits(load_model(merged, device="cpu").model), expected, rtol=1e-4, atol=1e-3)
    if not is_in_place:
        torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_an_adapter_on_a_quantized_base_is_merged_into_its_weights_or_others(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tokenizer = build_tiny_tokenizer()
    build_tiny_model("llama", vocab_size=384, hidden_size=64).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    load_model(tmp_path / "full", load_in_4bit=True, device="cpu").model.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    adapted = moved(adapt(load_model(tmp_path / "stored", device="cpu").model, r=2))
    adapter = export_adapter(adapted, tokenizer, tmp_path / "adapter")

    def export(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orpo", "export", str(adapter), "--out", str(tmp_path / "merged"), "--overwrite", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    plain = export()
    assert plain.returncode == 2
    assert "--dequantize" in plain.stderr
    assert "--base" in plain.stderr
    assert export("--dequantize").returncode == 0
    unpacked = load_model(tmp_path / "merged", device="cpu")
    assert unpacked.facts.quantization is None
    gaps = logits(unpacked.model) - logits(adapted)
    assert gaps.square().mean().sqrt() < 0.1 * logits(adapted).std()  # 4-bit layers compute in bfloat16
    assert export("--base", str(tmp_path / "full")).returncode == 0
    full = load_model(tmp_path / "full", device="cpu")
    expected = logits(load_model(adapter, device="cpu", adapter_base=str(tmp_path / "full")).model)
    torch.testing.assert_close(logits(load_model(tmp_path / "merged", device="cpu").model), expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits(full.model), expected)
