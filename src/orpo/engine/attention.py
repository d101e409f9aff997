"""Attention over a packed row, behind the name `orpo_shared` of transformers' `AttentionInterface`.

Every model whose attention goes through that interface works unchanged. The layout travels as the keyword argument `shared_layout` of the
model's forward, which transformers hands down to every attention call; it is no global, so recomputation under gradient checkpointing
sees it too. Without a layout (generation, the padded engine) the call is ordinary masked attention.

Three ways to compute the same thing, chosen by what the call needs:

- `_BlockAttention`: matrix products per segment and block of queries, CPU. Measured against scaled-dot-product attention on segments
  (docs/performance.md): 2.9 times its speed forward and backward in bf16 on two cores.
- scaled-dot-product attention per segment: every device.
- plain mathematics per segment: soft caps and attention sinks, which the other two do not have.

Shape suffixes: H query heads, K key heads, G query heads per key head, T packed tokens, S segment or block rows, L visible keys, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo.engine.layout import PackedLayout, Segment

NAME = "orpo_shared"
LAYOUT_KEYWORD = "shared_layout"

QUERY_BLOCK = 256
"""Queries per block: small enough that causal attention wastes little, large enough for the matrix products to run at speed."""


def register() -> None:
    """Make `orpo_shared` known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, shared_attention_forward)
    # A name without a mask function of its own gets mask None from transformers: silently unmasked attention for ordinary calls.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def shared_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    shared_layout: PackedLayout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function. Shapes as transformers calls it: query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E).

    Raises:
        ValueError: dropout inside attention is asked for on a packed row.
    """
    sinks_H = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if shared_layout is None:
        return _ordinary(module, query, key, value, attention_mask, dropout, scaling, softcap, sinks_H, **kwargs), None
    if dropout:
        raise ValueError("attention dropout is not supported on packed rows; set it to 0 or use engine='padded'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and sinks_H is None and query.device.type == "cpu":
        return _BlockAttention.apply(query, key, value, shared_layout, scale, sliding_window), None
    outputs_HSE = []
    for segment in shared_layout.segments:
        query_HSE = query[:, :, segment.start : segment.end]
        key_KLE, value_KLE = _visible(key, segment), _visible(value, segment)
        mask_SL = visibility(shared_layout, segment, sliding_window, query.device)
        if softcap is None and sinks_H is None:
            outputs_HSE.append(_sdpa(query_HSE, key_KLE, value_KLE, mask_SL, scale))
        else:
            outputs_HSE.append(_plain(query_HSE, key_KLE, value_KLE, mask_SL, scale, softcap, sinks_H))
    return torch.cat(outputs_HSE, dim=2).transpose(1, 2).contiguous(), None


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    **kwargs: object,
) -> Tensor:
    """Masked attention for a call without a layout."""
    if softcap is None and sinks_H is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _plain(query, key, value, attention_mask, scale, softcap, sinks_H).transpose(1, 2).contiguous()


def visibility(layout: PackedLayout, segment: Segment, window: int | None, device: torch.device) -> Tensor:
    """Which of its visible keys (prefix, then itself) each row of a segment may use: bool, shape (S, L).

    A sliding window counts positions, as in the unpacked sequence: a row sees itself and the `window` - 1 positions before it.
    """
    size, num_keys = segment.end - segment.start, segment.num_prefix + segment.end - segment.start
    cache_key = ("visible", size, num_keys, window, device)
    if cache_key not in layout.cache:
        visible_SL = torch.ones(size, num_keys, dtype=torch.bool, device=device).tril(segment.num_prefix)
        if window is not None:
            visible_SL &= torch.ones_like(visible_SL).triu(segment.num_prefix - window + 1)
        layout.cache[cache_key] = visible_SL
    return layout.cache[cache_key]


def _visible(tensor: Tensor, segment: Segment) -> Tensor:
    """Rows of the prefix followed by the segment's own, shape (1, K, L, E)."""
    own = tensor[:, :, segment.start : segment.end]
    if segment.num_prefix == 0:
        return own
    return torch.cat([tensor[:, :, segment.prefix_start : segment.prefix_end], own], dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask_SL: Tensor, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_SL, scale=scale, enable_gqa=grouped)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks_H: Tensor | None
) -> Tensor:
    """Attention written out, softmax in float32: soft cap on the scores (Gemma 2), a learned sink per head (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks_H is not None:
        sink = sinks_H.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(value.dtype) @ value


class _BlockAttention(torch.autograd.Function):
    """Segment attention as batched matrix products, one per key head, with the scores recomputed in the backward pass.

    Query heads that share a key head are stacked, so keys and values are never repeated. Scores live for one block at a time: memory is
    linear in the number of tokens. Nothing but inputs and output is kept.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        scale: float,
        window: int | None,
    ) -> Tensor:
        num_heads, num_tokens = query.shape[1], query.shape[2]
        num_kv = key.shape[1]
        output_THE = query.new_empty(num_tokens, num_heads, value.shape[3])
        query_KGTE = query[0].unflatten(0, (num_kv, -1))
        output_KGTE = output_THE.transpose(0, 1).unflatten(0, (num_kv, -1))
        for segment in layout.segments:
            key_KLE, value_KLE = _visible(key, segment)[0].contiguous(), _visible(value, segment)[0].contiguous()
            for start, end, num_keys in _blocks(segment):
                query_KSE = query_KGTE[:, :, start:end].flatten(1, 2)
                scores_KSL = _scores(query_KSE, key_KLE[:, :num_keys], layout, segment, start, end, scale, window)
                weights_KSL = torch.softmax(scores_KSL.float(), -1).to(value.dtype)
                output_KGTE[:, :, start:end] = torch.bmm(weights_KSL, value_KLE[:, :num_keys]).unflatten(1, (-1, end - start))
        ctx.save_for_backward(query, key, value, output_THE)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window  # type: ignore[attr-defined]
        return output_THE[None]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output_THE = ctx.saved_tensors  # type: ignore[attr-defined]
        layout, scale, window = ctx.layout, ctx.scale, ctx.window  # type: ignore[attr-defined]
        grad_THE = grad_outputs[0][0]
        num_kv = key.shape[1]
        # Sum over keys of weight * d(weight), from the output alone: d(scores) = weights * (d(weights) - that sum).
        inner_KGT = (grad_THE.float() * output_THE.float()).sum(-1).t().unflatten(0, (num_kv, -1))
        query_KGTE = query[0].unflatten(0, (num_kv, -1))
        grad_KGTE = grad_THE.transpose(0, 1).unflatten(0, (num_kv, -1))
        d_query_THE = torch.empty_like(output_THE) if output_THE.shape[2] == query.shape[3] else None
        if d_query_THE is None:
            d_query_THE = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        d_query_KGTE = d_query_THE.transpose(0, 1).unflatten(0, (num_kv, -1))
        d_key_KTE = torch.zeros(key.shape[1:], dtype=torch.float32)
        d_value_KTE = torch.zeros(value.shape[1:], dtype=torch.float32)
        for segment in layout.segments:
            key_KLE, value_KLE = _visible(key, segment)[0].contiguous(), _visible(value, segment)[0].contiguous()
            for start, end, num_keys in _blocks(segment):
                query_KSE, grad_KSE = query_KGTE[:, :, start:end].flatten(1, 2), grad_KGTE[:, :, start:end].flatten(1, 2)
                scores_KSL = _scores(query_KSE, key_KLE[:, :num_keys], layout, segment, start, end, scale, window)
                weights_KSL = torch.softmax(scores_KSL.float(), -1)
                d_scores_KSL = torch.bmm(grad_KSE, value_KLE[:, :num_keys].transpose(1, 2)).float()
                d_scores_KSL.sub_(inner_KGT[:, :, start:end].flatten(1, 2)[..., None]).mul_(weights_KSL)
                weights_KSL, d_scores_KSL = weights_KSL.to(query.dtype), d_scores_KSL.to(query.dtype)
                d_query = torch.bmm(d_scores_KSL, key_KLE[:, :num_keys]).mul_(scale)
                d_query_KGTE[:, :, start:end] = d_query.unflatten(1, (-1, end - start))
                _add_visible(d_value_KTE, torch.bmm(weights_KSL.transpose(1, 2), grad_KSE), segment)
                _add_visible(d_key_KTE, torch.bmm(d_scores_KSL.transpose(1, 2), query_KSE), segment)
        d_query = d_query_THE.transpose(0, 1)[None]
        return d_query, d_key_KTE.mul_(scale).to(key.dtype)[None], d_value_KTE.to(value.dtype)[None], None, None, None


