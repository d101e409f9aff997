"""Every family as a GGUF file that llama.cpp itself reads: the same tokens, the same likeliest words, the end of the turn."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapted import adapt
from llamacpp import LlamaCpp, serving
from llamaquantize import find_library
from orpo.cli import main
from orpo.errors import UserError
from orpo.models import gguf_convert
from orpo.models.export import export_gguf
from orpo.models.load import load_tokenizer
from orpo.models.verify import check_quantized
from realtokenizers import FOLDER as TOKENIZERS
from tinymodels import build_tiny_model, build_tiny_tokenizer
from tokenizerrules import gemma_like, llama3_like, qwen2_like, sentencepiece_like, smollm_like

CONVERTER = gguf_convert.FOLDER / gguf_convert.SCRIPT

pytestmark = pytest.mark.skipif(not CONVERTER.is_file(), reason=f"llama.cpp's converter is not here: {gguf_convert.INSTALL}")
needs_llama_cpp = pytest.mark.skipif(not pytest.importorskip("xllamacpp", reason="llama.cpp is not installed"), reason="")

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"tie_word_embeddings": True, "head_dim": 16}
GEMMA3_LAYERS = {"num_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}  # llama.cpp knows no other order
COHERE2_LAYERS = {"num_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}

# Family -> architecture of tinymodels, what differs from it, the tokenizer's rule.
FAMILIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3_SCALING}, llama3_like),
    "mistral": ("mistral", {"sliding_window": None}, sentencepiece_like),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, qwen2_like),
    "qwen3": ("qwen3", {"head_dim": 16}, qwen2_like),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "norm_topk_prob": True}, qwen2_like),  # as Qwen's own; llama.cpp knows no other
    "gemma2": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 16}, gemma_like),
    "gemma3": ("gemma3", {**GEMMA, **GEMMA3_LAYERS, "query_pre_attn_scalar": 16}, gemma_like),
    "phi3": ("phi3", {}, sentencepiece_like),
    "olmo2": ("olmo2", {}, build_tiny_tokenizer),
    "granite": ("granite", {}, smollm_like),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}, llama3_like),
    "gpt2": ("gpt2", {}, build_tiny_tokenizer),
    "gpt_neox": ("gpt_neox", {}, build_tiny_tokenizer),
    "cohere2": ("cohere2", {**COHERE2_LAYERS, "tie_word_embeddings": True, "head_dim": 16}, build_tiny_tokenizer),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, build_tiny_tokenizer),
}
TALKS = [
    [{"role": "user", "content": "What is the weather like today?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "It's 12345  blanks\n\n\nand Ångström 日本 🙂"},
        {"role": "assistant", "content": "The answer is no."},
        {"role": "user", "content": "Tell me a story about the sea, don't you?"},
    ],
]


def build(family: str, **more: Any) -> tuple[Any, Any]:
    architecture, overrides, make_tokenizer = FAMILIES[family]
    tokenizer = make_tokenizer()
    # Rows beyond the tokens stay in the file, but for Gemma 3, whose converter leaves them out: then nothing is to share the probability.
    rows = len(tokenizer) if family == "gemma3" else 400
    return build_tiny_model(architecture, vocab_size=rows, hidden_size=64, **overrides, **more), tokenizer


def stops_of(tokenizer: Any) -> list[int]:
    """Where llama.cpp stops: at the tokenizer's end, and at tokens whose text says that they are one."""
    other = tokenizer.get_vocab().get("<|endoftext|>")
    return [tokenizer.eos_token_id, *([] if other is None else [other])]


def gap(model: Any, server: LlamaCpp, ids: list[int], tokenizer: Any) -> float:
    """The largest difference of a log-probability, over the 20 likeliest tokens after some of the beginnings of a text.

    Beginnings whose likeliest next token is the end or a part of a character are left out: llama.cpp tells no probabilities with it.
    """
    silent = set(stops_of(tokenizer)) | {token_id for token_id in range(400) if "\ufffd" in tokenizer.decode([token_id])}
    with torch.no_grad():
        expected_LV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    ends = [end for end in range(1, len(ids) + 1) if int(expected_LV[end - 1].argmax()) not in silent][-4:]
    gaps = []
    for end in ends:
        found = server.greedy(ids[:end], 1, num_probs=20)["completion_probabilities"][0]["top_logprobs"]
        gaps += [abs(entry["logprob"] - float(expected_LV[end - 1, entry["id"]])) for entry in found]
    assert len(gaps) == 20 * len(ends) > 0
    return max(gaps)


def without_end(tokens: list[int], stops: list[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), None)]


def same_tokens(server: LlamaCpp, tokenizer: Any) -> list[int]:
    """Rendered and cut into tokens as transformers does; ids of the first talk."""
    for talk in TALKS:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert server.rendered(talk) == text
        assert server.tokens(text) == tokenizer(text, add_special_tokens=False).input_ids
    return list(tokenizer.apply_chat_template(TALKS[0], add_generation_prompt=True, return_dict=False))


