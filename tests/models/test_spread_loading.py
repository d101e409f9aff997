"""A model that will be spread over processes is read as it is stored, and comes to be what one process would have read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from orpo.models.adapters import put_adapter, starts_without_base
from orpo.models.dtype import settle_dtype, spread_dtype
from orpo.models.load import load_model
from tinymodels import build_tiny_model, build_tiny_tokenizer

PLAIN: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stored in bfloat16."""
    build_tiny_model("llama", vocab_size=384).to(torch.bfloat16).save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    others = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        assert weight.dtype == others[name].dtype, name
        assert torch.equal(weight, others[name]), name


def test_it_is_read_as_it_is_stored_and_comes_to_be_float32(folder: Path) -> None:
    spread = load_model(folder, device="cpu", is_spread=True)
    assert {weight.dtype for weight in spread.model.parameters()} == {torch.bfloat16}
    assert spread.facts == load_model(folder, device="cpu").facts
    settle_dtype(spread.model.parameters(), spread_dtype(spread.model))
    assert_same_weights(spread.model, load_model(folder, device="cpu").model)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_its_weights_are_pages_of_their_file(device: str, folder: Path) -> None:
    """Of several processes the device is called cpu:0."""
    model = load_model(folder, device=device, is_spread=True).model
    places = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
    mapped = [tuple(int(end, 16) for end in place[0].split("-")) for place in places]
    assert all(any(low <= weight.data_ptr() < high for low, high in mapped) for weight in model.parameters())


@pytest.mark.parametrize("case", ["some in float32", "the configuration says another"])
def test_nothing_is_rounded_where_weights_are_stored_otherwise(case: str, folder: Path) -> None:
    path, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(path)
    exact = {name: weight.float() * 1.001 for name, weight in weights.items() if case != "some in float32" or "norm" in name}
    save_file({**weights, **exact}, path, metadata={"format": "pt"})
    assert json.loads(config.read_text())["dtype"] == "bfloat16"
    spread = load_model(folder, device="cpu", is_spread=True).model
    settle_dtype(spread.parameters(), spread_dtype(spread))
    assert_same_weights(spread, load_model(folder, device="cpu").model)


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        {**PLAIN, "init_lora_weights": "gaussian"},
        {**PLAIN, "use_dora": True},
        {**PLAIN, "init_lora_weights": "pissa"},
        {**PLAIN, "modules_to_save": ["embed_tokens"]},
        {**PLAIN, "trainable_token_indices": [1, 2]},
    ],
)
def test_an_adapter_starts_as_on_float32(options: dict[str, Any], folder: Path) -> None:
    adapted = []
    for is_spread in (True, False):
        model = load_model(folder, device="cpu", is_spread=is_spread).model
        torch.manual_seed(5)
        adapted.append(put_adapter(model, LoraConfig(**options)))
    is_stored = any(weight.dtype == torch.bfloat16 for weight in adapted[0].parameters())
    assert is_stored == starts_without_base(LoraConfig(**options)), "what needs the base's values is put on them in float32"
    settle_dtype(adapted[0].parameters(), spread_dtype(adapted[0]))
    assert_same_weights(*adapted)
    assert {name for name, weight in adapted[0].named_parameters() if weight.requires_grad} == {
        name for name, weight in adapted[1].named_parameters() if weight.requires_grad
    }
