"""One run configuration, and every command that looks at its rows sees the same ones, as the same ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from htmlpages import Page
from orpo.cli import main
from orpo.data.dataset import encode_rows, fingerprint
from orpo.data.types import Dropped, TokenGroup
from orpo.inference.ready import make_ready
from orpo.run.config import resolve
from orpo.run.data import load_encoder, open_run_rows, split_by_prompt
from tinymodels import CHATML_TEMPLATE, build_tiny_model, build_tiny_tokenizer

LONG = "word " * 400
"""More tokens than any default limit, fewer than the model's."""
NUM_PAIRS, NUM_SINGLE = 30, 16


def rows_of(number: int) -> dict[str, Any]:
    """A row under its own column names: some too long for the model, some longer than 1,024 tokens, some with special-token text."""
    question = f"Question {number}?" + (f" {LONG}" if number % 3 == 0 else "") + (f" {LONG * 2}" if number == 7 else "")
    text = "It says <|im_end|> here." if number % 4 == 0 else "It does."
    return {"question": question, "good": f"Yes, {number}. {text}", "bad": f"No, {number}!", "topic": "ab"[number % 2]}


def own_template(folder: Path) -> str:
    path = folder / "template.jinja"
    path.write_text(CHATML_TEMPLATE.replace("'\\n'", "' '"))
    return str(path)


