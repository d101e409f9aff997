"""Which engine a model gets, what the choice leaves behind, and that packed attention still lets a model generate and be saved."""

from __future__ import annotations

import json
import logging
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo.data.types import TokenGroup
from orpo.engine import attention, choose, padded
from orpo.engine.choose import CHECK_ANSWER_TOKENS, CHECK_PROMPT_TOKENS, Agreement, Compute, compare, rows_for_check
from orpo.engine.layout import collate
from orpo.errors import UserError
from orpo.objective import DPO, ORPO, SimPO
from randomgroups import group, random_groups
from tinymodels import ARCHITECTURES, build_tiny_model

EXACT = [name for name in ARCHITECTURES if name != "mamba"]
OBJECTIVE = ORPO(1.0)


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    return random_groups(8, prompt=(10, 16), answer=(3, 12))


def build(architecture: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_tiny_model(architecture, **options)


# --- models it holds for -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EXACT)
def test_auto_takes_the_shared_engine_for_every_exact_family(
    architecture: str, groups: list[TokenGroup], caplog: pytest.LogCaptureFixture
) -> None:
    model = build(architecture).train()
    engine = choose.choose(model, groups, OBJECTIVE, router_coef=0.0)
    assert engine.name == "shared", engine.reason
    assert model.config._attn_implementation == attention.NAME
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not [record for record in caplog.records if record.name.startswith("orpo") and record.levelno >= logging.WARNING]


@pytest.mark.parametrize("architecture", EXACT)
def test_every_parameter_passes_the_check(architecture: str, groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check samples a few; none may be one whose gradient is rounding alone (a bias of keys in OPT) and differs by all of its norm."""
    monkeypatch.setattr(choose, "_sampled_parameters", lambda model: [item for item in model.parameters() if item.requires_grad])
    assert compare(build(architecture), groups[:2], OBJECTIVE).holds


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt_neox", "granite"])
def test_bf16_models_are_not_refused_for_rounding(architecture: str, groups: list[TokenGroup]) -> None:
    """A frozen bf16 base model under LoRA: single tokens differ by tenths of a nat between two correct engines."""
    assert choose.choose(build(architecture).bfloat16(), groups, OBJECTIVE).name == "shared"


def test_adapters_are_compared_through_their_wrapper(groups: list[TokenGroup]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert choose.choose(model, groups, OBJECTIVE).name == "shared"
    assert model.get_base_model().config._attn_implementation == attention.NAME


def test_a_model_without_trainable_weights_is_compared_by_values(groups: list[TokenGroup], caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama").requires_grad_(False)
    with caplog.at_level(logging.INFO):
        assert choose.choose(model, groups, OBJECTIVE).name == "shared"
    assert "log-probabilities differ" in caplog.text
    assert "gradients" not in caplog.text, "nothing is said of what was not compared"


@pytest.mark.parametrize("objective", [SimPO(), DPO()], ids=str)
def test_other_objectives(objective: Any) -> None:
    groups = [
        TokenGroup(item.prompt_ids, item.response_ids, item.pairs, item.is_ended, item.where, reference_logp_sums=(-9.0, -8.0))
        for item in random_groups(3, prompt=(10, 12))
    ]
    assert choose.choose(build("llama"), groups, objective).name == "shared"


def test_choosing_twice_is_choosing_once(groups: list[TokenGroup]) -> None:
    """A second trainer gets a model that is under packed attention already; the padded side must not be unmasked by it."""
    model = build("gemma2")
    expected = padded.token_logps(model, collate(groups))
    for _ in range(2):
        assert choose.choose(model, groups, OBJECTIVE).name == "shared"
        assert (padded.token_logps(model, collate(groups)) - expected).abs().max() < 1e-5
    assert choose.choose(model, groups, OBJECTIVE, requested="padded").name == "padded"


def test_a_choice_made_in_an_evaluation_is_the_same(groups: list[TokenGroup]) -> None:
    """Many scripts evaluate before they train; there gradients are off."""
    with torch.no_grad():
        engine = choose.choose(build("llama"), groups, OBJECTIVE)
    assert engine.name == "shared", engine.reason


def test_the_random_state_is_left_alone(groups: list[TokenGroup]) -> None:
    """A resumed run makes the same choice again and must go on with the same dropout and shuffles."""
    model = build("llama")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    choose.choose(model, groups, OBJECTIVE)
    assert torch.equal(before, torch.get_rng_state())


# --- models it does not hold for ---------------------------------------------------------------------------------------------------------


def with_custom_attention(model: Any) -> Any:
    """Attention of its own in every layer, as remote code brings it: causal, masked, and deaf to the interface."""

    def forward(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        size = hidden_states.shape[1]
        visible = torch.ones(size, size, dtype=torch.bool).tril()
        if attention_mask is not None and attention_mask.shape[-1] == size:
            visible = visible & (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)[0, 0]
        scores = (hidden_states @ hidden_states.transpose(1, 2)).masked_fill(~visible, -torch.inf)
        return self.o_proj(torch.softmax(scores, -1) @ hidden_states), None

    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)
    return model


def test_custom_attention_falls_back_with_the_class_and_the_difference(groups: list[TokenGroup], caplog: pytest.LogCaptureFixture) -> None:
    model = with_custom_attention(build("llama"))
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING):
        engine = choose.choose(model, groups, OBJECTIVE)
    assert engine.name == "padded"
    (record,) = [item for item in caplog.records if item.name == "orpo.engine.choose"]
    assert "LlamaForCausalLM" in record.message
    assert "nats" in record.message
    assert "differ" in engine.reason
    assert model.config._attn_implementation == before


def test_a_state_space_model_falls_back(groups: list[TokenGroup], caplog: pytest.LogCaptureFixture) -> None:
    model = build("mamba")
    with caplog.at_level(logging.WARNING):
        engine = choose.choose(model, groups, OBJECTIVE)
    assert engine.name == "padded"
    (record,) = [item for item in caplog.records if item.name == "orpo.engine.choose"]
    assert "MambaForCausalLM" in record.message
    result = engine.step(model, collate(groups[:2]), OBJECTIVE)
    result.loss.backward()
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("make", [lambda: with_custom_attention(build("llama")), lambda: build("mamba")], ids=["custom", "mamba"])
def test_asking_for_shared_where_it_does_not_hold_stops(make: Callable[[], Any], groups: list[TokenGroup]) -> None:
    with pytest.raises(UserError, match="ForCausalLM") as caught:
        choose.choose(make(), groups, OBJECTIVE, requested="shared")
    assert caught.value.where == "engine"


def test_a_module_that_is_no_transformers_model_falls_back(groups: list[TokenGroup]) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.config = nn.Embedding(128, 128), types.SimpleNamespace()

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return types.SimpleNamespace(logits=self.embedding(input_ids))

    engine = choose.choose(Table(), groups, OBJECTIVE)
    assert engine.name == "padded"
    assert "not a transformers model" in engine.reason


@pytest.mark.parametrize(
    ("architecture", "options"), [("llama", {"attention_dropout": 0.1}), ("gpt2", {"dropout": 0.1}), ("opt", {"attention_dropout": 0.1})]
)
def test_attention_dropout_rules_it_out_before_the_first_step(
    architecture: str, options: dict[str, float], groups: list[TokenGroup]
) -> None:
    model = build(architecture, **{key: value for key, value in options.items() if key != "dropout"})
    for module in model.modules():
        if "dropout" in options and isinstance(module, nn.Dropout):
            module.p = options["dropout"]
    engine = choose.choose(model, groups, OBJECTIVE)
    assert engine.name == "padded"
    assert "dropout" in engine.reason
    engine.step(model.train(), collate(groups), OBJECTIVE).loss.backward()


def test_dropout_outside_attention_is_no_obstacle(groups: list[TokenGroup]) -> None:
    model = build("gpt2")
    for layer in model.transformer.h:
        layer.mlp.dropout.p = 0.1
    engine = choose.choose(model, groups, OBJECTIVE)
    assert engine.name == "shared"
    engine.step(model.train(), collate(groups), OBJECTIVE).loss.backward()


def masked_only(architecture: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {
        "qwen2_moe": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "num_experts": 2, "num_experts_per_tok": 1},
        "llama4_text": {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8},
    }[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **shape, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, **extra)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "llama4_text"])
def test_windows_that_packed_attention_is_not_told_of(architecture: str) -> None:
    """Qwen 2 MoE has its window in the mask alone, Llama 4 its chunks; short first rows would hide it from the comparison."""
    short = random_groups(4, prompt=(4, 6), answer=(3, 5))
    engine = choose.choose(masked_only(architecture), short, OBJECTIVE)
    assert engine.name == "shared", engine.reason
    engine = choose.choose(masked_only(architecture), [*short, *random_groups(1, prompt=(40, 41))], OBJECTIVE)
    assert engine.name == "padded"
    assert "window" in engine.reason or "chunk" in engine.reason


def test_windows_that_it_is_told_of_are_no_obstacle() -> None:
    rows = [*random_groups(4, prompt=(2, 3), answer=(2, 4)), *random_groups(1, prompt=(40, 41))]
    for architecture in ("mistral", "gemma2", "gemma3", "gpt_oss", "cohere2"):
        engine = choose.choose(build(architecture), rows, OBJECTIVE)
        assert engine.name == "shared", (architecture, engine.reason)


def test_padded_can_be_asked_for_and_costs_no_comparison(groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "compare", lambda *_: pytest.fail("compared"))
    model = build("llama")
    before = model.config._attn_implementation
    assert choose.choose(model, groups, OBJECTIVE, requested="padded").name == "padded"
    assert model.config._attn_implementation == before


# --- the comparison ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_that_is_not_a_number_agrees(dtype: torch.dtype) -> None:
    nan = float("nan")
    assert Agreement(0.0, 0.0, dtype).holds
    assert not Agreement(nan, 0.0, dtype).holds
    assert not Agreement(0.0, nan, dtype).holds
    assert not Agreement(float("inf"), 0.0, dtype).holds


def test_a_wrong_backward_is_seen(groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention._BlockAttention.backward
    monkeypatch.setattr(attention._BlockAttention, "backward", staticmethod(lambda ctx, *grads: (original(ctx, *grads)[0], *[None] * 4)))
    agreement = compare(build("llama"), groups[:2], OBJECTIVE)
    assert agreement.logp_difference < 1e-4
    assert not agreement.holds


def test_long_rows_are_cut_for_the_comparison() -> None:
    """The end of the prompt and the beginning of each answer."""
    short, long = group([1] * 10, [2] * 5, [3] * 5), group(list(range(2000)), list(range(900)), [3] * 5, [4] * 900)
    first, second = rows_for_check([short, long, short])
    assert first.num_tokens == short.num_tokens
    assert second.prompt_ids.tolist() == list(range(2000 - CHECK_PROMPT_TOKENS, 2000))
    assert [len(ids) for ids in second.response_ids] == [CHECK_ANSWER_TOKENS, 5, CHECK_ANSWER_TOKENS]
    assert second.response_ids[0][0] == 0
    assert (second.pairs, second.is_ended) == (long.pairs, long.is_ended)
    assert len(rows_for_check([long])) == 1


# --- what training leaves behind ----------------------------------------------------------------------------------------------------------

GENERATING = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt2", "cohere2", "phi"]


@pytest.mark.parametrize("architecture", GENERATING)
@pytest.mark.parametrize("padding", [0, 5])
def test_generation_under_packed_attention_is_that_of_the_usual_one(architecture: str, padding: int, groups: list[TokenGroup]) -> None:
    """Greedy tokens of a batch of two, one of them padded on the left, past the window of the tiny models."""
    model = build(architecture)
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (2, 12))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert choose.choose(model, groups, OBJECTIVE).name == "shared"
    assert model.generate(ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_name_of_packed_attention_is_not_saved(architecture: str, groups: list[TokenGroup], tmp_path: Path) -> None:
    model = build(architecture)
    expected = padded.token_logps(model, collate(groups))
    choose.choose(model, groups, OBJECTIVE)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert attention.NAME not in json.dumps(json.loads(file.read_text()))
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != attention.NAME
    assert (padded.token_logps(again, collate(groups)) - expected).abs().max() < 1e-5


def test_an_ordinary_loss_under_packed_attention_is_the_usual_one(groups: list[TokenGroup]) -> None:
    """A user's own code after training: right-padded batch, labels, no layout."""
    model = build("mistral")
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    expected = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    choose.choose(model, groups, OBJECTIVE)
    assert model(input_ids=ids, attention_mask=mask, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_in_16_bits_are_compared_in_their_own_precision_where_float32_is_wanted() -> None:
    """As they are until FSDP2 makes them float32, and as a frozen base stays."""
    model = build_tiny_model("llama", num_layers=2).to(torch.bfloat16)
    assert choose.choose(model, random_groups(4), ORPO(), compute=Compute(torch.float32)).name == "shared"


def test_a_comparison_that_finds_no_memory_says_nothing_of_the_model() -> None:
    """The padded engine, which needs more, is no way out."""
    model = build_tiny_model("llama")
    before = model.config._attn_implementation

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = model.model.layers[0].register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        choose.choose(model, random_groups(2), ORPO())
    handle.remove()
    assert model.config._attn_implementation == before
    assert choose.choose(model, random_groups(2), ORPO()).name == "shared"
