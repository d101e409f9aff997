"""No export takes its name that is not the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapted import adapt
from orpo.errors import UserError
from orpo.models.export import export_adapter, export_gguf, export_merged, export_whole_state
from orpo.models.load import load_model, merge
from orpo.models.verify import Probe, check_merge
from tinymodels import ARCHITECTURES, build_tiny_model, build_tiny_tokenizer

IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def moved(adapted: Any, size: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.fixture
def tokenizer() -> Any:
    return build_tiny_tokenizer()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_is_published(architecture: str, dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    """The comparison refuses no right export, in either precision."""
    model = build_tiny_model(architecture, vocab_size=384)
    folder = export_merged(model, tokenizer, tmp_path / "whole", dtype=dtype)
    loaded = load_model(folder, device="cpu", dtype="auto")
    assert loaded.facts.dtype == dtype
    targets = ["in_proj"] if architecture == "mamba" else None  # PEFT takes no other layer of it
    export_merged(moved(adapt(loaded.model, r=2, target_modules=targets), 0.02), tokenizer, tmp_path / "merged")


@pytest.mark.parametrize("seed", [6, 9, 12])
@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral"])
def test_a_token_that_rounding_sends_to_another_expert_is_no_fault(architecture: str, seed: int, tmp_path: Path, tokenizer: Any) -> None:
    folder = export_merged(build_tiny_model(architecture, vocab_size=384), tokenizer, tmp_path / "whole", dtype="bfloat16")
    torch.manual_seed(seed)  # PEFT draws A from the process's own numbers
    adapted = moved(adapt(load_model(folder, device="cpu", dtype="auto").model, r=2), 0.02)
    before = Probe.of(adapted)
    merged = merge(adapted)
    check_merge(before, merged)
    with torch.no_grad():
        merged.model.layers[0].self_attn.o_proj.weight.mul_(0.5)
    with pytest.raises(UserError, match="not the model it was made from"):
        check_merge(before, merged)


TIED = [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"], ["q_proj"]]


@pytest.mark.parametrize("targets", TIED, ids="+".join)
@pytest.mark.parametrize("architecture", ["llama_tied", "qwen3", "gemma2", "cohere"])
def test_a_tied_head_in_the_targets_is_merged_rightly(architecture: str, targets: list[str], tmp_path: Path, tokenizer: Any) -> None:
    build_tiny_model(architecture, vocab_size=384, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = moved(adapt(load_model(tmp_path / "base", device="cpu").model, r=2, target_modules=targets))
    expected = logits(adapted)
    folder = export_merged(adapted, tokenizer, tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(folder, device="cpu").model), expected, rtol=1e-4, atol=1e-3)
    adapter = export_adapter(adapted, tokenizer, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(adapter, device="cpu").model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=0)


def test_a_wrong_merge_is_not_published(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong between the model and the files: here the merge, as it was before the head was untied."""
    monkeypatch.setattr("orpo.models.adapters._untie_adapted", lambda base: None)
    for to, name in ((export_merged, "merged"), (export_gguf, "m.gguf")):
        adapted = moved(adapt(build_tiny_model("llama_tied", vocab_size=384), r=2, target_modules=["lm_head"]))
        with pytest.raises(UserError, match="not the model it was made from"):
            to(adapted, tokenizer, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_not_published(tmp_path: Path, tokenizer: Any) -> None:
    """The base on disk is not the one that was trained on: the adapter would give another model."""
    build_tiny_model("llama", vocab_size=384).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = moved(adapt(load_model(tmp_path / "base", device="cpu").model, r=2))
    build_tiny_model("llama", vocab_size=384, seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="adapter that was written is not the model"):
        export_adapter(adapted, tokenizer, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_lost_or_changed_tensor_is_not_published(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo.models import gguf_write as ggufwriter

    pytest.importorskip("gguf")
    model = build_tiny_model("llama", vocab_size=384)
    real = ggufwriter._values

    def off_by_two_roundings(name: str, *arguments: Any) -> np.ndarray:
        values = real(name, *arguments)
        return values * (1 + 2 * np.finfo(values.dtype).eps) if name == "blk.1.ffn_up.weight" else values

    def not_interleaved(name: str, *arguments: Any) -> np.ndarray:
        return real("plain" if "attn_k" in name else name, *arguments)

    for broken in (off_by_two_roundings, not_interleaved):
        for dtype in ("float16", "float32"):
            with monkeypatch.context() as patch:
                patch.setattr(ggufwriter, "_values", lambda *a, broken=broken: broken(*a).astype(a[-1]))
                with pytest.raises(UserError, match="differs by more than"):
                    export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_gguf_names_the_end_of_a_turn(tmp_path: Path, tokenizer: Any) -> None:
    from gguf import GGUFReader

    tokenizer.eos_token = "<|endoftext|>"
    end, text_end = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    model = build_tiny_model("llama", vocab_size=384)
    for number, (own, given) in enumerate((([text_end, end], ()), (text_end, (end,)), (None, (end, text_end)))):
        model.generation_config.eos_token_id = own
        reader = GGUFReader(export_gguf(model, tokenizer, tmp_path / f"{number}.gguf", stop_token_ids=given))
        assert reader.get_field("tokenizer.ggml.eot_token_id").contents() == end
        assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == text_end


def test_merging_into_a_quantized_base_gives_advice_that_can_be_followed(tmp_path: Path, tokenizer: Any) -> None:
    """A base that is stored in 4 bits cannot be loaded without them: the adapter itself is what can be exported."""
    pytest.importorskip("bitsandbytes")
    build_tiny_model("llama", vocab_size=384, hidden_size=64).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    quantized = load_model(tmp_path / "plain", load_in_4bit=True, device="cpu")
    with pytest.raises(UserError, match="without load_in_4bit"):
        merge(moved(adapt(quantized.model, r=2)))
    fresh = load_model(tmp_path / "plain", load_in_4bit=True, device="cpu")
    fresh.model.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    adapted = moved(adapt(load_model(tmp_path / "stored", device="cpu").model, r=2))
    with pytest.raises(UserError, match="--to adapter"):
        merge(adapted)
    again = load_model(export_adapter(adapted, tokenizer, tmp_path / "adapter"), device="cpu")
    gaps = logits(again.model) - logits(adapted)  # training keeps norms in float32, loading does not
    assert gaps.square().mean().sqrt() < 0.1 * logits(adapted).std()


@pytest.fixture
def hub_base(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A base in the hub's cache, of which a tag and `main` hold different weights; the commit of each."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    commits = {"v1": "a" * 40, "main": "b" * 40}
    for seed, (name, commit) in enumerate(commits.items()):
        snapshot = cache / "models--owner--base" / "snapshots" / commit
        build_tiny_model("llama", vocab_size=384, seed=seed).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        reference = cache / "models--owner--base" / "refs" / name
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return commits


def test_an_adapter_names_the_commit_of_its_base(hub_base: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    """Without it the adapter would be put on `main`, which is another model here."""
    for revision, commit in (("v1", hub_base["v1"]), (None, hub_base["main"])):
        adapted = moved(adapt(load_model("owner/base", revision=revision, device="cpu").model, r=2))
        folder = export_adapter(adapted, tokenizer, tmp_path / f"adapter-{revision}")
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == commit
        torch.testing.assert_close(logits(load_model(folder, device="cpu").model), logits(adapted), rtol=0, atol=1e-5)


def test_a_run_on_a_revision_keeps_its_adapter(hub_base: dict[str, str], tmp_path: Path) -> None:
    """The whole way: the run's checkpoints and its last weights name the commit too."""
    from orpo.cli import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}", "chosen": f"yes {n}", "rejected": f"no {n}"}) + "\n" for n in range(8)))
    run = tmp_path / "run"
    flags = {"model_name_or_path": "owner/base", "model_revision": "v1", "dataset_name": rows, "output_dir": run, "use_peft": "true"}
    flags |= {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": "true", "save_strategy": "steps", "save_steps": 2}
    assert main(["train", *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]) == 0
    for folder in (run / "adapter", run / "checkpoint-2"):
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == hub_base["v1"]


def test_an_adapter_whose_base_is_gone_is_written_with_a_word(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What was trained is kept: its tensors can be compared without the base."""
    build_tiny_model("llama", vocab_size=384).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = moved(adapt(load_model(tmp_path / "base", device="cpu").model, r=2))
    (tmp_path / "base" / "model.safetensors").unlink()
    folder = export_adapter(adapted, tokenizer, tmp_path / "adapter")
    assert (folder / "adapter_model.safetensors").is_file()
    assert "cannot be tried on its base" in caplog.text


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_whole_weights_are_read_as_written_whatever_the_model_computes_with(held: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    """Under ZeRO in bf16 a model holds rounded weights, and those that it is trained to are brought together in float32."""
    model = build_tiny_model("llama", vocab_size=len(tokenizer))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = export_whole_state(model.to(held), state, tokenizer, tmp_path / "model")
    written = load_model(str(folder)).model.state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
