"""Generation against a decoder written out, and its independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orpo.data.template import TemplateEncoder
from orpo.errors import UserError
from orpo.inference.generate import Answer, generate

PROMPTS = [
    "What is the weather like today?",
    "Hi",
    "Please tell me how to reset the password. Open the settings, choose the account, then press reset.",
    "A short story about the sea",
    "The answer",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_factory):
    return tiny_tokenizer_factory()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TemplateEncoder(tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model_factory):
    return tiny_model_factory(vocab_size=384)


def decode_plainly(model: torch.nn.Module, encoder: TemplateEncoder, prompt: str, limit: int) -> list[int]:
    """Greedy, one prompt, no cache, no padding: the oracle."""
    ids = encoder.prompt_ids(prompt).tolist()
    found: list[int] = []
    while len(found) < limit:
        with torch.no_grad():
            found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
        if found[-1] in encoder.terminator_ids:
            break
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mistral"])
def test_greedy_equals_a_plain_decoder(tiny_model_factory, tokenizer, encoder, architecture):
    model = tiny_model_factory(architecture, vocab_size=384)
    answers = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=12, batch_size=3)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = decode_plainly(model, encoder, prompt, 12)
        is_stopped = expected[-1] in encoder.terminator_ids
        assert answer.finish == ("stop" if is_stopped else "length")
        assert answer.num_tokens == len(expected)
        assert answer.text == tokenizer.decode(expected[:-1] if is_stopped else expected, skip_special_tokens=True)


def make_stopping(model: torch.nn.Module, encoder: TemplateEncoder, lift: float) -> torch.nn.Module:
    """Make the terminator likely enough that some answers end early."""
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
        model.lm_head.bias[encoder.terminator_ids[0]] = lift
    return model


def test_answers_end_at_the_terminator_of_training(tiny_model_factory, tokenizer, encoder):
    model = make_stopping(tiny_model_factory(vocab_size=384), encoder, 2.0)
    answers = generate(model, tokenizer, encoder, PROMPTS * 4, max_new_tokens=40, temperature=1.0)
    assert {answer.finish for answer in answers} == {"stop", "length"}, [answer.num_tokens for answer in answers]
    assert all("<|im_end|>" not in answer.text for answer in answers)
    assert all(answer.num_tokens == 40 for answer in answers if answer.finish == "length")
    alone = generate(make_stopping(tiny_model_factory(vocab_size=384), encoder, 1e4), tokenizer, encoder, ["Hi"], max_new_tokens=5)
    assert alone == [Answer("", 1, "stop")]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_does_not_depend_on_its_neighbours(model, tokenizer, encoder, temperature):
    options = {"max_new_tokens": 10, "temperature": temperature, "top_p": 0.95, "seed": 3}
    together = generate(model, tokenizer, encoder, PROMPTS, batch_size=5, **options)
    apart = [generate(model, tokenizer, encoder, [prompt], **options)[0] for prompt in reversed(PROMPTS)][::-1]
    pairs = generate(model, tokenizer, encoder, PROMPTS, batch_size=2, **options)
    assert together == apart == pairs


def test_samples_follow_the_seed_and_repeated_prompts_differ(model, tokenizer, encoder):
    options = {"max_new_tokens": 10, "temperature": 1.0}
    first = generate(model, tokenizer, encoder, ["Hi"] * 3, seed=1, **options)
    assert first == generate(model, tokenizer, encoder, ["Hi"] * 3, seed=1, **options)
    assert first != generate(model, tokenizer, encoder, ["Hi"] * 3, seed=2, **options)
    assert len({answer.text for answer in first}) == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.6)])
def test_first_tokens_are_drawn_from_the_models_distribution(model, tokenizer, encoder, temperature, top_p):
    """Frequencies of 3000 draws against the probabilities, computed apart."""
    from orpo.inference.noise import RowNoise

    with torch.no_grad():
        logits = 0.3 * model(torch.tensor([encoder.prompt_ids("Hi").tolist()])).logits[0, -1]
    p = (logits.double() / temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    expected = np.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    count = 3000
    noise = RowNoise(list(range(count)), temperature, top_p)
    drawn = np.bincount(noise(torch.zeros(count, 1), logits.repeat(count, 1)).argmax(-1).numpy(), minlength=len(p)) / count
    assert drawn[expected == 0].sum() == 0
    assert np.abs(drawn - expected).sum() / 2 < 0.5 * np.sqrt(len(kept) / count)


def test_a_models_own_generation_settings_do_not_mix_in(tiny_model_factory, tokenizer, encoder):
    model = tiny_model_factory(vocab_size=384)
    expected = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=12)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, max_length=30, eos_token_id=list(range(100)))
    assert generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=12) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_the_context_of_the_model_is_its_limit(tiny_model_factory, tokenizer, encoder):
    model = tiny_model_factory("gpt2", vocab_size=384, max_position_embeddings=40)
    limit = 40 - len(encoder.prompt_ids("Hi"))
    answers = generate(model, tokenizer, encoder, ["Hi", PROMPTS[2] * 3, "A"], max_new_tokens=200)
    assert answers[1] == Answer("", 0, "prompt_too_long")
    assert answers[0].num_tokens in range(1, limit + 1)
    assert answers[0] == generate(model, tokenizer, encoder, ["Hi"], max_new_tokens=200)[0]


def test_bf16_leaves_the_weights_alone(model, tokenizer, encoder):
    before = model.lm_head.weight.detach().clone()
    seen = []
    answers = generate(
        model,
        tokenizer,
        encoder,
        PROMPTS,
        max_new_tokens=4,
        batch_size=2,
        compute_dtype=torch.bfloat16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(answers) == len(PROMPTS)
    assert seen[-1] == (5, 5)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("option", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"batch_size": 0}])
def test_options_out_of_range_are_named(model, tokenizer, encoder, option):
    with pytest.raises(UserError, match=next(iter(option))):
        generate(model, tokenizer, encoder, PROMPTS, **{"max_new_tokens": 3, **option})


def test_nothing_to_answer(model, tokenizer, encoder):
    assert generate(model, tokenizer, encoder, [], max_new_tokens=3) == []


# ---- how it is decoded -------------------------------------------------------------------------------------------------------------


def make_ending_at(model: torch.nn.Module, encoder: TemplateEncoder, lift: float = 0.0) -> list[int]:
    """Widths of the batches that the model's forward sees from now on."""
    seen: list[int] = []
    make_stopping(model, encoder, lift)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    return seen