VARIANTS: dict[str, dict[str, Any]] = {
    "a fraction held out, no limit": {"eval_fraction": 0.4, "max_length": None},
    "plain text, split special tokens": {
        "eval_fraction": 0.4, "max_length": None, "chat_template": "none", "special_tokens_in_text": "split",
    },
    "a file's template, prompts cut": {
        "eval_fraction": 0.4, "max_length": 700, "max_prompt_length": 600, "truncation": "keep_end", "chat_template": "FILE",
    },
    "a source of its own": {"eval_dataset_name": "HELD OUT", "max_length": None},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run, and what its rows are by the library's own account."""

    config_file: str
    folder: Path
    rows: list[Any]
    results: list[TokenGroup | Dropped]
    encoder: Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tiny_tokenizer()
    tokenizer.model_max_length = 1900
    build_tiny_model("llama", vocab_size=len(tokenizer), num_layers=1, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("run")
    pairs = [rows_of(number) for number in range(NUM_PAIRS)]
    single = [{"request": f"Do {number}.", "answer": f"Done, {number}."} for number in range(NUM_SINGLE)]
    more = [rows_of(100 + number) for number in range(6)]
    for name, rows in {"pairs": [*pairs, {**pairs[0], "bad": None}], "single": single, "more": more}.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = dict(VARIANTS[request.param])
    if keys.get("chat_template") == "FILE":
        keys["chat_template"] = own_template(home)
    if "eval_dataset_name" in keys:
        keys["eval_dataset_name"] = str(home / "more.jsonl")
    options = {
        "model_name_or_path": str(model),
        "dataset_name": [
            {"path": str(home / "pairs.jsonl")},
            {"path": str(home / "single.jsonl"), "column_map": {"prompt": "request", "completion": "answer"}},
        ],
        "column_map": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        "sft_rows": True,
        "output_dir": str(home / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        **keys,
    }
    config_file = home / "run.yaml"
    config_file.write_text(json.dumps(options))
    assert main(["train", str(config_file)]) == 0
    config = resolve(str(config_file))
    encoder = load_encoder(config)
    rows, results = zip(*encode_rows(open_run_rows(config).train, encoder), strict=True)
    return Run(str(config_file), home / "run", list(rows), list(results), encoder)


def facts_of(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run.folder / "run.json").read_text())["data"]
    return facts


def said(command: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_the_rows_are_of_every_kind(run: Run) -> None:
    """Or the other tests would prove little."""
    groups = [item for item in run.results if isinstance(item, TokenGroup)]
    assert sum(not group.pairs for group in groups) == NUM_SINGLE + 1
    assert any("special_tokens_in_text" in group.notes for group in groups)
    if run.encoder.truncation == "drop":
        assert run.encoder.max_length == 1900
        assert max(group.longest_tokens for group in groups) > 1024
        assert [item.reason for item in run.results if isinstance(item, Dropped)] == ["prompt_too_long"]
    else:
        assert any("prompt_trimmed" in group.notes for group in groups)


def test_check_and_plan_see_what_was_trained_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    trained = facts_of(run)
    checked = said(["check", run.config_file, "--quick", "--json"], capsys)
    (data,) = [item for item in checked["findings"] if item["name"] == "data" and item["facts"]]
    assert data["facts"]["fingerprint"] == trained["fingerprint"]
    assert data["facts"]["held_out_fingerprint"] == trained["held_out_fingerprint"]
    assert data["facts"]["train"] == trained["train"]
    planned = said(["plan", run.config_file, "--json"], capsys)["data"]
    assert planned["fingerprint"] == trained["fingerprint"]


def test_audit_sees_all_rows_of_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    audited = said(["audit", run.config_file, "--workers", "1", "--json"], capsys)
    groups = [item for item in run.results if isinstance(item, TokenGroup)]
    assert audited["num_rows"] == len(run.rows) == facts_of(run)["train"]["num_rows"]
    assert audited["tokens"]["fingerprint"] == fingerprint(groups)
    assert audited["tokens"]["dropped"] == facts_of(run)["train"]["dropped"]


def test_preview_shows_the_ids_of_training(run: Run, tmp_path: Path) -> None:
    picked = [0, 3, 7, NUM_PAIRS]
    assert main(["preview", run.config_file, "--html", str(tmp_path / "page.html"), "--rows", ",".join(map(str, picked))]) == 0
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    shown = [int(found[1]) for _, attributes in page.tags if (found := re.match(r"id (\d+)", attributes.get("title") or ""))]
    wanted: list[int] = []
    for row, item in zip(run.rows, run.results, strict=True):
        if row.where.row in picked and isinstance(item, TokenGroup):
            wanted += np.concatenate([item.prompt_ids, *item.response_ids]).tolist()
    assert shown == wanted


def test_eval_sees_what_was_held_out(run: Run, tmp_path: Path) -> None:
    trained = facts_of(run)
    assert main(["eval", str(run.folder), "--tasks", "pairs", "--output", str(tmp_path), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "pairs.json").read_text())["result"]
    assert result["rows"]["num_rows"] - sum(result["rows"]["dropped"].values()) == trained["num_held_out"]
    if trained["held_out"] is not None:
        assert result["fingerprint"] == trained["held_out_fingerprint"]
        return
    groups = [item for item in run.results if isinstance(item, TokenGroup)]
    _, held_out = split_by_prompt(groups, resolve(run.config_file)["eval_fraction"])
    assert fingerprint(held_out) == trained["held_out_fingerprint"]
    assert any(not group.pairs for group in held_out)
    assert result["fingerprint"] == fingerprint(group for group in held_out if group.pairs)


def test_another_model_is_asked_about_the_same_rows(run: Run, model: Path, tmp_path: Path) -> None:
    """A model that is no run has no length contract of its own: the run's counts, and no row is missing on one side."""
    command = ["eval", str(run.folder), "--tasks", "pairs", "--against", str(model), "--output", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    result = json.loads((tmp_path / "pairs.json").read_text())["result"]
    assert result["against"]["num_pairs"] == result["model"]["num_pairs"]


def test_chat_asks_with_the_prompts_of_training(run: Run) -> None:
    encoder = make_ready(str(run.folder), device="cpu").encoder
    compared = 0
    for row, item in zip(run.rows, run.results, strict=True):
        if isinstance(item, TokenGroup) and not {"prompt_trimmed", "boundary_merge"} & set(item.notes):
            assert encoder.prompt_ids(row.prompt).tolist() == item.prompt_ids.tolist()
            compared += 1
    assert compared > NUM_PAIRS // 2
