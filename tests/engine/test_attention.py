"""Packed attention against attention written out in float64 with an explicit mask, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orpo.engine import attention
from orpo.engine.attention import QUERY_BLOCK, SEGMENT_BLOCK, shared_attention_forward, visibility
from orpo.engine.layout import PackedLayout, collate
from packedrows import SMALL, full_mask, inputs, written_out
from randomgroups import random_groups

CPU = torch.device("cpu")


def assert_equals_written_out(
    layout: PackedLayout, tensors: list[Tensor], *, scale: float | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """Output and the gradients of query, key, value (and sinks) for a random direction."""
    sinks = options.get("s_aux")
    window, softcap = options.get("sliding_window"), options.get("softcap")
    leaves64 = [tensor.detach().clone().requires_grad_() for tensor in [*tensors, *([] if sinks is None else [sinks])]]
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves64]
    expected = written_out(
        *leaves64[:3], full_mask(layout, window), scale or tensors[0].shape[-1] ** -0.5, softcap, leaves64[3] if sinks is not None else None
    )
    if sinks is not None:
        options["s_aux"] = leaves[3]
    found, weights = shared_attention_forward(nn.Module(), *leaves[:3], None, scaling=scale, shared_layout=layout, **options)
    assert weights is None
    assert found.dtype == dtype
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected.backward(direction)
    found.backward(direction.to(dtype))
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        assert leaf.grad is not None
        assert leaf64.grad is not None
        # A window of 1 leaves nothing to choose from: queries and keys then have no gradient at all, hence the 1.
        assert (leaf.grad.double() - leaf64.grad).norm() <= tolerance * (1 + leaf64.grad.norm())


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_packed_attention_equals_attention_written_out(kv: int, window: int | None) -> None:
    assert_equals_written_out(SMALL, inputs(SMALL.segments[-1].end, kv=kv), sliding_window=window)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_models_own_scale_is_used(scale: float) -> None:
    assert_equals_written_out(SMALL, inputs(SMALL.segments[-1].end), scale=scale)


def test_values_may_be_wider_or_narrower_than_keys() -> None:
    for value_width in (4, 12):
        assert_equals_written_out(SMALL, inputs(SMALL.segments[-1].end, value_width=value_width))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_soft_caps_and_sinks(window: int | None, softcap: float | None, has_sinks: bool) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if has_sinks else None
    assert_equals_written_out(SMALL, inputs(SMALL.segments[-1].end), sliding_window=window, softcap=softcap, s_aux=sinks)


def test_a_sink_on_the_module_is_found() -> None:
    """gpt-oss keeps it there; some versions of transformers pass it as well."""
    module = nn.Module()
    module.sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    tensors = [tensor.float() for tensor in inputs(SMALL.segments[-1].end)]
    found, _ = shared_attention_forward(module, *tensors, None, shared_layout=SMALL)
    expected, _ = shared_attention_forward(nn.Module(), *tensors, None, shared_layout=SMALL, s_aux=module.sinks)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [SEGMENT_BLOCK, SEGMENT_BLOCK + 1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 3])
@pytest.mark.parametrize("window", [None, 100])
def test_segments_longer_than_a_block_of_queries(length: int, window: int | None) -> None:
    layout = PackedLayout.of([(length, 3, length)])
    assert_equals_written_out(layout, inputs(layout.segments[-1].end, heads=2, kv=1, width=4), sliding_window=window)


@pytest.mark.parametrize("size", [1, SEGMENT_BLOCK, SEGMENT_BLOCK + 1, 270, 2 * SEGMENT_BLOCK, 1000])
def test_a_long_segment_is_cut_evenly(size: int) -> None:
    """No block beyond the limit, and none that is a remainder of a few rows."""
    blocks = [end - start for start, end, _ in attention._cuts(PackedLayout.of([(QUERY_BLOCK + 1, size)]).segments) if start > QUERY_BLOCK]
    assert sum(blocks) == size
    assert max(blocks) <= SEGMENT_BLOCK
    assert max(blocks) - min(blocks) < len(blocks)


@st.composite
def packed(draw: st.DrawFn) -> PackedLayout:
    lengths = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return PackedLayout.of((prompt, *answers) for prompt, answers in draw(st.lists(lengths, min_size=1, max_size=4)))


@settings(max_examples=40)
@given(layout=packed(), window=st.one_of(st.none(), st.integers(1, 12)), block=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_layout_any_window_any_block(layout: PackedLayout, window: int | None, block: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        patch.setattr(attention, "SEGMENT_BLOCK", block)
        assert_equals_written_out(layout, inputs(layout.segments[-1].end, seed=seed, width=4), sliding_window=window)


def test_bf16_stays_near_float64() -> None:
    assert_equals_written_out(SMALL, inputs(SMALL.segments[-1].end), dtype=torch.bfloat16)


def test_scores_of_a_thousand_do_not_overflow() -> None:
    tensors = [30 * tensor for tensor in inputs(SMALL.segments[-1].end)]
    found, _ = shared_attention_forward(nn.Module(), *[tensor.float() for tensor in tensors], None, shared_layout=SMALL)
    torch.testing.assert_close(found.double(), written_out(*tensors, full_mask(SMALL), 8**-0.5), rtol=1e-3, atol=1e-3)


@settings(max_examples=40)
@given(layout=packed(), window=st.one_of(st.none(), st.integers(1, 12)))
def test_visibility_is_the_full_mask_restricted_to_a_segment(layout: PackedLayout, window: int | None) -> None:
    mask = full_mask(layout, window)
    for segment in layout.segments:
        keys = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, segment.end)]
        assert visibility(layout, segment, window, CPU).tolist() == mask[segment.start : segment.end][:, keys].tolist()


def test_scaled_dot_product_attention_per_segment_is_the_same() -> None:
    """The way for devices without the CPU's block products."""
    query, key, value = [tensor.float() for tensor in inputs(SMALL.segments[-1].end)]
    repeated_key, repeated_value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    outputs = []
    for segment in SMALL.segments:
        mask = visibility(SMALL, segment, 4, CPU)
        rows = slice(segment.start, segment.end)
        outputs.append(
            attention._sdpa(
                query[:, :, rows], attention._visible(repeated_key, segment), attention._visible(repeated_value, segment), mask, 8**-0.5
            )
        )
    found, _ = shared_attention_forward(nn.Module(), query, key, value, None, sliding_window=4, shared_layout=SMALL)
    torch.testing.assert_close(torch.cat(outputs, dim=2).transpose(1, 2), found)


