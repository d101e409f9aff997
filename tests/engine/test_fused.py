"""Lean forms of norms and gated MLPs: equal to the modules' own, put in only where proven, and taken out again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo.engine import fused, padded
from orpo.engine.fused import fused_modules
from orpo.engine.layout import collate
from orpo.objective import ORPO
from randomgroups import random_groups
from tinymodels import build_tiny_model

REPLACED = {
    "llama": 3 * 2 + 1 + 3,
    "mistral": 10,
    "qwen2": 10,
    "qwen3": 3 * 4 + 1 + 3,
    "olmo2": 3 * 4 + 1 + 3,
    "smollm3": 10,
    "granite": 10,
}
"""Norms (two to four a layer, one at the end) and MLPs of three layers."""
KEPT = {"gemma2": 0, "gemma3": 0, "gpt2": 0, "gpt_neox": 0, "phi": 0}
"""Gemma's norm multiplies by 1 + weight and its MLP has another activation; the others have neither module."""


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    result = padded.step(model, collate(random_groups(3)), ORPO(1.0))
    result.loss.backward()
    return result.logp_N, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("architecture", [*REPLACED, *KEPT])
def test_a_model_computes_the_same_with_them(architecture: str) -> None:
    model = build_tiny_model(architecture).train()
    expected_logp_N, expected = gradients(model)
    with fused_modules(model) as number:
        assert number == {**REPLACED, **KEPT}[architecture]
        logp_N, found = gradients(model)
    torch.testing.assert_close(logp_N, expected_logp_N, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


def test_afterwards_the_model_is_as_before() -> None:
    model = build_tiny_model("llama")
    with pytest.raises(KeyError), fused_modules(model):
        raise KeyError
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_copy_made_inside_computes_with_its_own_weights() -> None:
    model = build_tiny_model("llama")
    with fused_modules(model):
        twin = copy.deepcopy(model)
        before = twin(torch.arange(5)[None]).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.testing.assert_close(twin(torch.arange(5)[None]).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_no_worse_than_written_out(how: str) -> None:
    model = build_tiny_model("llama").train()
    exact, exact_grads = gradients(model)
    if how == "weights":
        model = model.bfloat16()

    def errors() -> tuple[float, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            logp_N, found = gradients(model)
        squares = sum((found[name].float() - value).square().sum() for name, value in exact_grads.items())
        return (logp_N - exact).abs().mean().item(), float(squares) ** 0.5

    plain = errors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_is_equal", lambda *_: True)  # bf16 modules are not compared; the trainer's are float32 when they are
        with fused_modules(model) as number:
            assert number == REPLACED["llama"]
            lean = errors()
    assert lean[0] <= 1.3 * plain[0] + 0.002
    assert lean[1] <= 1.3 * plain[1] + 0.005


class OddRMSNorm(nn.Module):
    """Looks like the usual norm and is not."""

    def __init__(self, trait: str) -> None:
        super().__init__()
        self.weight, self.eps, self.trait = nn.Parameter(torch.rand(8) + 0.5), 1e-6, trait
        self.bias = nn.Parameter(torch.zeros(8)) if trait == "bias" else None

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.trait == "one_plus":
            return normed * (1 + self.weight)
        if self.trait == "centred":
            return nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)
        if self.trait == "detached":
            return normed.detach() * self.weight
        return normed * self.weight + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize(("trait", "number"), [("plain", 1), ("one_plus", 0), ("centred", 0), ("detached", 0), ("bias", 0)])
def test_only_what_is_proven_equal_is_replaced(trait: str, number: int) -> None:
    """Values and gradients: a bias that is still zero, or a gradient that is cut, shows in no value."""
    with fused_modules(nn.Sequential(OddRMSNorm(trait))) as found:
        assert found == number


def test_a_fresh_norm_is_proven_too() -> None:
    """All its weights are 1, so that the sum of its squared outputs is constant: along that, there would be no gradient to compare."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with fused_modules(nn.Sequential(LlamaRMSNorm(64))) as found:
        assert found == 1


@pytest.mark.parametrize("how", ["plain", "hook", "frozen gate"])
def test_a_bare_mlp_is_one_function(how: str) -> None:
    """Unless somebody listens to one of its layers; frozen weights get no gradient."""
    model = build_tiny_model("llama").train()
    mlp = model.model.layers[0].mlp
    heard: list[Any] = []
    if how == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    mlp.gate_proj.weight.requires_grad_(how != "frozen gate")
    _, expected = gradients(model)
    heard.clear()
    with fused_modules(model):
        node = mlp(torch.ones(1, 3, mlp.gate_proj.in_features)).grad_fn
        assert type(node).__name__.startswith("_GatedMLP") == (how != "hook")
        _, found = gradients(model)
    assert bool(heard) == (how == "hook")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_every_kind_of_module_is_proven_on_its_own() -> None:
    """An odd norm beside a plain one is judged for itself, also where a setting alone tells them apart."""
    for order in (("one_plus", "plain"), ("plain", "one_plus")):
        with fused_modules(nn.Sequential(*map(OddRMSNorm, order))) as found:
            assert found == 1


def adapted(architecture: str = "llama", **options: Any) -> Any:
    """A tiny model with an adapter that does something: a new one's B is 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # PEFT draws A from the process's own numbers
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model: Any = get_peft_model(build_tiny_model(architecture), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "rank-stabilised": ({"use_rslora": True}, True),
    "of several ranks": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}, True),
    "dropout": ({"lora_dropout": 0.1}, False),
    "DoRA": ({"use_dora": True}, False),
    "bias": ({"lora_bias": True}, False),
    "trained bias": ({"bias": "all"}, True),
}


