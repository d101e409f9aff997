"""A real run of a tiny model from training over evaluation to its report and card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orpo.cli import main


def test_train_eval_report(tmp_path: Path, tiny_model_factory, tiny_tokenizer_factory, capsys: pytest.CaptureFixture[str]) -> None:
    """The card is there when training ends, and renewed with the results; the page shows what the files say."""
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(24)]
    rows.append({"prompt": "Empty?", "chosen": "", "rejected": "No."})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    options = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": run,
        "eval_fraction": 0.3,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "orpo_alpha": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
    }
    assert main(["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    card = (run / "README.md").read_text(encoding="utf-8")
    num_trained = 24 - json.loads((run / "run.json").read_text())["data"]["num_held_out"]  # the held-out ones were not trained on
    assert f"base, tuned with ORPO on {num_trained} preference pairs of rows.jsonl, 4 steps" in card
    assert "dropped: empty\\_answer | 1" in card
    assert str(tmp_path) not in card
    assert "A good answer" not in card
    assert main(["eval", str(run), "--tasks", "pairs", "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().err == ""  # nothing is missing
    page = (run / "report.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert data is not None
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drawn = {trace["name"]: trace["y"] for trace in json.loads(data.group(1))["loss"]["traces"]}
    assert drawn["loss"] == pytest.approx([record["loss"] for record in logged if "loss" in record], rel=1e-5)
    change = json.loads((run / "eval" / "pairs.json").read_text())["result"]["change"]["margin"]["value"]
    assert f"{change:+.3f}".replace("-", "−") in page
    shown = json.loads((run / "eval" / "pairs.json").read_text())["result"]["shown"]
    assert page.count('<article class="card pair">') == len(shown) > 2
    assert "change +" in page  # a token's numbers
    assert f"{change:+.3f}".replace("-", "−") in (run / "README.md").read_text(encoding="utf-8")
