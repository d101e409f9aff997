"""Variable-length flash attention on a CPU: torch's operator with its dispatch and its autograd, and a kernel written out below them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from packedrows import written_out


def flash(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: Sequence[int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch documents of `varlen_attn`: every sequence by itself, causality and window counted from the last key backwards."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        num_q, num_k = q1 - q0, k1 - k0
        assert num_q <= max_q
        assert num_k <= max_k
        left, right = window_size
        distance = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
        mask = (distance >= -right) & ((distance <= left) if left >= 0 else torch.tensor(True))
        pieces = [tensor[start:end].transpose(0, 1)[None] for tensor, start, end in ((query, q0, q1), (key, k0, k1), (value, k0, k1))]
        outputs.append(written_out(*pieces, mask, scale)[0])
    return torch.cat(outputs)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: Sequence[int] | None = None, enable_gqa: bool = False, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
    output = flash(query, key, value, cu_q, cu_k, max_q, max_k, **options)
    return output.contiguous(), query.new_zeros(query.shape[1], query.shape[0]), query.new_zeros(2, dtype=torch.int64)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, is_causal: bool, rng_state: Tensor, scale: float | None = None, window_size: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    def again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"scale": scale, "window_size": window_size, "enable_gqa": query.shape[1] != key.shape[1]}
        return flash(query, key, value, cu_q, cu_k, max_q, max_k, **options)

    return tuple(found.contiguous() for found in torch.func.vjp(again, query, key, value)[1](grad))


@contextmanager
def varlen_runs_here() -> Iterator[None]:
    """Give torch's operator kernels for a CPU."""
    import torch.nn.attention.varlen

    library = torch.library.Library("torch_attn", "IMPL")
    library.impl("_varlen_attn", _forward, "CPU")
    library.impl("_varlen_attn_backward", _backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
