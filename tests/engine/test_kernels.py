"""The kernels for CUDA: what can be known without one. On a GPU the same oracle holds, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo.engine import kernels
from orpo.engine.attention import shared_attention_forward
from orpo.engine.choose import choose
from orpo.engine.layout import PackedLayout
from orpo.errors import UserError
from packedrows import SMALL, full_mask, inputs, layout_of, written_out

NUM_TOKENS = SMALL.segments[-1].end


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("layout", [SMALL, layout_of((150, 3, 140), (5, 2))], ids=["small", "longer than a block"])
def test_flex_attention_equals_attention_written_out(kv: int, softcap: float | None, window: int | None, layout: PackedLayout) -> None:
    tensors = inputs(layout.segments[-1].end, kv=kv, width=16)
    with torch.no_grad():  # there is no backward pass on a CPU
        found = kernels.flex(*[tensor.float() for tensor in tensors], layout, 0.3, window, softcap).transpose(1, 2)
    expected = written_out(*tensors, full_mask(layout, window), 0.3, softcap)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def flash(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch documents of `varlen_attn`: every sequence by itself, causality and window counted from the last key backwards."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        num_q, num_k = int(q1 - q0), int(k1 - k0)
        assert num_q <= max_q
        assert num_k <= max_k
        left, right = window_size
        distance = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
        mask = (distance >= -right) & ((distance <= left) if left >= 0 else torch.tensor(True))
        pieces = [tensor[start:end].transpose(0, 1)[None] for tensor, start, end in ((query, q0, q1), (key, k0, k1), (value, k0, k1))]
        outputs.append(written_out(*pieces, mask, scale)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv", [4, 2])
def test_every_segment_is_a_sequence_of_flash_attention(kv: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    tensors = inputs(NUM_TOKENS, kv=kv)
    found = kernels.varlen(*tensors, SMALL, 0.3, window)
    torch.testing.assert_close(found, written_out(*tensors, full_mask(SMALL, window), 0.3))


@pytest.mark.parametrize(
    ("name", "device", "dtype", "softcap", "sinks", "expected"),
    [
        ("", "meta", torch.bfloat16, None, None, None),
        ("flex", "cpu", torch.bfloat16, None, None, None),
        ("flex", "cuda", torch.float32, 0.7, None, "flex"),
        ("flex", "cuda", torch.float32, None, torch.zeros(4), None),
        ("varlen", "cuda", torch.bfloat16, None, None, "varlen"),
        ("varlen", "cuda", torch.float32, None, None, None),
        ("varlen", "cuda", torch.bfloat16, 0.7, None, None),
    ],
)
def test_what_a_kernel_cannot_do_stays_with_the_default(
    name: str, device: str, dtype: torch.dtype, softcap: float | None, sinks: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Query:
        """As much of a tensor as the choice looks at."""

    monkeypatch.setenv(kernels.VARIABLE, name)
    query: Any = Query()
    query.device, query.dtype = torch.device(device), dtype
    assert kernels.kernel_for(query, softcap, sinks) == expected


def test_an_unknown_kernel_is_refused_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "flash3")
    with pytest.raises(UserError, match="flash3") as caught:
        choose(nn.Linear(1, 1), [], lambda *_: {}, requested="auto")
    assert "flex or varlen" in str(caught.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("name", "dtype", "tolerance"), [("flex", torch.float32, 1e-3), ("varlen", torch.bfloat16, 6e-2)])
def test_a_kernel_on_a_gpu(name: str, dtype: torch.dtype, tolerance: float, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, name)
    layout = layout_of((150, 3, 140), (5, 2))
    leaves64 = [tensor.requires_grad_() for tensor in inputs(layout.segments[-1].end, width=64)]
    leaves = [leaf.detach().to("cuda", dtype).requires_grad_() for leaf in leaves64]
    found, _ = shared_attention_forward(nn.Module(), *leaves, None, sliding_window=window, shared_layout=layout)
    expected = written_out(*leaves64, full_mask(layout, window), 64**-0.5)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected.backward(direction)
    found.backward(direction.to("cuda", dtype))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        assert (leaf.grad.cpu().double() - leaf64.grad).norm() <= tolerance * (1 + leaf64.grad.norm())