def _blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, visible keys) of each block of queries; keys behind a block's last row are left out, not masked."""
    for start in range(segment.start, segment.end, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, segment.end)
        yield start, end, segment.num_prefix + end - segment.start


def _scores(
    query_KSE: Tensor,
    key_KLE: Tensor,
    layout: PackedLayout,
    segment: Segment,
    start: int,
    end: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Masked, scaled scores of one block of queries; the mask rides along in the matrix product."""
    size, num_keys = end - start, key_KLE.shape[1]
    groups = query_KSE.shape[1] // size
    cache_key = ("additive", size, num_keys, groups, window, query_KSE.dtype)
    if cache_key not in layout.cache:
        block = Segment(start, end, 0, num_keys - size)
        mask_SL = torch.zeros(size, num_keys, dtype=query_KSE.dtype)
        mask_SL.masked_fill_(~visibility(layout, block, window, mask_SL.device), float("-inf"))
        layout.cache[cache_key] = mask_SL.repeat(groups, 1)[None]
    mask_1SL = layout.cache[cache_key]
    return torch.baddbmm(mask_1SL.expand(key_KLE.shape[0], -1, -1), query_KSE, key_KLE.transpose(1, 2), alpha=scale)


def _add_visible(total_KTE: Tensor, part_KLE: Tensor, segment: Segment) -> None:
    """Add a gradient over visible keys (prefix, then own rows, of which a block may see only the first) where those rows lie."""
    num_prefix = segment.num_prefix
    if num_prefix:
        total_KTE[:, segment.prefix_start : segment.prefix_end] += part_KLE[:, :num_prefix]
    own = part_KLE[:, num_prefix:]
    total_KTE[:, segment.start : segment.start + own.shape[1]] += own