@pytest.mark.parametrize(("architecture", "temperature"), [("llama", 0.0), ("llama", 1.0), ("gemma2", 1.0)])
def test_rows_that_have_ended_leave_and_change_nothing(tiny_model_factory, tokenizer, encoder, architecture, temperature):
    """Answers of many lengths in one batch, past the first room and past a sliding window, equal those one by one."""
    model = tiny_model_factory(architecture, vocab_size=384)
    widths = make_ending_at(model, encoder, 3.0 if temperature else 1.5)
    prompts = [f"{prompt} {number}" for number in range(2) for prompt in PROMPTS]
    arguments = {"max_new_tokens": 80, "temperature": temperature, "seed": 5}
    together = generate(model, tokenizer, encoder, prompts, batch_size=10, **arguments)
    assert widths[0] == 10
    assert widths == sorted(widths, reverse=True)
    lengths = sorted(answer.num_tokens for answer in together)
    assert lengths[0] < lengths[-1]
    assert sum(widths) == sum(lengths)  # of ten rows, each leaves at once
    assert together == [generate(model, tokenizer, encoder, [prompt], **arguments)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("architecture", "temperature"), [("llama", 1.0), ("gemma2", 1.0), ("gpt2", 0.8), ("mamba", 1.0), ("mistral", 0.0)]
)
def test_a_prompt_is_read_once_for_all_its_answers(tiny_model_factory, tokenizer, encoder, architecture, temperature):
    """Prompts that come several times, of several lengths in one batch, are answered as each one alone, and read once."""
    model = make_stopping(tiny_model_factory(architecture, vocab_size=384), encoder, 2.0)
    read = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    arguments = {"max_new_tokens": 30, "temperature": temperature, "top_p": 0.9, "seed": 5}
    prompts = [PROMPTS[2], *PROMPTS[:3] * 3, PROMPTS[0]]
    together = generate(model, tokenizer, encoder, prompts, batch_size=20, **arguments)
    longest = max(len(encoder.prompt_ids(prompt)) for prompt in prompts)
    assert read[0] == (len(prompts) * longest if architecture == "mamba" else 3 * (longest - 1))
    assert sum(read) < (len(prompts) if architecture == "mamba" else 3) * longest + len(prompts) * 30
    seen: dict[str, int] = {}
    for prompt, answer in zip(prompts, together, strict=True):
        alone = generate(model, tokenizer, encoder, [prompt], occurrences=[seen.get(prompt, 0)], **arguments)
        assert [answer] == alone
        seen[prompt] = seen.get(prompt, 0) + 1


