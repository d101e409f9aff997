"""Attention over a packed row, behind the name `orpo_shared` of transformers' `AttentionInterface`.

Every model whose attention goes through that interface works unchanged. The layout travels as the keyword argument `shared_layout` of the
model's forward, which transformers hands down to every attention call; it is no global, so recomputation under gradient checkpointing
sees it too. Without a layout (generation, the padded engine) the call is ordinary masked attention.

Three ways to compute the same thing, chosen by what the call needs:

- `_BlockAttention`: batched matrix products per block of queries, CPU; docs/performance.md says what it gains.
- scaled-dot-product attention, per short group or per segment: every device. `orpo.engine.kernels` has two for the whole row on CUDA.
- plain mathematics per segment: soft caps and attention sinks, which the other two do not have.

Shape suffixes: H query heads, K key heads, G query heads per key head, T packed tokens, S rows of a segment or block (in a block times
G), L visible keys, E head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo.engine.kernels import run_kernel
from orpo.engine.layout import PackedLayout, Segment, sent
from orpo.engine.opaque import packed_attention, use
from orpo.engine.rule import AttentionRule

NAME = "orpo_shared"
LAYOUT_KEYWORD = "shared_layout"

BLOCK_DEVICES = ("cpu",)
"""Where matrix products per block are used; elsewhere scaled-dot-product attention, until it is measured there."""

QUERY_BLOCK = 256
"""Rows of a group that is short enough to be one block: a few wasted products cost less than more calls."""
SEGMENT_BLOCK = 128
"""Most queries of a block of a longer group: few enough that their scores stay in the cache and causal attention wastes little."""


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks_H = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if shared_layout is None:
        rule = AttentionRule(scale, sliding_window, softcap, sinks_H)
        return _ordinary(module, query, key, value, attention_mask, dropout, rule, **kwargs), None
    if dropout:
        raise ValueError(f"attention dropout of {dropout:g} is on, which packed rows do not support; leave disable_dropout on to use them")
    if not torch.compiler.is_compiling():
        shared_layout.windows.add(sliding_window)  # a window that never reaches this call would be ignored in silence: the start looks
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for scaled-dot-product attention; behind a norm of queries and keys (Qwen 3) they are float32, values bf16.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if shared_layout.handle is not None and torch.compiler.is_compiling():
        return packed_attention(query, key, value, sinks_H, shared_layout.handle, scale, sliding_window, softcap), None
    return _packed(query, key, value, shared_layout, AttentionRule(scale, sliding_window, softcap, sinks_H)), None


def _packed(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule) -> Tensor:
    """Attention over a packed row, by what the run's kernel and the model need; (1, T, H, E)."""
    if layout.kernel != "sdpa":
        return run_kernel(query, key, value, layout, rule)
    if _is_block(query, layout, rule):
        return _BlockAttention.apply(query, key, value, layout, rule)
    return (_by_piece if rule.is_plain else _by_segment)(query, key, value, layout, rule)


def _is_block(query: Tensor, layout: PackedLayout, rule: AttentionRule) -> bool:
    return layout.kernel == "sdpa" and rule.is_plain and query.device.type in BLOCK_DEVICES


def _by_segment(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule) -> Tensor:
    """Plain mathematics, one segment after the other; (1, T, H, E)."""
    outputs_HSE = []
    for segment in layout.segments:
        query_HSE = query[:, :, segment.start : segment.end]
        mask_SL = visibility(layout, segment, rule.window, query.device)
        outputs_HSE.append(_plain(query_HSE, _visible(key, segment), _visible(value, segment), mask_SL, rule))
    return torch.cat(outputs_HSE, dim=2).transpose(1, 2).contiguous()


