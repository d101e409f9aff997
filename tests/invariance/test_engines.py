"""Exactness: one plain forward per sequence = padded engine = shared engine, for every family of models, values and gradients.

Tolerances. float32: 1e-5 nats in a token's log-probability, 1e-4 of a parameter's gradient norm. bf16 rounds every product to 2^-9 of its
size, so both engines are compared with the float32 truth, and the shared one may be further from it than the padded one by a quarter,
plus 0.002 nats in the mean or 0.005 of the gradient's norm. Measured on these models, whose weights are drawn ten times wider than usual:
0.004 to 0.019 nats in the mean (0.21 at most), 1 to 4 % of the gradient's norm (Granite, whose residuals are scaled: 11 %), no engine
nearer than the other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orpo.data.types import TokenGroup
from orpo.engine import attention, logits, padded, shared
from orpo.engine.attention import QUERY_BLOCK
from orpo.engine.choose import attention_implementation
from orpo.engine.layout import PreferenceBatch, StepResult, collate
from orpo.objective import ORPO
from randomgroups import as_pairs, random_groups
from tinymodels import ARCHITECTURES, build_tiny_model

EXACT = [name for name in ARCHITECTURES if name != "mamba"]
BUDGET_BYTES = 2**24
OBJECTIVE = ORPO(1.0)

Step = Callable[[nn.Module, PreferenceBatch], StepResult]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    attention.register()


@pytest.fixture(scope="module")
def batch() -> PreferenceBatch:
    """Pairs, four answers with six pairs, a lone answer, three answers with two pairs; prompts longer than the tiny models' windows."""
    return collate(random_groups(6, kinds=("pair", "four", "sft", "partial"), prompt=(10, 18), answer=(1, 14)))