def test_models_with_another_memory_are_decoded_plainly(tiny_model_factory, tokenizer, encoder):
    from orpo.inference.decode import roomy_cache

    model = tiny_model_factory("mamba", vocab_size=384)
    assert roomy_cache(model) is None
    answers = generate(model, tokenizer, encoder, ["Hi"], max_new_tokens=8)
    expected = decode_plainly(model, encoder, "Hi", 8)
    assert answers[0].num_tokens == len(expected)


def test_keys_and_values_are_those_of_transformers_cache():
    """Appending, selecting rows and cutting back, against `DynamicLayer`; and tokens that are there stay where they are."""
    from transformers.cache_utils import DynamicLayer

    from orpo.inference.decode import RoomyLayer

    generator = torch.Generator().manual_seed(0)
    ours, theirs = RoomyLayer(), DynamicLayer()
    num_rows, num_moves, place = 5, 0, None
    for step in range(400):
        states = torch.randn(num_rows, 2, 7 if step == 0 else 1, 4, generator=generator)
        for one, other in zip(ours.update(states, -states), theirs.update(states, -states), strict=True):
            assert torch.equal(one, other)
        num_moves += place not in (None, ours.keys.data_ptr())
        place = ours.keys.data_ptr()
        if step in (50, 200):
            kept = torch.tensor([0, 2, 3, 4] if step == 50 else [1, 3])
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)
            num_rows = len(kept)
        if step == 120:
            ours.crop(-3)
            theirs.crop(-3)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert num_moves <= 5


@pytest.mark.parametrize(("count", "size", "sizes"), [(100, 64, [50, 50]), (100, 48, [34, 33, 33]), (5, 64, [5]), (7, 1, [1] * 7)])
def test_batches_are_even(count, size, sizes):
    from orpo.inference.generate import _batches

    found = list(_batches(list(range(count)), [10] * count, size, 10**6, 20, None))
    assert [len(rows) for rows in found] == sizes
    assert [row for rows in found for row in rows] == list(range(count))


def test_batches_keep_within_memory_and_context():
    from orpo.inference.generate import _batches, _token_bytes

    lengths = [90, 50, 40, 30, 20, 10]
    found = list(_batches(list(range(6)), lengths, 6, 240, 30, 110))
    assert found[0] == [0]  # its answer could run into the end of the context
    assert all(len(rows) * (lengths[rows[0]] + 30) <= 240 for rows in found)
    assert sum(map(len, found)) == 6
    model = torch.nn.Module()
    model.config = type("Config", (), {"get_text_config": lambda self: type("Text", (), {})()})()
    assert _token_bytes(model, torch.bfloat16) == 128 * 2**10


def test_memory_of_a_token_is_that_of_its_keys_and_values(tiny_model_factory):
    from orpo.inference.decode import roomy_cache
    from orpo.inference.generate import _token_bytes

    for architecture in ("llama", "gpt2", "qwen2"):
        model, cache = tiny_model_factory(architecture), None
        cache = roomy_cache(model)
        with torch.no_grad():
            model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 3
        assert _token_bytes(model, None) == stored
