"""What makes decoding fast changes no token: shared prompts, rearranged weights, few random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orpo.data.template import TemplateEncoder
from orpo.inference import prefix
from orpo.inference.generate import generate
from orpo.inference.noise import RowNoise
from orpo.inference.packed import MIN_NEW_TOKENS, packed_linears
from orpo.system.machine import bf16_is_fast

PROMPTS = ["What is the weather like today?", "Hi", "Please tell me how to reset the password. Open the settings.", "A story"]
REPEATED = [PROMPTS[2], *PROMPTS * 3, PROMPTS[0]]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_factory):
    return tiny_tokenizer_factory()


def model_of(factory: Any, architecture: str, encoder: TemplateEncoder) -> Any:
    """One whose answers end at different times."""
    model = factory(architecture, vocab_size=384)
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
        model.lm_head.bias[encoder.terminator_ids[0]] = 2.0
    return model


class Watched:
    """How often rows were asked of keys that they share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = prefix._attend_shared

        def counted(*arguments: Any) -> Any:
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(prefix, "_attend_shared", counted)


@pytest.mark.parametrize(
    ("architecture", "is_shared"), [("llama", True), ("gpt2", True), ("phi3", True), ("gemma3", True), ("gemma2", False), ("mamba", False)]
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_shared_prompts_give_the_answers_of_copied_ones(
    tiny_model_factory, tokenizer, monkeypatch, architecture, is_shared, temperature
) -> None:
    """Several prompts of several lengths, several times each, rows that leave one by one, layers with and without a window."""
    encoder = TemplateEncoder(tokenizer)
    model = model_of(tiny_model_factory, architecture, encoder)
    watched = Watched(monkeypatch)
    options = {"max_new_tokens": 16, "temperature": temperature, "seed": 4}
    before = model.config._attn_implementation
    together = generate(model, tokenizer, encoder, REPEATED, **options)
    assert (watched.count > 0) == is_shared
    assert model.config._attn_implementation == before
    monkeypatch.setattr(prefix, "DEVICES", ())
    watched.count = 0
    assert generate(model, tokenizer, encoder, REPEATED, **options) == together
    assert watched.count == 0


class Cloning:
    """A cache as a model may wrap it: what it gives are other tensors."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, *arguments: Any, **keywords: Any) -> Any:
        return tuple(states.clone() for states in self.cache.update(*arguments, **keywords))


def test_a_model_that_does_not_see_what_is_shared_is_decoded_without(tiny_model_factory, tokenizer, monkeypatch) -> None:
    encoder = TemplateEncoder(tokenizer)
    model = model_of(tiny_model_factory, "llama", encoder)
    options = {"max_new_tokens": 12, "temperature": 0.9}
    expected = generate(model, tokenizer, encoder, REPEATED, **options)
    watched = Watched(monkeypatch)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "past_key_values": Cloning(kwargs["past_key_values"])}), with_kwargs=True
        )
    assert generate(model, tokenizer, encoder, REPEATED, **options) == expected
    assert watched.count == 0


def test_keys_that_nobody_reads_are_noticed() -> None:
    """Also where a model gives no mask, whose length would tell."""
    shared = prefix.Shared(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), prefix.Sharing([0, 0]))
    shared.offer(torch.zeros(2, 1, 1, 2))
    with pytest.raises(prefix.NotSharedError):
        shared.offer(torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("mask", "keywords"),
    [(torch.ones(1, 1, 1, 1, dtype=torch.bool), {}), (None, {"softcap": 30.0}), (None, {"s_aux": torch.zeros(1)}), (None, {})],
    ids=["a mask of own keys alone", "a cap", "sinks", "several queries"],
)
def test_attention_that_is_not_computed_here_is_noticed(mask: torch.Tensor | None, keywords: dict[str, Any]) -> None:
    """A mask of one number would be spread over all keys without a word."""
    shared = prefix.Shared(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), prefix.Sharing([0, 0]))
    own = torch.zeros(2, 1, 1, 2)
    shared.offer(own)
    query = torch.zeros(2, 1, 1 if keywords or mask is not None else 2, 2)
    with pytest.raises(prefix.NotSharedError):
        prefix.attend(torch.nn.Identity(), query, own, own.clone(), mask, **keywords)


def test_rows_and_prompts_find_each_other() -> None:
    sharing = prefix.Sharing([2, 0, 0, 1, 2, 0])
    rows = torch.arange(6.0)[:, None]
    assert torch.equal(sharing.by_row(sharing.by_prompt(rows)), rows)
    assert sharing.by_prompt(rows)[..., 0].tolist() == [[1, 2, 5], [3, 0, 0], [0, 4, 0]]
    sharing.select([1, 4])
    assert sharing.kept_prompts is not None
    assert sharing.kept_prompts.tolist() == [0, 2]
    assert torch.equal(sharing.by_row(sharing.by_prompt(rows[:2])), rows[:2])


@pytest.mark.skipif(not bf16_is_fast("cpu"), reason="bfloat16 products are emulated here")
def test_rearranged_weights_give_the_same_products() -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(48, 64), torch.nn.Linear(48, 40, bias=False)]).to(torch.bfloat16)
    plain = torch.nn.Linear(48, 8)
    model = torch.nn.ModuleList([*layers, plain])
    inputs = [torch.randn(*shape, 48, dtype=torch.bfloat16) for shape in ((1, 1), (5, 7), (64, 1), (3,))]
    inputs.append(torch.randn(4, 9, 48, dtype=torch.bfloat16)[:, -1:])
    with torch.no_grad():
        expected = [[F.linear(x, layer.weight, layer.bias) for x in inputs] for layer in layers]
        with packed_linears(model, MIN_NEW_TOKENS) as count:
            assert count == 2
            assert "forward" not in plain.__dict__
            found = [[layer(x) for x in inputs] for layer in layers]
        with packed_linears(model, MIN_NEW_TOKENS - 1) as count:
            assert count == 0, "a few tokens do not pay for it"
    assert not any("forward" in layer.__dict__ for layer in layers)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("size", [3, 256, 700])
def test_draws_follow_the_probabilities(size: int) -> None:
    """Whatever the number of blocks, a last one that is shorter included; what has no probability is never drawn."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(size, 0.05))
    p[-1] += 0.2
    p[0] = 0.0
    p /= p.sum()
    count = 4000
    scores = torch.from_numpy(np.log(p, where=p > 0, out=np.full(size, -np.inf))).float().repeat(count, 1)
    chosen = RowNoise(list(range(count)), 1.0, 1.0)(torch.zeros(count, 1), scores)
    assert torch.equal(chosen.sum(-1), torch.ones(count))
    drawn = np.bincount(chosen.argmax(-1).numpy(), minlength=size) / count
    assert drawn[0] == 0
    assert np.abs(drawn - p).sum() / 2 < 0.5 * np.sqrt((p > 1e-4).sum() / count) + 0.01
