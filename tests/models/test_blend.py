"""Several adapters in one model: the sum of their updates, and a refusal of what is no sum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapted import adapt
from orpo.cli import main
from orpo.errors import UserError
from orpo.models.blend import Part, why_not_added
from orpo.models.export import export_adapter, export_merged
from orpo.models.load import load_model
from tinymodels import build_tiny_model, build_tiny_tokenizer

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "tied head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "gpt_oss": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}

SLOW = ("rslora", "gpt_oss")


def make_adapters(place: Path, architecture: str = "llama", **settings: Any) -> list[Path]:
    """`a` and `b` of other ranks, on `base`."""
    tokenizer = build_tiny_tokenizer()
    export_merged(build_tiny_model(architecture, vocab_size=384), tokenizer, place / "base")
    return [make_adapter(place / name, place / "base", r=r, seed=r, **settings) for name, r in (("a", 2), ("b", 4))]


def make_adapter(folder: Path, base: Path, *, seed: int = 0, **settings: Any) -> Path:
    loaded = load_model(base, device="cpu")
    adapted = adapt(loaded.model, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return export_adapter(adapted, loaded.tokenizer, folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_model(folder, device="cpu").model.state_dict().items()}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_the_sum_of_the_updates_is_what_is_merged(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with each adapter merged alone: base + 2 (a - base) - 0.5 (b - base), weight by weight."""
    architecture, settings = KINDS[kind]
    a, b = make_adapters(tmp_path, architecture, **settings)
    for adapter in (a, b):
        assert main(["export", str(adapter), "--out", str(tmp_path / f"{adapter.name}-merged")]) == 0
    command = ["export", str(a), "--weight", "2", "--also", f"{b}=-0.5", "--out", str(tmp_path / "both")]
    assert main(command) == 0, capsys.readouterr().err
    base, only_a, only_b, both = (weights(tmp_path / name) for name in ("base", "a-merged", "b-merged", "both"))
    base.setdefault("lm_head.weight", base["model.embed_tokens.weight"])
    moved = 0
    for name, found in both.items():
        expected = base[name] + 2 * (only_a[name] - base[name]) - 0.5 * (only_b[name] - base[name])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        moved += not torch.allclose(found, base[name])
    assert moved >= 3


def test_what_is_no_sum_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is loaded or written, with what would do."""
    a, b = make_adapters(tmp_path)
    others = {
        "DoRA": {"use_dora": True},
        "whole layers": {"modules_to_save": ["lm_head"]},
        "rows for new tokens": {"trainable_token_indices": [5]},
        "a part of its base": {"init_lora_weights": "pissa"},
    }
    for told, settings in others.items():
        c = make_adapter(tmp_path / "c", tmp_path / "base", r=2, **settings)
        for first, second in ((a, c), (c, a)):
            assert main(["export", str(first), "--also", str(second), "--out", str(tmp_path / "out")]) == 2
            assert told in capsys.readouterr().err
        shutil.rmtree(c)
    export_merged(build_tiny_model("llama", vocab_size=384, seed=1), build_tiny_tokenizer(), tmp_path / "other")
    d = make_adapter(tmp_path / "d", tmp_path / "other", r=2)
    wrong = {
        "adapters of one base": ["--also", str(d)],
        "is no adapter": ["--also", str(tmp_path / "base")],
        "no such folder": ["--also", str(tmp_path / "nowhere")],
        "'x' is no weight": ["--also", f"{b}=x"],
        "'0' is no weight": ["--also", f"{b}=0"],
        "'nan' is no weight": ["--also", str(b), "--weight", "nan"],
        "--weight: is for several": ["--weight", "2"],
        "only when they are merged": ["--also", str(b), "--to", "adapter"],
    }
    for told, flags in wrong.items():
        assert main(["export", str(a), "--out", str(tmp_path / "out"), *flags]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(a), "--also", str(d), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 0


def test_a_folder_named_like_a_weight_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "lr=0.1").mkdir()
    assert Part.parse(str(tmp_path / "lr=0.1")) == Part(str(tmp_path / "lr=0.1"), 1.0)
    assert Part.parse(f"{tmp_path}/lr=0.1=0.5") == Part(f"{tmp_path}/lr=0.1", 0.5)
    with pytest.raises(UserError, match="no weight"):
        Part.parse("a=inf")


def test_weights_that_no_setting_names_are_seen(tmp_path: Path) -> None:
    (a, _) = make_adapters(tmp_path)
    assert why_not_added(a) is None
    tensors = load_file(a / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, a / "adapter_model.safetensors")
    assert "lm_head.weight" in str(why_not_added(a))
    config = json.loads((a / "adapter_config.json").read_text())
    (a / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    assert "LOHA" in str(why_not_added(a))