@pytest.mark.parametrize(("options", "is_lean"), ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_adapted_layer_is_one_function_where_peft_adds_one_product(architecture: str, options: dict[str, Any], is_lean: bool) -> None:
    """Qwen 2 has biases; where they are trained, the layers that have one stay as they are."""
    model = adapted(architecture, **options)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    torch.manual_seed(0)
    expected_logp_N, expected = gradients(model)
    with fused_modules(model):
        node = layer(torch.ones(1, 3, 32)).grad_fn
        torch.manual_seed(0)
        logp_N, found = gradients(model)
    is_trained_bias = options.get("bias") == "all" and architecture == "qwen2"
    assert type(node).__name__.startswith("_AdaptedLinear") == (is_lean and not is_trained_bias)
    torch.testing.assert_close(logp_N, expected_logp_N, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_an_adapter_that_is_switched_off_or_merged_or_listened_to_is_left_to_peft() -> None:
    model, ids = adapted(), torch.arange(5)[None]
    layer = model.base_model.model.model.layers[0].mlp.up_proj

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    with model.disable_adapter():
        base = logits()
    plain = logits()
    assert (plain - base).abs().max() > 0.1
    with fused_modules(model):
        torch.testing.assert_close(logits(), plain, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(logits(), base, rtol=1e-5, atol=1e-5)
        heard: list[Any] = []
        layer.lora_A["default"].register_forward_hook(lambda *_: heard.append(1))
        logits()
        assert heard == [1]
        model.merge_adapter()
        torch.testing.assert_close(logits(), plain, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()


def test_dropout_and_a_base_that_is_trained_are_seen_when_they_come() -> None:
    """The forms are proved on the model as it is at the start; its state may change behind that."""
    model = adapted(lora_dropout=0.5).eval()
    layer, x = model.base_model.model.model.layers[0].mlp.up_proj, torch.ones(1, 2, 32)
    with fused_modules(model):
        assert type(layer(x).grad_fn).__name__.startswith("_AdaptedLinear")
        model.train()
        assert not torch.equal(layer(x), layer(x)), "dropout"
        model.eval()
        layer.base_layer.weight.requires_grad_()
        layer(x).sum().backward()
        assert layer.base_layer.weight.grad is not None


def test_a_form_that_cuts_an_adapters_gradient_is_noticed_while_its_b_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with fused_modules(model) as number:
        pass
    right = fused._AdaptedLinear.backward

    def wrong(ctx: Any, *grads: Tensor) -> Any:
        found = list(right(ctx, *grads))
        found[3] = torch.zeros_like(found[3])
        return tuple(found)

    monkeypatch.setattr(fused._AdaptedLinear, "backward", staticmethod(wrong))
    with fused_modules(model) as left:
        assert left == number - 3 * 7


def test_an_adapted_layer_in_bf16_is_no_worse_than_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    exact, exact_grads = gradients(model)
    model = model.bfloat16()
    monkeypatch.setattr(fused, "_is_equal", lambda *_: True)

    def errors() -> tuple[float, float]:
        logp_N, found = gradients(model)
        squares = sum((found[name].float() - value).square().sum() for name, value in exact_grads.items())
        return (logp_N - exact).abs().mean().item(), float(squares) ** 0.5

    plain = errors()
    with fused_modules(model):
        lean = errors()
    assert lean[0] <= 1.5 * plain[0] + 0.005
    norm = float(sum(value.square().sum() for value in exact_grads.values())) ** 0.5
    assert lean[1] <= 1.5 * plain[1] + 0.02 * norm


@pytest.mark.parametrize("frozen", [False, True])
def test_adapters_on_the_mlp_are_called(frozen: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        build_tiny_model("llama"), LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    if frozen:
        model.requires_grad_(False)
        with torch.no_grad():
            expected = padded.token_logps(model, collate(random_groups(2)))
            with fused_modules(model) as number:
                found = padded.token_logps(model, collate(random_groups(2)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        expected_logp_N, expected_grads = gradients(model)
        with fused_modules(model) as number:
            logp_N, grads = gradients(model)
        torch.testing.assert_close(logp_N, expected_logp_N, rtol=1e-5, atol=1e-5)
        for name, gradient in expected_grads.items():
            assert (grads[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert number