def _by_piece(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule) -> Tensor:
    """Scaled-dot-product attention, a call for each short group and for each segment of a long one; (1, T, H, E)."""
    if (num_sharing := query.shape[1] // key.shape[1]) > 1:
        # On CUDA the kernels that take a mask have no grouped heads; asked for both, torch writes out all scores in float32.
        key, value = (tensor.repeat_interleave(num_sharing, dim=1) for tensor in (key, value))
    groups = list(_groups(layout.segments))
    sizes = [group[-1].end - group[0].start for group in groups]
    outputs_HSE = []
    # Split, not sliced: the gradient of a slice is a whole row of zeros, and there would be one to add for each.
    parts = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    for group, queries, keys, values in zip(groups, *parts, strict=True):
        if queries.shape[2] <= QUERY_BLOCK:  # a few wasted scores cost less than more calls, and nothing of the prompt is copied
            outputs_HSE.append(_sdpa(queries, keys, values, _group_mask(layout, group, rule.window, query), rule.scale))
        else:
            outputs_HSE += _long_group(group, queries, keys, values, layout, rule)
    return torch.cat(outputs_HSE, dim=2).transpose(1, 2).contiguous()


def _long_group(
    group: tuple[Segment, ...], query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: AttentionRule
) -> Iterator[Tensor]:
    """Outputs of a group's segments, from its own queries, keys and values."""
    queries = query.split([segment.end - segment.start for segment in group], dim=2)
    base = group[0].start
    for segment, query_HSE in zip(group, queries, strict=True):
        own = Segment(segment.start - base, segment.end - base, segment.prefix_start - base, segment.prefix_end - base)
        is_causal = segment.num_prefix == 0 and (rule.window is None or rule.window >= segment.end - segment.start)
        # Without a mask of its own a GPU takes flash attention.
        mask_SL = None if is_causal else _additive(layout, visibility(layout, segment, rule.window, query.device), query.dtype)
        yield _sdpa(query_HSE, _visible(key, own), _visible(value, own), mask_SL, rule.scale)


def _additive(layout: PackedLayout, mask_SL: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and -inf, as scaled-dot-product attention makes it of a bool mask: here once per micro-batch, there in every layer."""
    cache_key = ("additive", id(mask_SL), dtype)  # the mask itself lives in the same cache
    if cache_key not in layout.cache:
        layout.cache[cache_key] = torch.zeros_like(mask_SL, dtype=dtype).masked_fill_(~mask_SL, -torch.inf)
    return layout.cache[cache_key]  # type: ignore[return-value]


def _groups(segments: tuple[Segment, ...]) -> Iterator[tuple[Segment, ...]]:
    """Each prompt with its answers."""
    firsts = [index for index, segment in enumerate(segments) if segment.num_prefix == 0] + [len(segments)]
    for first, last in itertools.pairwise(firsts):
        yield segments[first:last]


def _group_mask(layout: PackedLayout, group: tuple[Segment, ...], window: int | None, query: Tensor) -> Tensor:
    """Which rows of its group each row may use: 0 and -inf in the query's dtype, shape (S, S)."""
    device = query.device
    cache_key = ("group", group[0].start, window, device)
    if cache_key not in layout.cache:
        start_S, prefix_start_S, prefix_end_S, position_S = _table(layout, device)[:, group[0].start : group[-1].end, None].unbind(0)
        rows = torch.arange(group[0].start, group[-1].end, device=device)
        visible_SS = ((rows >= start_S) & (rows <= rows[:, None])) | ((rows >= prefix_start_S) & (rows < prefix_end_S))
        layout.cache[cache_key] = visible_SS if window is None else visible_SS & (position_S - position_S.T < window)
    return _additive(layout, layout.cache[cache_key], query.dtype)  # type: ignore[arg-type]


def _table(layout: PackedLayout, device: torch.device) -> Tensor:
    cache_key = ("table", device)
    if cache_key not in layout.cache:
        layout.cache[cache_key] = sent(layout.table(layout.num_rows), device)
    return layout.cache[cache_key]  # type: ignore[return-value]


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    rule: AttentionRule,
    **kwargs: object,
) -> Tensor:
    """Masked attention for a call without a layout."""
    if rule.is_plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=rule.scale, **kwargs)[0]
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    return _plain(query, key, value, attention_mask, rule).transpose(1, 2).contiguous()


def visibility(layout: PackedLayout, segment: Segment, window: int | None, device: torch.device) -> Tensor:
    """Which of its visible keys (prefix, then itself) each row of a segment may use: bool, shape (S, L).

    A sliding window counts positions, as in the unpacked sequence: a row sees itself and the `window` - 1 positions before it.
    """
    size, num_keys = segment.end - segment.start, segment.num_prefix + segment.end - segment.start
    cache_key = ("visible", size, num_keys, window, device)
    if cache_key not in layout.cache:
        # Row i stands at position num_prefix + i behind the whole prefix, so the diagonal of "itself and before" moves by the prefix.
        visible_SL = torch.ones(size, num_keys, dtype=torch.bool, device=device).tril(segment.num_prefix)
        if window is not None:
            visible_SL &= torch.ones_like(visible_SL).triu(segment.num_prefix - window + 1)
        layout.cache[cache_key] = visible_SL
    return layout.cache[cache_key]  # type: ignore[return-value]