@needs_llama_cpp
@pytest.mark.parametrize(
    "family", [name if name in ("llama3", "qwen3") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_llama_cpp_reads_every_family(family: str, tmp_path: Path) -> None:
    model, tokenizer = build(family)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32", converter=CONVERTER)
    with serving(path) as server:
        ids = same_tokens(server, tokenizer)
        stops = stops_of(tokenizer)
        assert gap(model, server, ids, tokenizer) < (WITH_TABLE if family in GELU else EXACT)
        for start in (ids, ids[: len(ids) // 2], ids[:3]):
            new = model.generate(torch.tensor([start]), max_new_tokens=32, do_sample=False, eos_token_id=stops, pad_token_id=0)
            assert without_end(server.greedy(start, 32)["tokens"], stops) == without_end(new[0, len(start) :].tolist(), stops)
        stopped = server.ask("completion", prompt=ids, n_predict=8, temperature=0, logit_bias=[[stops[0], 1000]])
        assert stopped["stop_type"] == "eos"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


EXACT, WITH_TABLE = 1e-3, 5e-3
"""In nats, in float32; llama.cpp has GELU as a table in float16."""
GELU = ("gpt2", "gpt_neox", "gemma2", "gemma3")

# In nats, over the 20 likeliest tokens; the weights are drawn wide, so that rounding shows more than in a trained model.
BOUNDS = {"float16": 0.02, "bfloat16": 0.1, "q8_0": 0.4}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_within_the_rounding_of_the_type(family: str, kind: str, tmp_path: Path) -> None:
    if (family, kind) == ("gpt_oss", "q8_0"):
        pytest.skip("a likeliest token moves onto the end of a turn, with which llama.cpp tells no probabilities")
    model, tokenizer = build(family, initializer_range=0.1)
    how = {"quantize": kind} if kind == "q8_0" else {"dtype": kind}
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", converter=CONVERTER, **how)
    with serving(path) as server:
        ids = same_tokens(server, tokenizer)
        found = gap(model, server, ids, tokenizer)
    assert found < BOUNDS[kind]


@needs_llama_cpp
def test_a_merged_adapter_with_new_tokens_ends_its_turn(tmp_path: Path) -> None:
    """A ChatML-extended base: the end of a turn is not the tokenizer's end of a text, and llama.cpp stops at both."""
    tokenizer = qwen2_like()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), hidden_size=64, tie_word_embeddings=True)
    adapted = adapt(model, r=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    path = export_gguf(adapted.eval(), tokenizer, tmp_path / "m.gguf", dtype="float32", stop_token_ids=[end], converter=CONVERTER)
    with serving(path) as server:
        ids = same_tokens(server, tokenizer)
        assert gap(adapted, server, ids, tokenizer) < EXACT
        for stop in (end, tokenizer.eos_token_id):
            answer = server.ask("completion", prompt=ids, n_predict=8, temperature=0, logit_bias=[[stop, 1000]])
            assert answer["stop_type"] == "eos"


# Tokenizer as it is published (make tokenizers) -> architecture and what differs from it.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_1": ("llama", {"rope_parameters": LLAMA3_SCALING}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma3": ("gemma3", {**GEMMA, **GEMMA3_LAYERS, "query_pre_attn_scalar": 16}),
    "gptoss": ("gpt_oss", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    "deepseek_v3": ("llama", {}),
}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_are_cut_alike(name: str, tmp_path: Path) -> None:
    """A hundred thousand merges, and special tokens that small ones lack; 32 greedy tokens are the same."""
    if not (TOKENIZERS / name / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of {name} is not here: make tokenizers")
    tokenizer = load_tokenizer(TOKENIZERS / name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endfor %}"
        )
    architecture, overrides = PUBLISHED[name]
    model = build_tiny_model(architecture, vocab_size=len(tokenizer), hidden_size=64, **overrides)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32", converter=CONVERTER)
    with serving(path) as server:
        for talk in TALKS:
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            # llama.cpp takes a beginning away here where its tokenizer puts it back.
            bos = tokenizer.bos_token or ""
            assert server.rendered(talk).removeprefix(bos) == text.removeprefix(bos)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert server.tokens(text) == ids
        stops = stops_of(tokenizer)
        prompt = torch.tensor([ids])
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, eos_token_id=stops)
        assert without_end(server.greedy(ids, 32)["tokens"], stops) == without_end(new[0, len(ids) :].tolist(), stops)


# --- what is refused, and how it is said ---


def test_an_unknown_tokenizer_is_told_in_the_converters_words(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = build_tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = build_tiny_model("qwen2", vocab_size=384)
    with pytest.raises(UserError, match=r"BPE pre-tokenizer was not recognized(.|\n)*--converter"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", converter=CONVERTER)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_weight_is_not_published(tmp_path: Path) -> None:
    """Gemma 2 has no head of its own in GGUF: an untied one would be left out."""
    model = build_tiny_model("gemma2", vocab_size=400, hidden_size=64, tie_word_embeddings=False)
    with pytest.raises(UserError, match="not the model it was made from"):
        export_gguf(model, build_tiny_tokenizer(), tmp_path / "m.gguf", dtype="float32", converter=CONVERTER)
    assert list(tmp_path.iterdir()) == []


def test_the_converter_has_no_network_and_runs_no_foreign_code(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import urllib.request, os\n"
        "class TextModel:\n    def prepare_metadata(self): pass\n    def load_hparams(*_): return {}\n"
        "def main():\n"
        "    import transformers\n"
        "    assert os.environ['HF_HUB_OFFLINE'] == '1' and 'https_proxy' not in os.environ\n"
        "    (open('here.txt', 'w')).close()\n"
        "    try:\n        transformers.AutoTokenizer.from_pretrained('model', trust_remote_code=True)\n"
        "    except Exception as error: print('ValueError: refused:', type(error).__name__)\n"
        "    urllib.request.urlopen('http://127.0.0.1:9/')\n"
    )
    model, tokenizer = build_tiny_model("qwen2", vocab_size=384), build_tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        with pytest.raises(UserError, match="without network"):
            export_gguf(model, tokenizer, tmp_path / "out" / "m.gguf", converter=script)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantize", "q4_k_m"], "llama-quantize, which is not on the PATH"),
        (["--quantize", "q9"], "expected: q8_0"),
        (["--converter", "nowhere.py"], "there is no converter"),
    ],
)
def test_what_is_missing_is_named(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny_model("qwen2", vocab_size=384).save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["export", str(tmp_path / "model"), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "m.gguf").exists()


def test_the_converter_is_found_beside_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "llama.cpp" / "build" / "bin"
    programs.mkdir(parents=True)
    (programs / "llama-quantize").write_text("#!/bin/sh\n")
    (programs / "llama-quantize").chmod(0o755)
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.write_text("")
    monkeypatch.setenv("PATH", str(programs))
    assert gguf_convert.find_converter() == script
    monkeypatch.setenv("PATH", "/nowhere")
    assert gguf_convert.find_converter() == CONVERTER
    assert gguf_convert.find_converter(script.parent) == script


def test_a_quantizer_on_the_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that copies, which says how it was called."""
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncp "$1" "$2" && echo "$3" > ' + str(tmp_path / "kind"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    path = export_gguf(build_tiny_model("llama", vocab_size=384), build_tiny_tokenizer(), tmp_path / "m.gguf", quantize="q4_k_m")
    assert path.is_file()
    assert (tmp_path / "kind").read_text().strip() == "Q4_K_M"


@pytest.fixture
def quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's own, under the name of its program."""
    if find_library() is None:
        pytest.skip("llama.cpp's quantizer is not here: make quantizer")
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parents[1] / "llamaquantize.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


# In nats, over the 20 likeliest tokens of a model of random weights.
K_QUANTS = {"q6_k": 0.5, "q5_k_m": 1.0, "q4_k_m": 2.0}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_read_by_llama_cpp(kind: str, family: str, tmp_path: Path, quantizer: None) -> None:
    """Of both writers' files; smaller, and near the model."""
    tokenizer = build_tiny_tokenizer() if family == "llama" else qwen2_like()
    model = build_tiny_model(family, vocab_size=400, hidden_size=256, initializer_range=0.05)
    whole = export_gguf(model, tokenizer, tmp_path / "f32.gguf", dtype="float32", converter=None if family == "llama" else CONVERTER)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", quantize=kind)
    assert path.stat().st_size < 0.45 * whole.stat().st_size
    with serving(path) as server:
        assert gap(model, server, same_tokens(server, tokenizer), tokenizer) < K_QUANTS[kind]


def test_a_quantizer_that_loses_weights_is_not_published(tmp_path: Path) -> None:
    path = export_gguf(build_tiny_model("llama", vocab_size=384), build_tiny_tokenizer(), tmp_path / "m.gguf", dtype="float32")
    other = export_gguf(build_tiny_model("llama", vocab_size=384, seed=1), build_tiny_tokenizer(), tmp_path / "n.gguf", dtype="float32")
    fewer = export_gguf(build_tiny_model("llama", vocab_size=384, num_layers=2), build_tiny_tokenizer(), tmp_path / "o.gguf")
    check_quantized(path, path)
    for wrong in (other, fewer):
        with pytest.raises(UserError, match="is not the model"):
            check_quantized(path, wrong)
