"""On a GPU: every kernel against attention in float64, models against the padded engine, the compiled head, and what compiles twice.

`make test-cuda` runs all of it, and `cudadevice.py` says how a CPU does. FlexAttention compiles for some ten seconds per kind of call, so
its list is short and each entry of it has something that the others have not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cudadevice import CUDA_TESTS, DEVICE, kernels_here, only_on_a_gpu
from orpo.engine import attention, flex, kernels, logits, padded, shared
from orpo.engine.attention import shared_attention_forward
from orpo.engine.choose import Compute, choose, compare
from orpo.engine.layout import PackedLayout, collate
from orpo.engine.rule import AttentionRule
from orpo.objective import ORPO
from packedrows import full_mask, inputs, written_out
from randomgroups import random_groups
from tinymodels import build_tiny_model

pytestmark = CUDA_TESTS
LAYOUT = PackedLayout.of([(150, 3, 140), (5, 2), (90, 60, 1, 30)])
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 1e-3, BF16: 6e-2, FP16: 1e-2}
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)

# kernel, dtype, head size, key heads of 4, window, soft cap, sinks
CALLS: list[tuple[str, torch.dtype, int, int, int | None, float | None, bool]] = [
    *(("sdpa", dtype, size, 2, window, None, False) for dtype in (FP32, BF16) for size in (64, 128, 256) for window in (None, 40)),
    ("sdpa", BF16, 64, 1, None, None, False),
    ("sdpa", BF16, 64, 4, None, None, False),
    ("sdpa", FP16, 64, 2, 40, None, False),
    *(("sdpa", FP32, 64, 2, window, cap, sinks) for window in (None, 40) for cap, sinks in ((0.7, False), (None, True), (0.7, True))),
    *(("sdpa", BF16, 64, 2, 40, cap, sinks) for cap, sinks in ((0.7, False), (None, True))),
    ("flex", FP32, 64, 2, None, None, False),
    ("flex", FP16, 64, 4, None, None, False),
    ("flex", BF16, 64, 2, 40, None, True),
    ("flex", BF16, 96, 4, None, 0.7, False),
    ("flex", BF16, 128, 2, 40, None, False),
    ("flex", BF16, 256, 1, 40, 0.7, False),
    *(("varlen", BF16, size, 2, window, None, False) for size in (64, 96, 128, 256) for window in (None, 40)),
    ("varlen", BF16, 64, 4, None, None, False),
    ("varlen", FP16, 64, 1, 1, None, False),
]


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with kernels_here():
        yield


def with_kernel(name: str, layout: PackedLayout = LAYOUT) -> PackedLayout:
    return PackedLayout(layout.segments, kernel=name)


@pytest.mark.parametrize(("name", "dtype", "size", "kv", "window", "softcap", "has_sinks"), CALLS)
def test_a_kernel_equals_attention_written_out(
    name: str, dtype: torch.dtype, size: int, kv: int, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    num_rows = flex.padded_rows(LAYOUT.num_rows) if name == "flex" else LAYOUT.num_rows
    tensors = inputs(num_rows, kv=kv, width=size)
    leaves64 = [tensor.requires_grad_() for tensor in [*tensors, *([SINKS.clone()] if has_sinks else [])]]
    leaves = [leaf.detach().to(DEVICE, dtype).requires_grad_() for leaf in leaves64]
    mask = torch.eye(num_rows, dtype=torch.bool)
    mask[: LAYOUT.num_rows, : LAYOUT.num_rows] = full_mask(LAYOUT, window)
    expected = written_out(*leaves64[:3], mask, size**-0.5, softcap, leaves64[3] if has_sinks else None)
    options: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "s_aux": leaves[3] if has_sinks else None}
    found, _ = shared_attention_forward(nn.Module(), *leaves[:3], None, shared_layout=with_kernel(name), **options)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected.backward(direction)
    found.backward(direction.to(DEVICE, dtype))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        assert (leaf.grad.cpu().double() - leaf64.grad).norm() <= TOLERANCE[dtype] * (1 + leaf64.grad.norm())


def test_a_new_length_compiles_nothing() -> None:
    counts = []
    for lengths in [(150, 30, 40), (500, 20, 300), (33, 5), (900, 100, 90)]:
        layout = PackedLayout.of([lengths, (5, 2)])
        leaves = [tensor.to(DEVICE, BF16).requires_grad_() for tensor in inputs(flex.padded_rows(layout.num_rows), width=64)]
        flex.attend(*leaves, layout, AttentionRule(0.1)).float().sum().backward()
        counts.append(kernels.num_compiled_graphs())
    assert len(set(counts)) == 1, counts


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3": {"head_dim": 16},
    "mistral": {},
    "gpt_oss": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_equals_the_padded_engine(architecture: str, precision: str) -> None:
    """sdpa everywhere; the other kernels on one model, by the comparison that every run begins with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_tiny_model(architecture, hidden_size=64, **MODELS[architecture]).to(DEVICE).train()
    compute = Compute(FP32) if precision == "fp32" else Compute(BF16, lambda: torch.autocast(DEVICE, BF16))
    agreement = compare(model, random_groups(6, kinds=("pair", "four"), prompt=(10, 40), answer=(3, 30)), ORPO(1.0), compute=compute)
    assert agreement.holds, agreement


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *(("flex", name) for name in ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3_moe")),
        *(("varlen", name) for name in ("llama", "mistral", "qwen3", "gemma3", "qwen3_moe")),
    ],
)
def test_a_run_can_have_the_kernel(name: str, architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_tiny_model(architecture, hidden_size=64, **MODELS[architecture]).to(DEVICE).train()
    compute = Compute(BF16, lambda: torch.autocast(DEVICE, BF16))
    engine = choose(model, random_groups(6, prompt=(10, 40), answer=(3, 30)), ORPO(1.0), attention_kernel=name, compute=compute)
    assert (engine.name, engine.kernel) == ("shared", name)


def test_the_head_is_compiled_and_equal() -> None:
    assert DEVICE in logits.FUSED_DEVICES
    model = build_tiny_model("llama", hidden_size=64).to(DEVICE).train()
    batch = collate(random_groups(6, prompt=(10, 40), answer=(3, 30))).to(DEVICE)
    attention.register()
    before = kernels.num_compiled_graphs()
    expected = padded.step(model, batch, ORPO(1.0))
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(attention.NAME)
    found = shared.step(model, batch, ORPO(1.0), budget_bytes=2**14)
    found.loss.backward()
    assert logits._is_fusing
    assert kernels.num_compiled_graphs() >= before
    torch.testing.assert_close(found.logp_N, expected.logp_N, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-3 * gradients[name].norm() + 1e-6, name


@only_on_a_gpu
def test_nobody_waits_inside_the_engine() -> None:
    """Forward and backward of a micro-batch from pinned memory, with any synchronisation an error; the first one compiles."""
    model = build_tiny_model("llama", hidden_size=64).to(DEVICE).train()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    groups = random_groups(6, prompt=(10, 40), answer=(3, 30))
    shared.step(model, collate(groups).to(DEVICE), ORPO(1.0)).loss.backward()
    batch = collate(groups).pinned()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        shared.step(model, batch.to(DEVICE), ORPO(1.0)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