def _visible(tensor: Tensor, segment: Segment) -> Tensor:
    """Rows of the prefix followed by the segment's own, shape (1, K, L, E)."""
    own = tensor[:, :, segment.start : segment.end]
    if segment.num_prefix == 0:
        return own
    if segment.prefix_end == segment.start:  # side by side: nothing to copy
        return tensor[:, :, segment.prefix_start : segment.end]
    return torch.cat([tensor[:, :, segment.prefix_start : segment.prefix_end], own], dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask_SL: Tensor | None, scale: float) -> Tensor:
    """With a mask, or causal without one; as many key heads as query heads."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_SL, is_causal=mask_SL is None, scale=scale)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: AttentionRule) -> Tensor:
    """Attention written out, softmax in float32: soft cap on the scores (Gemma 2), a learned sink per head (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    # Not -inf: a row of padding may see nothing at all, and the NaN of its softmax would reach the others as a key of the next layer.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if rule.sinks_H is not None:
        sink = rule.sinks_H.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(value.dtype) @ value


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows [start, end) of the packed row, the key rows they are multiplied with, and the mask that hides the rest.

    `keys` is one range of rows where that is contiguous or nearly so, else prefix and own rows. `mask_1SL` is 0 or -inf, with a row for
    each (query row, query head of a key head) in that order.
    """

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    mask_1SL: Tensor


class _BlockAttention(torch.autograd.Function):
    """Attention of a packed row as batched matrix products, one per key head, with the scores recomputed in the backward pass.

    Query heads that share a key head are stacked, so keys and values are never repeated. A short group is one block, its answers hidden
    from each other by the mask: on a CPU a few wasted products cost less than more calls. A long one is cut by segment and into blocks of
    queries, so that what is behind a block's last row is left out rather than masked. Scores live for one block at a time, and nothing
    but inputs and output is kept: memory is linear in the number of tokens.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        rule: AttentionRule,
    ) -> Tensor:
        query_KTGE, key_KTE, value_KTE = _by_key_head(query, key.shape[1]), key[0].contiguous(), value[0].contiguous()
        groups = query_KTGE.shape[2]
        output_KTGE = query.new_empty(*query_KTGE.shape[:3], value.shape[3])
        for block in plan(layout, rule.window, groups, query.dtype):
            weights_KSL = _weights(query_KTGE, _rows(key_KTE, block), block, rule.scale).to(value.dtype)
            output_KSE = torch.bmm(weights_KSL, _rows(value_KTE, block))
            output_KTGE[:, block.start : block.end] = output_KSE.unflatten(1, (-1, groups))
        output_THE = output_KTGE.permute(1, 0, 2, 3).flatten(1, 2)
        ctx.save_for_backward(query, key, value, output_THE)
        ctx.layout, ctx.rule = layout, rule  # type: ignore[attr-defined]
        return output_THE[None]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output_THE = ctx.saved_tensors  # type: ignore[attr-defined]
        rule: AttentionRule = ctx.rule  # type: ignore[attr-defined]
        num_kv = key.shape[1]
        query_KTGE, key_KTE, value_KTE = _by_key_head(query, num_kv), key[0].contiguous(), value[0].contiguous()
        groups = query_KTGE.shape[2]
        grad_KTGE = _by_key_head(grad_outputs[0].transpose(1, 2), num_kv)
        # Sum over keys of weight * d(weight), from the output alone: d(scores) = weights * (d(weights) - that sum).
        inner_KTG = (grad_outputs[0][0].float() * output_THE).sum(-1).unflatten(1, (num_kv, -1)).transpose(0, 1)
        d_query_KTGE = torch.empty_like(query_KTGE)
        # float32 whatever the inputs: a prefix row adds up a part from every answer behind it, and bf16 would lose the small ones.
        d_key_KTE = torch.zeros(key.shape[1:], dtype=torch.float32)
        d_value_KTE = torch.zeros(value.shape[1:], dtype=torch.float32)
        for block in plan(ctx.layout, rule.window, groups, query.dtype):  # type: ignore[attr-defined]
            rows = slice(block.start, block.end)
            keys_KLE = _rows(key_KTE, block)
            grad_KSE = grad_KTGE[:, rows].flatten(1, 2)
            weights_KSL = _weights(query_KTGE, keys_KLE, block, rule.scale)
            d_scores_KSL = torch.bmm(grad_KSE, _rows(value_KTE, block).transpose(1, 2)).float()
            d_scores_KSL.sub_(inner_KTG[:, rows].flatten(1, 2)[..., None]).mul_(weights_KSL)
            weights_KSL, d_scores_KSL = weights_KSL.to(query.dtype), d_scores_KSL.to(query.dtype)
            d_query_KTGE[:, rows] = torch.bmm(d_scores_KSL, keys_KLE).unflatten(1, (-1, groups))
            _add_rows(d_value_KTE, torch.bmm(weights_KSL.transpose(1, 2), grad_KSE), block)
            _add_rows(d_key_KTE, torch.bmm(d_scores_KSL.transpose(1, 2), query_KTGE[:, rows].flatten(1, 2)), block)
        # The scores were scaled inside their product (`alpha`), so the scale comes back here, once, on queries and keys alike.
        d_query = d_query_KTGE.mul_(rule.scale).permute(1, 0, 2, 3).flatten(1, 2).transpose(0, 1)[None]
        return d_query, d_key_KTE.mul_(rule.scale).to(key.dtype)[None], d_value_KTE.to(value.dtype)[None], None, None