def build(architecture: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_tiny_model(architecture, **options)


def by_padding(model: nn.Module, batch: PreferenceBatch) -> StepResult:
    return padded.step(model, batch, OBJECTIVE)


def by_sharing(model: nn.Module, batch: PreferenceBatch, budget_bytes: int = BUDGET_BYTES) -> StepResult:
    with attention_implementation(shared.unwrap(model), attention.NAME):
        return shared.step(model, batch, OBJECTIVE, budget_bytes=budget_bytes)


def gradients(model: nn.Module, step: Step, batch: PreferenceBatch) -> tuple[StepResult, dict[str, Tensor]]:
    """A step's result and the gradient of every trainable parameter; the model is left without gradients."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The implementation stays in force for the backward too, where checkpointed layers run again.
        if step is by_padding:
            result = by_padding(model, batch)
            result.loss.backward()
        else:
            with attention_implementation(shared.unwrap(model), attention.NAME):
                result = step(model, batch)
                result.loss.backward()
    found = {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return result, found


def assert_same(
    model: nn.Module,
    one: tuple[StepResult, dict[str, Tensor]],
    other: tuple[StepResult, dict[str, Tensor]],
    *,
    logp: float = 1e-5,
    grad: float = 1e-4,
) -> None:
    (found, found_grads), (expected, expected_grads) = one, other
    assert (found.logp_N - expected.logp_N).abs().max() <= logp
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=1e-4)
    assert found_grads.keys() == expected_grads.keys()
    assert found_grads.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Relative to the parameter's own norm; only what is zero but for rounding (a bias of keys in OPT) is measured by the largest.
    largest = max(gradient.norm() for gradient in expected_grads.values())
    for name, expected_grad in expected_grads.items():
        distance = (found_grads[name] - expected_grad).norm()
        assert distance <= grad * expected_grad.norm() + 1e-6 * largest, f"{name}: {distance / expected_grad.norm():.1e}"


def checkpoint_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """Gradient checkpointing on; transformers 5.2x renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def one_by_one(model: nn.Module, groups: Sequence[TokenGroup]) -> Tensor:
    """Log-probabilities from one plain forward per sequence: no padding, no mask, nothing shared. In the order of `collate`."""
    found = []
    for item in groups:
        rows = []
        for ids in item.response_ids:
            sequence = torch.from_numpy(np.concatenate([item.prompt_ids, ids]).astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=sequence[None], use_cache=False).logits[0].double()
            rows.append(torch.log_softmax(logits[:-1], -1).gather(1, sequence[1:, None])[:, 0])
        num_prompt = len(item.prompt_ids) - 1
        winner = item.pairs[0][0] if item.pairs else 0
        found += [rows[winner][:num_prompt], *(row[num_prompt:] for row in rows)]
    return torch.cat(found)


# --- float32, every family ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EXACT)
def test_the_padded_engine_equals_one_forward_per_sequence(architecture: str, batch: PreferenceBatch) -> None:
    model = build(architecture)
    expected = one_by_one(model, batch.groups)
    assert expected.std() > 0.2  # a model that says the same of every token would prove nothing
    for pad_side in ("right", "left"):
        found = padded.token_logps(model, batch, pad_side)
        assert (found.double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("architecture", EXACT)
def test_the_shared_engine_equals_the_padded_one(architecture: str, batch: PreferenceBatch) -> None:
    model = build(architecture).train()
    assert_same(model, gradients(model, by_sharing, batch), gradients(model, by_padding, batch))


@pytest.mark.parametrize("architecture", ["llama_tied", "phi", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_tiny_logits_budget_changes_nothing(architecture: str, rows: int, batch: PreferenceBatch) -> None:
    """One row at a time, and chunks smaller than most groups; tied, biased, soft-capped and scaled heads."""
    model = build(architecture)

    def step(model: nn.Module, batch: PreferenceBatch) -> StepResult:
        return by_sharing(model, batch, budget_bytes=rows * 128 * 4)

    assert_same(model, gradients(model, step, batch), gradients(model, by_padding, batch))


@pytest.mark.parametrize("scope", ["sequence", "response"])
def test_both_scopes_of_the_next_token_loss(scope: str, batch: PreferenceBatch) -> None:
    model, scoped = build("llama"), collate(batch.groups, scope)
    assert_same(model, gradients(model, by_sharing, scoped), gradients(model, by_padding, scoped))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_prompts_and_answers_longer_than_a_block_of_queries(architecture: str) -> None:
    long = QUERY_BLOCK + 5
    groups = [
        *random_groups(1, prompt=(long, long + 1), answer=(3, 9)),
        *random_groups(1, prompt=(4, 9), answer=(long, long + 1), kinds=("partial",)),
    ]
    options = {"sliding_window": 100} if architecture != "llama" else {}
    model = build(architecture, num_layers=2, hidden_size=16, max_position_embeddings=1024, **options)
    assert_same(model, gradients(model, by_sharing, collate(groups)), gradients(model, by_padding, collate(groups)))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3", "gpt2", "phi"])
def test_the_way_for_devices_other_than_a_cpu(architecture: str, batch: PreferenceBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled-dot-product attention, and the functions over the logits that are compiled there: what runs on a GPU, run here."""
    monkeypatch.setattr(attention, "BLOCK_DEVICES", ())
    monkeypatch.setattr(attention._BlockAttention, "apply", lambda *_: pytest.fail("blocks"))
    monkeypatch.setattr(logits, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(logits, "_compiled", lambda function, rule: functools.partial(function, rule=rule))
    monkeypatch.setattr(logits, "_written_log_softmax", lambda *_: pytest.fail("the written form"))
    model = build(architecture).train()
    assert_same(model, gradients(model, by_sharing, batch), gradients(model, by_padding, batch))
    checkpoint_activations(model)
    assert_same(model, gradients(model, by_sharing, batch), gradients(model, by_padding, batch))


@pytest.mark.parametrize("window", [1, 2, 13, 10_000])
def test_windows_of_any_width(window: int, batch: PreferenceBatch) -> None:
    model = build("mistral", sliding_window=window)
    assert_same(model, gradients(model, by_sharing, batch), gradients(model, by_padding, batch))


def test_prompts_of_one_token() -> None:
    model, batch = build("llama"), collate(random_groups(4, prompt=(1, 2), answer=(1, 3), kinds=("pair", "four")))
    assert_same(model, gradients(model, by_sharing, batch), gradients(model, by_padding, batch))


def test_a_group_of_four_answers_equals_its_six_pairs() -> None:
    """Groups equal their pairs, through the model, loss and gradient."""
    groups = random_groups(2, kinds=("four", "partial"))
    model = build("llama")
    together = gradients(model, by_sharing, collate(groups))
    apart = gradients(model, by_padding, collate([pair for item in groups for pair in as_pairs(item)]))
    assert together[0].loss.item() == pytest.approx(apart[0].loss.item(), rel=1e-5)
    for name, gradient in together[1].items():
        assert (gradient - apart[1][name]).norm() <= 1e-4 * apart[1][name].norm()


def test_a_soft_cap_is_kept_where_scaled_dot_product_attention_was_chosen(batch: PreferenceBatch) -> None:
    """transformers 5.17 chooses it for Gemma 2 and drops the cap; 5.2x refuses in the middle of a forward pass."""
    model = build("gemma2")
    model.config._attn_implementation = "eager"
    expected = padded.token_logps(model, batch).detach()
    model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(padded.token_logps(model, batch).detach(), expected, rtol=0, atol=0)
    assert model.config._attn_implementation == "eager"
    llama = build("llama")
    padded.token_logps(llama, batch)
    assert llama.config._attn_implementation == "sdpa"


# --- gradient checkpointing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_changes_neither_engine(architecture: str, use_reentrant: bool, batch: PreferenceBatch) -> None:
    """The layout reaches the recomputed layers: it travels with the call, not in a global."""
    model = build(architecture).train()
    expected = gradients(model, by_padding, batch)
    checkpoint_activations(model, use_reentrant=use_reentrant)
    assert_same(model, gradients(model, by_padding, batch), expected)
    assert_same(model, gradients(model, by_sharing, batch), expected)


def test_two_batches_between_forward_and_backward(batch: PreferenceBatch) -> None:
    """Two micro-batches forward, then both backward: each recomputation sees its own layout."""
    model = build("llama").train()
    other = collate(random_groups(3, seed=5, prompt=(3, 9)))
    expected = dict(gradients(model, by_padding, batch)[1])
    for name, value in gradients(model, by_padding, other)[1].items():
        expected[name] = expected[name] + value
    checkpoint_activations(model)
    with attention_implementation(model, attention.NAME):
        first, second = (shared.step(model, item, OBJECTIVE) for item in (batch, other))
        first.loss.backward()
        second.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm()


# --- adapters ----------------------------------------------------------------------------------------------------------------------------


def with_lora(architecture: str = "llama", **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(architecture), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():  # B starts at zero: the adapter would do nothing, and A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model.train()


LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head_saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rslora_dora": {"target_modules": ["q_proj"], "use_rslora": True, "use_dora": True},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
@pytest.mark.parametrize("rows", [5, 10_000])
def test_adapters(options: dict[str, Any], rows: int, batch: PreferenceBatch) -> None:
    model = with_lora(**options)

    def step(model: nn.Module, batch: PreferenceBatch) -> StepResult:
        return by_sharing(model, batch, budget_bytes=rows * 128 * 4)

    found, expected = gradients(model, step, batch), gradients(model, by_padding, batch)
    assert_same(model, found, expected)
    assert found[1]
    assert not any("base_layer" in name or "original_module" in name for name in found[1])


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=" ".join)
def test_trained_copies_of_tied_embeddings(saved: list[str], batch: PreferenceBatch) -> None:
    """PEFT copies the module that is named; whether input and output are still one weight then is its choice, and both engines' alike."""
    model = with_lora("llama_tied", target_modules=["q_proj"], modules_to_save=saved)
    found, expected = gradients(model, by_sharing, batch), gradients(model, by_padding, batch)
    assert_same(model, found, expected)
    assert any("modules_to_save" in name for name in found[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_with_gradient_checkpointing(use_reentrant: bool, batch: PreferenceBatch) -> None:
    model = with_lora(target_modules="all-linear")
    expected = gradients(model, by_padding, batch)
    checkpoint_activations(model, use_reentrant=use_reentrant)
    assert_same(model, gradients(model, by_sharing, batch), expected)


def test_a_switched_off_adapter_is_the_base_model(batch: PreferenceBatch) -> None:
    """How a DPO reference is computed."""
    model, base = with_lora(target_modules="all-linear"), build("llama")
    with torch.no_grad(), model.disable_adapter():
        found = by_sharing(model, batch).logp_N
    assert (found - by_padding(base, batch).logp_N).abs().max() <= 1e-5


# --- bf16 --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi", "gpt_neox", "granite"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_as_near_to_float32_as_padded_bf16(architecture: str, how: str, batch: PreferenceBatch) -> None:
    model = build(architecture).train()
    exact, exact_grads = gradients(model, by_padding, batch)
    if how == "weights":
        model = model.bfloat16()

    def errors(step: Step) -> tuple[float, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            result, grads = gradients(model, step, batch)
        assert result.logp_N.dtype == result.loss.dtype == torch.float32
        assert all(grads[name].dtype == parameter.dtype for name, parameter in model.named_parameters())
        squares = sum((grads[name].float() - value).square().sum() for name, value in exact_grads.items())
        total = sum(value.square().sum() for value in exact_grads.values())
        return (result.logp_N - exact.logp_N).abs().mean().item(), (squares / total).sqrt().item()

    (shared_logp, shared_grad), (padded_logp, padded_grad) = errors(by_sharing), errors(by_padding)
    assert shared_logp <= 1.25 * padded_logp + 0.002
    assert shared_grad <= 1.25 * padded_grad + 0.005
    assert padded_logp <= 0.03
    assert padded_grad <= 0.15


# --- a row's values depend on the row alone -----------------------------------------------------------------------------------


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 40), architecture=st.sampled_from(["llama", "mistral", "gpt2", "gemma3"]))
def test_padding_side_and_amount_and_row_order_change_no_value(seed: int, extra: int, architecture: str) -> None:
    model = build(architecture)
    groups = random_groups(4, seed=seed, kinds=("pair", "sft", "four"), prompt=(1, 20), answer=(1, 10))
    # One more row decides how far the others are padded.
    company = random_groups(1, seed=seed + 1, prompt=(1 + extra, 2 + extra), answer=(8, 9))
    order = np.random.default_rng(seed).permutation(len(groups))
    alone = {id(item): by_padding(model, collate([item])).logp_N for item in groups}
    mixed = collate([groups[index] for index in order] + company)
    runs = [padded.token_logps(model, mixed, side).detach() for side in ("left", "right")] + [by_sharing(model, mixed).logp_N]
    for logp_N in runs:
        for item, span in zip(mixed.groups[: len(groups)], mixed.spans, strict=False):
            assert (logp_N[slice(*span.n)] - alone[id(item)]).abs().max() <= 1e-5


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_a_prediction_across_padding_never_happens(pad_side: str) -> None:
    """Gradients too: nothing flows from padding, whose id is a real token's (0)."""
    model = build("llama")
    groups = [*random_groups(1, prompt=(30, 31)), *random_groups(1, prompt=(1, 2))]
    logp_N = padded.token_logps(model, collate(groups), pad_side)
    short = collate(groups[1:])
    (gradient,) = torch.autograd.grad(logp_N[-len(short.target_N) :].sum(), model.get_input_embeddings().weight)
    used = {int(token) for token in short.input_ids_T}
    assert not gradient[[token for token in range(128) if token not in used]].any()


def test_models_without_dropout_are_the_same_in_training_mode(batch: PreferenceBatch) -> None:
    model = build("llama")
    torch.testing.assert_close(by_sharing(model.train(), batch).logp_N, by_sharing(model.eval(), batch).logp_N, rtol=0, atol=0)


# --- on a GPU ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "phi"])
def test_the_engines_agree_on_a_gpu(architecture: str, batch: PreferenceBatch) -> None:
    """With TF32 off: float32 products are exact to 1e-5 only then."""
    model = build(architecture).cuda().train()
    on_gpu = batch.to("cuda")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert_same(model, gradients(model, by_sharing, on_gpu), gradients(model, by_padding, on_gpu))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_gpu_computes_what_the_cpu_does(use_reentrant: bool, batch: PreferenceBatch) -> None:
    model = build("llama").train()
    expected = gradients(model, by_sharing, batch)
    model = model.cuda()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    found, found_grads = gradients(model, by_sharing, batch.to("cuda"))
    assert (found.logp_N.cpu() - expected[0].logp_N).abs().max() <= 1e-4
    for name, gradient in expected[1].items():
        assert (found_grads[name].cpu() - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name
