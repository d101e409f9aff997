"""Every kind of adapter trains as a user starts it: on the shared engine, and what is saved is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapted import adapt
from orpo.cli import main
from orpo.errors import UserError
from orpo.models.adapters import raise_rate_of_b
from orpo.models.load import load_model
from tinymodels import build_tiny_model, build_tiny_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_target_modules": "all"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"lora_init": "pissa"},
    "olora": {"lora_init": "olora"},
    "orthogonal": {"lora_init": "orthogonal"},
    "gaussian": {"lora_init": "gaussian"},
    "lora+": {"loraplus_lr_ratio": 16},
    "experts": {"lora_target_parameters": "mlp.experts.gate_up_proj", "lora_target_modules": "q_proj"},
    "qlora": {"load_in_4bit": True},
}

QUICK = ("dora", "pissa", "lora+", "experts", "qlora")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("llama", "qwen3_moe"):
        build_tiny_model(name, vocab_size=384, hidden_size=64).save_pretrained(folder / name)
        build_tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"Say {n}", "chosen": f"yes, it is {n}", "rejected": f"no {n}"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(place: Path, run: Path, model: str | Path, **more: Any) -> int:
    flags = {"model_name_or_path": model, "dataset_name": place / "rows.jsonl", "output_dir": run, "use_peft": True, "lora_r": 4}
    flags |= {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "learning_rate": 1e-3, "report_to": "none", **more}
    return main(
        [
            "train",
            *(str(part).lower() if isinstance(part, bool) else str(part) for key, value in flags.items() for part in (f"--{key}", value)),
        ]
    )


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_every_kind_trains_on_the_shared_engine_and_comes_back(kind: str, place: Path, tmp_path: Path) -> None:
    """The run compares its adapter with the model before it is published: a kind that does not come back would end it."""
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    model = place / ("qwen3_moe" if kind == "experts" else "llama")
    assert train(place, tmp_path / "run", model, **KINDS[kind]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["engine"] == "shared"
    assert facts["status"] == "complete"
    loaded = load_model(tmp_path / "run" / "adapter", device="cpu")
    assert any("lora" in name for name, _ in loaded.model.named_parameters())


def test_an_adapter_is_trained_on(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "first", place / "llama") == 0
    assert train(place, tmp_path / "second", tmp_path / "first" / "adapter", use_peft=False) == 0
    first, second = (load_model(tmp_path / name / "adapter", device="cpu").model for name in ("first", "second"))
    moved = [
        not torch.equal(a, b)
        for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True)
        if "lora" in name
    ]
    frozen = [
        torch.equal(a, b)
        for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True)
        if "lora" not in name
    ]
    assert all(moved)
    assert all(frozen)


def test_b_learns_at_its_own_rate() -> None:
    model = adapt(build_tiny_model("llama"), r=2)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights[:4], "weight_decay": 0.1}, {"params": weights[4:], "weight_decay": 0.0}], lr=1e-4)
    raise_rate_of_b(optimizer, model, 16)
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates = {names[id(weight)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for weight in group["params"]}
    assert len(rates) == len(weights)
    for name, (rate, _) in rates.items():
        assert rate == pytest.approx(16e-4 if "lora_B" in name else 1e-4), name
    assert {decay for _, decay in rates.values()} == {0.1, 0.0}
    plain = build_tiny_model("llama")
    with pytest.raises(UserError, match="no LoRA adapter"):
        raise_rate_of_b(torch.optim.AdamW(plain.parameters(), lr=1e-4), plain, 16)


def test_an_unknown_start_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, tmp_path / "run", place / "llama", lora_init="pizza") == 2
    assert "lora_init" in capsys.readouterr().err