def _by_key_head(query: Tensor, num_kv: int) -> Tensor:
    """(1, H, T, E) -> (K, T, G, E), contiguous: the rows of a block, with the heads of a key head side by side, are then one matrix."""
    return query[0].unflatten(0, (num_kv, -1)).transpose(1, 2).contiguous()


def _rows(tensor_KTE: Tensor, block: Block) -> Tensor:
    if len(block.keys) == 1:
        return tensor_KTE[:, block.keys[0][0] : block.keys[0][1]]
    return torch.cat([tensor_KTE[:, start:end] for start, end in block.keys], dim=1)


def _add_rows(total_KTE: Tensor, part_KLE: Tensor, block: Block) -> None:
    first = 0
    for start, end in block.keys:
        total_KTE[:, start:end] += part_KLE[:, first : first + end - start]
        first += end - start


def _weights(query_KTGE: Tensor, keys_KLE: Tensor, block: Block, scale: float) -> Tensor:
    """Softmax of one block's scores, float32; the mask rides along in the matrix product."""
    query_KSE = query_KTGE[:, block.start : block.end].flatten(1, 2)
    mask = block.mask_1SL.expand(query_KSE.shape[0], -1, -1)
    return torch.softmax(torch.baddbmm(mask, query_KSE, keys_KLE.transpose(1, 2), alpha=scale).float(), -1)


def plan(layout: PackedLayout, window: int | None, groups: int, dtype: torch.dtype) -> list[Block]:
    """The blocks of a packed row; made once per micro-batch and shared by its layers and both passes."""
    cache_key = ("plan", window, groups, dtype)
    if cache_key not in layout.cache:
        layout.cache[cache_key] = [
            Block(start, end, keys, _mask(layout, start, end, keys, window, dtype).repeat_interleave(groups, 0)[None])
            for start, end, keys in _cuts(layout.segments)
        ]
    return layout.cache[cache_key]  # type: ignore[return-value]


def _cuts(segments: tuple[Segment, ...]) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """(first query row, end row, key ranges) of each block."""
    for group in _groups(segments):
        start, end = group[0].start, group[-1].end
        if end - start <= QUERY_BLOCK:
            yield start, end, ((start, end),)
            continue
        for segment in group:
            is_adjacent = segment.num_prefix == 0 or segment.prefix_end == segment.start
            # Evenly: 270 rows in blocks of 256 and 14 would be one that outgrows the cache and one that is hardly worth its calls.
            step = -(-(segment.end - segment.start) // -(-(segment.end - segment.start) // SEGMENT_BLOCK))
            for block_start in range(segment.start, segment.end, step):
                block_end = min(block_start + step, segment.end)
                if is_adjacent:
                    yield block_start, block_end, ((segment.prefix_start, block_end),)
                else:
                    yield block_start, block_end, ((segment.prefix_start, segment.prefix_end), (segment.start, block_end))


def _mask(layout: PackedLayout, start: int, end: int, keys: tuple[tuple[int, int], ...], window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query row may use a key row, -inf elsewhere, shape (S, L)."""
    rows = torch.cat([torch.arange(first, last) for first, last in keys])
    mask_SL = torch.full((end - start, len(rows)), float("-inf"), dtype=dtype)
    for segment in layout.segments:
        first, last = max(segment.start, start), min(segment.end, end)
        if first >= last:
            continue
        queries = torch.arange(first, last)[:, None]
        is_own = (rows >= segment.start) & (rows <= queries)
        is_prefix = (rows >= segment.prefix_start) & (rows < segment.prefix_end)
        visible = is_own | is_prefix
        if window is not None:
            # Positions: a prefix row keeps its place, an own row stands behind the whole prefix.
            position = torch.where(rows >= segment.start, rows - segment.start + segment.num_prefix, rows - segment.prefix_start)
            visible &= queries - segment.start + segment.num_prefix - position < window
        mask_SL[first - start : last - start].masked_fill_(visible, 0.0)
    return mask_SL


use(_packed, _BlockAttention, _is_block)
