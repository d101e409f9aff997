"""What is written can be read back by others and means the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapted import adapt
from orpo.errors import UserError
from orpo.models.export import export_adapter, export_gguf, export_merged
from orpo.models.gguf_write import why_not_here
from orpo.models.load import load_model, weights_sha256
from orpo.models.softcap import honour_soft_cap
from tinymodels import build_tiny_model, build_tiny_tokenizer
from tokenizerrules import llama3_like, sentencepiece_like, smollm_like

IDS = torch.arange(3, 23).reshape(2, 10)
TEXTS = ["Hello, the answer is 12345.", "  two blanks  and 7", "It's\n\n\nÅngström 日本 🙂", "<|im_start|>user\nhi<|im_end|>", "a", " "]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained_adapter(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    honour_soft_cap(model)  # as whoever loads or trains one does; the oldest transformers drops it
    adapted = adapt(model, r=4, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    build_tiny_model("llama", vocab_size=384).save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- adapter ---


@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens", "lm_head"]])
def test_adapter_comes_back(base_folder: Path, tmp_path: Path, modules_to_save: list[str] | None) -> None:
    base, tokenizer, _ = load_model(base_folder, device="cpu")
    adapted = trained_adapter(base, modules_to_save=modules_to_save)
    folder = export_adapter(adapted, tokenizer, tmp_path / "out" / "adapter")
    loaded = load_model(folder, device="cpu")
    torch.testing.assert_close(logits(loaded.model), logits(adapted), rtol=0, atol=0)
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert not (folder / "README.md").exists()
    assert not list(folder.glob("*.bin"))
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_adapter_with_grown_embeddings_comes_back(base_folder: Path, tmp_path: Path) -> None:
    base, tokenizer, _ = load_model(base_folder, device="cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    base.resize_token_embeddings(len(tokenizer))
    adapted = trained_adapter(base)
    folder = export_adapter(adapted, tokenizer, tmp_path / "adapter")
    loaded = load_model(folder, device="cpu")
    assert loaded.model.get_input_embeddings().weight.shape[0] == 385
    torch.testing.assert_close(logits(loaded.model), logits(adapted), rtol=0, atol=0)


def test_plain_model_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter"):
        export_adapter(build_tiny_model(), build_tiny_tokenizer(), tmp_path / "adapter")


# --- merged ---


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gemma2", "qwen3", "gpt2"])
def test_merged_equals_adapter(architecture: str, tmp_path: Path) -> None:
    adapted = trained_adapter(build_tiny_model(architecture, vocab_size=384))
    expected = logits(adapted)
    export_merged(adapted, build_tiny_tokenizer(), tmp_path / "merged")
    loaded = load_model(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=2e-5)
    assert loaded.tokenizer.chat_template
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=0)


def test_plain_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = build_tiny_model("llama_tied")
    export_merged(model, build_tiny_tokenizer(), tmp_path / "model")
    assert weights_sha256(tmp_path / "model") == weights_sha256(model)


def test_dtype_on_disk_leaves_memory_alone(tmp_path: Path) -> None:
    model = build_tiny_model("llama", vocab_size=384)
    export_merged(model, build_tiny_tokenizer(), tmp_path / "half", dtype="bfloat16")
    assert model.dtype == torch.float32
    assert load_model(tmp_path / "half", device="cpu").facts.stored_dtype == "bfloat16"
    with pytest.raises(UserError, match="not a dtype"):
        export_merged(model, build_tiny_tokenizer(), tmp_path / "other", dtype="int4")


@pytest.mark.parametrize(("stop", "expected"), [((), 2), ((2,), 2), ((7, 2, 7), [2, 7])])
def test_stop_ids_reach_generation(tmp_path: Path, stop: tuple[int, ...], expected: Any) -> None:
    export_merged(build_tiny_model(), build_tiny_tokenizer(), tmp_path / "model", stop_token_ids=stop)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == expected


# --- the place ---


def test_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    model, tokenizer = build_tiny_model(), build_tiny_tokenizer()
    for is_overwriting in (False, True):
        with pytest.raises(UserError, match="taken|no exported model"):
            export_merged(model, tokenizer, taken, is_overwriting=is_overwriting)
    assert (taken / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_link_is_not_followed(tmp_path: Path) -> None:
    export_merged(build_tiny_model(), build_tiny_tokenizer(), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError):
        export_merged(build_tiny_model(seed=1), build_tiny_tokenizer(), tmp_path / "link", is_overwriting=True)
    assert weights_sha256(tmp_path / "real") == weights_sha256(build_tiny_model())


def test_own_export_is_replaced_on_request(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    export_merged(build_tiny_model(), tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="taken"):
        export_merged(build_tiny_model(seed=1), tokenizer, tmp_path / "model")
    assert weights_sha256(tmp_path / "model") == weights_sha256(build_tiny_model())
    export_merged(build_tiny_model(seed=1), tokenizer, tmp_path / "model", is_overwriting=True)
    assert weights_sha256(tmp_path / "model") == weights_sha256(build_tiny_model(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_broken_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tiny_tokenizer()
    export_merged(build_tiny_model(), tokenizer, tmp_path / "model")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export_merged(build_tiny_model(seed=1), tokenizer, tmp_path / "model", is_overwriting=True)
    assert weights_sha256(tmp_path / "model") == weights_sha256(build_tiny_model())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- GGUF ---


@pytest.fixture(autouse=True)
def _needs_gguf(request: pytest.FixtureRequest) -> None:
    if "gguf" in request.node.name:
        pytest.importorskip("gguf")


def read_back(path: Path) -> Any:
    return load_model(path, device="cpu")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama_tied", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_gguf_comes_back_equal(architecture: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """transformers' reader is the oracle: it undoes llama.cpp's order of the query and key rows by itself."""
    model = build_tiny_model(architecture, vocab_size=384, **overrides)
    path = export_gguf(model, build_tiny_tokenizer(), tmp_path / "m.gguf", dtype="float32")
    loaded = read_back(path)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-5)
    assert loaded.model.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_gguf_query_rows_are_interleaved(tmp_path: Path) -> None:
    """Head of 8 rows: transformers pairs row i with i + 4, llama.cpp row 2i with 2i + 1."""
    from gguf import GGUFReader

    model = build_tiny_model("llama", vocab_size=384)
    path = export_gguf(model, build_tiny_tokenizer(), tmp_path / "m.gguf", dtype="float32")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    ours = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    np.testing.assert_array_equal(stored["blk.0.attn_q.weight"], ours[[8 * head + row for head in range(4) for row in order]])
    np.testing.assert_array_equal(stored["blk.0.attn_v.weight"], model.model.layers[0].self_attn.v_proj.weight.detach().numpy())


def test_gguf_float16_rounds_matrices_alone(tmp_path: Path) -> None:
    model = build_tiny_model("llama", vocab_size=384)
    path = export_gguf(model, build_tiny_tokenizer(), tmp_path / "m.gguf")
    loaded = read_back(path).model.state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(loaded[name], expected), name


def test_gguf_holds_a_merged_adapter(tmp_path: Path) -> None:
    adapted = trained_adapter(build_tiny_model("llama", vocab_size=384))
    path = export_gguf(adapted, build_tiny_tokenizer(), tmp_path / "m.gguf", dtype="float32")
    torch.testing.assert_close(logits(read_back(path).model), logits(adapted), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("build", [build_tiny_tokenizer, smollm_like, llama3_like, sentencepiece_like])
def test_gguf_tokenizer_comes_back_equal(build: Any, tmp_path: Path) -> None:
    original = build()
    model = build_tiny_model("llama", vocab_size=400)  # some rows more than tokens
    restored = read_back(export_gguf(model, original, tmp_path / "m.gguf")).tokenizer
    # A leading blank reads differently in transformers' own reader (Metaspace) than in SentencePiece; llama.cpp does as SentencePiece.
    for text in [text for text in TEXTS if build is not sentencepiece_like or text.strip() == text]:
        assert restored(text, add_special_tokens=False).input_ids == original(text, add_special_tokens=False).input_ids, text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(restored, name) == getattr(original, name), name
    assert restored.decode(original("the answer").input_ids).strip() == "the answer"


def test_gguf_metadata_is_that_of_llama_cpp(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = build_tiny_model("llama", vocab_size=400)
    reader = GGUFReader(export_gguf(model, smollm_like(), tmp_path / "m.gguf", name="tiny"))
    found = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 1,
        "llama.block_count": 3,
        "llama.context_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 400,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {key: found[key] for key in expected} == expected
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 400
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert types[:3] == [3, 3, 3]
    assert (tokens[399], types[399]) == ("[PAD399]", 5)


def test_gguf_name_holds_no_path(tmp_path: Path, base_folder: Path) -> None:
    from gguf import GGUFReader

    model, tokenizer, _ = load_model(base_folder, device="cpu")
    reader = GGUFReader(export_gguf(model, tokenizer, tmp_path / "m.gguf"))
    assert reader.get_field("general.name").contents() == "base"


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("gpt2", {}, "not for 'gpt2'"),
        ("qwen3", {}, "not for 'qwen3'"),
        ("llama", {"attention_bias": True}, "no place for the tensor"),
        ("llama", {"hidden_act": "gelu"}, "silu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope scaling"),
    ],
)
def test_what_is_not_written_here_goes_to_the_converter(architecture: str, overrides: dict[str, Any], message: str) -> None:
    reason = why_not_here(build_tiny_model(architecture, vocab_size=384, **overrides), build_tiny_tokenizer(), dtype="float16")
    assert reason is not None
    assert message in reason


def test_an_unknown_split_goes_to_the_converter() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model("llama", vocab_size=384)
    assert why_not_here(model, tokenizer, dtype="float16") is None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "splits text" in str(why_not_here(model, tokenizer, dtype="float16"))


def test_gguf_refuses_a_foreign_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="384 tokens, the model 128"):
        export_gguf(build_tiny_model("llama", vocab_size=128), build_tiny_tokenizer(), tmp_path / "m.gguf")


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_gguf_refuses_values_beyond_float16(value: float, tmp_path: Path) -> None:
    model = build_tiny_model("llama", vocab_size=384)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight"):
        export_gguf(model, build_tiny_tokenizer(), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_gguf_says_that_the_window_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gguf import GGUFReader

    model = build_tiny_model("mistral", vocab_size=384, sliding_window=8)
    with caplog.at_level(logging.WARNING):
        path = export_gguf(model, build_tiny_tokenizer(), tmp_path / "m.gguf")
    assert "no sliding window" in caplog.text
    assert GGUFReader(path).get_field("llama.context_length").contents() == 8


def test_gguf_place(tmp_path: Path) -> None:
    model, tokenizer = build_tiny_model("llama", vocab_size=384), build_tiny_tokenizer()
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        export_gguf(model, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="float16 or float32"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="q4_0")
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf")
    before = path.read_bytes()
    with pytest.raises(UserError, match="there already"):
        export_gguf(model, tokenizer, path)
    assert path.read_bytes() == before
    export_gguf(build_tiny_model("llama", vocab_size=384, seed=1), tokenizer, path, is_overwriting=True)
    assert path.read_bytes() != before


@pytest.mark.slow
def test_gguf_of_smollm2_comes_back_equal(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm2
    loaded = read_back(export_gguf(model, tokenizer, tmp_path / "smollm2.gguf", dtype="float32"))
    assert weights_sha256(loaded.model) == weights_sha256(model)
    messages = [{"role": "user", "content": "Count  12 to 3's… 日本"}]
    assert loaded.tokenizer.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=1e-5)