def test_answers_do_not_see_each_other_or_other_groups() -> None:
    """Changing a row changes exactly the rows that may see it."""
    tensors = [tensor.float() for tensor in inputs(SMALL.segments[-1].end)]
    before, _ = shared_attention_forward(nn.Module(), *tensors, None, shared_layout=SMALL)
    mask = full_mask(SMALL)
    for row in range(SMALL.segments[-1].end):
        key, value = tensors[1].clone(), tensors[2].clone()
        key[:, :, row] += 1.0
        value[:, :, row] += 1.0
        after, _ = shared_attention_forward(nn.Module(), tensors[0], key, value, None, shared_layout=SMALL)
        changed = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-6
        assert changed.tolist() == mask[:, row].tolist()


def test_masks_are_made_once_per_micro_batch() -> None:
    layout = collate(random_groups(1, prompt=(4, 5), answer=(3, 4))).layout
    tensors = [tensor.float() for tensor in inputs(layout.segments[-1].end)]
    shared_attention_forward(nn.Module(), *tensors, None, shared_layout=layout)
    masks = dict(layout.cache)
    assert masks
    shared_attention_forward(nn.Module(), *tensors, None, shared_layout=layout)
    assert layout.cache.keys() == masks.keys()
    assert all(layout.cache[key] is value for key, value in masks.items())


def test_dropout_on_a_packed_row_is_refused() -> None:
    tensors = [tensor.float() for tensor in inputs(SMALL.segments[-1].end)]
    with pytest.raises(ValueError, match="dropout"):
        shared_attention_forward(nn.Module(), *tensors, None, dropout=0.1, shared_layout=SMALL)


@pytest.mark.parametrize("forward_dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("is_backward_inside", [True, False])
def test_autocast_with_keys_and_values_of_different_dtype(
    forward_dtypes: tuple[torch.dtype, torch.dtype], is_backward_inside: bool
) -> None:
    """Under autocast a norm of queries and keys (Qwen 3, Gemma 3, OLMo 2) returns float32 while values come in bf16."""
    qk_dtype, v_dtype = forward_dtypes
    leaves64 = [tensor.requires_grad_() for tensor in inputs(SMALL.segments[-1].end)]
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf, dtype in zip(leaves64, (qk_dtype, qk_dtype, v_dtype), strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = shared_attention_forward(nn.Module(), *leaves, None, shared_layout=SMALL)
        if is_backward_inside:
            found.float().sum().backward()
    if not is_backward_inside:
        found.float().sum().backward()
    expected = written_out(*leaves64, full_mask(SMALL), 8**-0.5)
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=6e-2, atol=6e-2)
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        assert leaf.grad is not None
        assert leaf64.grad is not None
        # The sum of all outputs does not depend on the scores to first order as strongly, hence the absolute part.
        assert (leaf.grad.double() - leaf64.grad).norm() <= 6e-2 * leaf64.grad.norm() + 0.1


# --- calls without a layout ------------------------------------------------------------------------------------------------------------


def ordinary(tensors: list[Tensor], mask: Tensor | None, **options: Any) -> Tensor:
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    return shared_attention_forward(module, *[tensor.float() for tensor in tensors], mask, **options)[0]


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_without_a_layout_the_mask_is_honoured(softcap: float | None) -> None:
    tensors = inputs(6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    padded = causal.clone()
    padded[:, :2] = False
    padded[:2, :2] = torch.eye(2, dtype=torch.bool)  # rows of padding see themselves, as transformers has it
    expected = written_out(*tensors, padded, 8**-0.5, softcap)
    torch.testing.assert_close(ordinary(tensors, padded[None, None], softcap=softcap).double(), expected, rtol=1e-5, atol=1e-5)
    additive = torch.zeros(6, 6).masked_fill(~padded, torch.finfo(torch.float32).min)
    torch.testing.assert_close(ordinary(tensors, additive[None, None], softcap=softcap).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 0.7}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=["plain", "softcap", "sinks"]
)
def test_without_a_mask_it_is_causal(options: dict[str, Any]) -> None:
    tensors = inputs(6)
    sinks = options.get("s_aux")
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = written_out(*tensors, causal, 8**-0.5, options.get("softcap"), None if sinks is None else sinks.double())
    torch.testing.assert_close(ordinary(tensors, None, **options).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_one_new_token_sees_the_whole_cache(softcap: float | None) -> None:
    """Generation: one query at the end of six keys, no mask."""
    tensors = inputs(6)
    tensors[0] = tensors[0][:, :, -1:]
    expected = written_out(*tensors, torch.ones(1, 6, dtype=torch.bool), 8**-0.5, softcap)
    torch.testing.assert_close(ordinary(tensors, None, softcap=softcap).double(), expected, rtol=1e-5, atol=1e-5)


def test_registering_twice_does_no_harm() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    attention.register()
    attention.register()
    assert AttentionInterface()[attention.NAME] is shared_attention_forward
    assert attention.NAME in AttentionMaskInterface().valid_keys()
