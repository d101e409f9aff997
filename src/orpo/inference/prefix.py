"""Answers to one prompt share its keys and values: they are kept once, and read once for all of them at every token.

While a batch is decoded, attention goes under a name of its own through transformers' `AttentionInterface`. A cache layer that shares gives
the keys of each row's own tokens, with what is shared noted on them; the queries of a prompt's rows then meet the prompt's keys in one
matrix product. That every layer has used what it shares is looked at after each step, and a model whose attention goes another way is
decoded without sharing.

Shape suffixes: B rows, U prompts, R rows of a prompt at most, H query heads, K key heads, G query heads per key head, P shared tokens,
S own tokens, L = P + S, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "orpo_decoding"
DEVICES = ("cpu",)
"""Where it has been measured."""
_STANDARD = ("sdpa", "orpo_shared")
"""Names of attention without caps, sinks and biases: what is computed here too."""


class NotSharedError(Exception):
    """A model's attention does not read what its cache shares."""


class Sharing:
    """Which rows have the same prompt; one object for all layers of a cache.

    Args:
        prompt_of_row: the prompt's number of each row; rows of one prompt need not stand together.
    """

    def __init__(self, prompt_of_row: list[int]) -> None:
        self._prompt_of_row = prompt_of_row
        self.kept_prompts: Tensor | None = None
        self._mask: tuple[Tensor | None, Tensor | None] = (None, None)
        self._lay_out()

    def _lay_out(self) -> None:
        self.num_prompts = max(self._prompt_of_row) + 1
        counts = [0] * self.num_prompts
        places = []
        for prompt in self._prompt_of_row:
            places.append((prompt, counts[prompt]))
            counts[prompt] += 1
        self.most_rows = max(counts)
        slots = [prompt * self.most_rows + place for prompt, place in places]
        self.slots = None if slots == list(range(self.num_prompts * self.most_rows)) else torch.tensor(slots)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, and the prompts that they have: `kept_prompts`, or None where all are left."""
        left = [self._prompt_of_row[row] for row in rows]
        kept = sorted(set(left))
        self.kept_prompts = None if len(kept) == self.num_prompts else torch.tensor(kept)
        self._prompt_of_row = [kept.index(prompt) for prompt in left]
        self._lay_out()

    def by_prompt(self, rows_B: Tensor) -> Tensor:
        """(B, …) to (U, R, …), zeros where a prompt has fewer rows."""
        if self.slots is not None:
            rows_B = rows_B.new_zeros(self.num_prompts * self.most_rows, *rows_B.shape[1:]).index_copy_(0, self.slots, rows_B)
        return rows_B.unflatten(0, (self.num_prompts, self.most_rows))

    def by_row(self, prompts_UR: Tensor) -> Tensor:
        """(U, R, …) to (B, …)."""
        flat = prompts_UR.flatten(0, 1)
        return flat if self.slots is None else flat[self.slots]

    def additive(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask of 0 and -inf in place of one of True and False; made once a step, since all layers are given the same."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if self._mask[0] is not mask:
            self._mask = mask, torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        return self._mask[1]


class Shared:
    """The keys and values that rows of a layer share, shapes (U, K, P, E); noted on the keys that the layer gives."""

    def __init__(self, keys_UKPE: Tensor, values_UKPE: Tensor, sharing: Sharing) -> None:
        self.keys_UKPE, self.values_UKPE, self.sharing = keys_UKPE, values_UKPE, sharing
        self.is_used = True

    @property
    def num_tokens(self) -> int:
        return self.keys_UKPE.shape[2]

    def offer(self, keys_BKSE: Tensor) -> None:
        """Note it on the keys of own tokens.

        Raises:
            NotSharedError: nobody has read it since the last time.
        """
        if not self.is_used:
            raise NotSharedError
        self.is_used = False
        keys_BKSE.orpo_shared_prefix = self  # type: ignore[attr-defined]

    def select(self) -> None:
        """Keep the prompts that `sharing` has kept."""
        if (kept := self.sharing.kept_prompts) is not None:
            self.keys_UKPE, self.values_UKPE = self.keys_UKPE[kept], self.values_UKPE[kept]


@contextmanager
def decoding_attention(core: Any) -> Iterator[bool]:
    """The model attends through this module inside, where it can; gives whether it does."""
    before = getattr(core.config, "_attn_implementation", None)
    is_possible = (
        before in _STANDARD
        and getattr(core, "_supports_attention_backend", False)
        and hasattr(core, "set_attn_implementation")
        and next(core.parameters()).device.type in DEVICES
    )
    if not is_possible:
        yield False
        return
    _register()
    core.set_attn_implementation(NAME)
    try:
        yield True
    finally:
        core.set_attn_implementation(before)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **keywords: Any) -> Tensor | None:
        # Of one token whole, so that its length can be held against the keys'; of a prompt left out where it says nothing, as usual.
        can_skip = keywords.get("allow_is_causal_skip", True) and keywords.get("q_length", 1) > 1
        return sdpa_mask(*args, **{**keywords, "allow_is_causal_skip": can_skip})

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per row to its prompt's shared and its own keys; of anything else as transformers computes it.

    Args:
        query: shape (B, H, 1, E).
        key, value: own tokens', shape (B, K, S, E).
        attention_mask: shape (B or 1, H or 1, 1, L), True or 0 where a key is seen.
        scaling: of the scores; None for one over the root of E.
        keywords: as transformers' attention functions take them.

    Returns:
        Shape (B, 1, H, E), and None in place of weights.

    Raises:
        NotSharedError: the keys are not all of a row's, and what they lack is not known.
    """
    shared: Shared | None = getattr(key, "orpo_shared_prefix", None)
    if shared is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise NotSharedError
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
    if query.shape[2] != 1 or any(keywords.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "head_mask")):
        raise NotSharedError
    return _attend_shared(query, key, value, attention_mask, scaling, shared), None


def _attend_shared(
    query: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor | None, scaling: float | None, shared: Shared
) -> Tensor:
    sharing, num_shared = shared.sharing, shared.num_tokens
    rows, heads, _, width = query.shape
    num_keys, own = key_BKSE.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    query_BKGE = (query * (width**-0.5 if scaling is None else scaling)).view(rows, num_keys, -1, width)
    query_QJE = _to_prompts(query_BKGE, sharing)
    scores_BKGL = query.new_empty(rows, num_keys, heads // num_keys, num_shared + own, dtype=wide)
    scores_BKGL[..., :num_shared] = _to_rows(torch.bmm(query_QJE, shared.keys_UKPE.flatten(0, 1).transpose(1, 2)), sharing, num_keys)
    # Keys first: a product with few columns is about twice as fast as one with few rows.
    own_BKSG = torch.matmul(key_BKSE.flatten(0, 1), query_BKGE.flatten(0, 1).transpose(1, 2)).unflatten(0, (rows, num_keys))
    scores_BKGL[..., num_shared:] = own_BKSG.transpose(2, 3)
    additive = sharing.additive(mask, wide)
    if additive is not None:
        if additive.shape[-1] != num_shared + own:
            raise NotSharedError
        scores_BKGL += additive if additive.shape[1] == 1 else additive.unflatten(1, (num_keys, -1)).squeeze(3)
    weights_BKGL = scores_BKGL.softmax(-1).to(value_BKSE.dtype)
    out_QJE = torch.bmm(_to_prompts(weights_BKGL[..., :num_shared], sharing), shared.values_UKPE.flatten(0, 1))
    out_BKGE = _to_rows(out_QJE, sharing, num_keys)
    own_BKGE = torch.bmm(weights_BKGL[..., num_shared:].flatten(0, 1), value_BKSE.flatten(0, 1)).view(out_BKGE.shape)
    shared.is_used = True
    return own_BKGE.add_(out_BKGE).view(rows, 1, heads, -1)


def _to_prompts(rows_BKGX: Tensor, sharing: Sharing) -> Tensor:
    """(B, K, G, X) -> (U K, R G, X): what a prompt's rows ask of one key head is one matrix."""
    return sharing.by_prompt(rows_BKGX).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _to_rows(prompts_QJX: Tensor, sharing: Sharing, num_keys: int) -> Tensor:
    """(U K, R G, X) -> (B, K, G, X)."""
    return sharing.by_row(prompts_QJX.unflatten(0, (-1, num_keys)).unflatten(2, (sharing.most_rows, -1)).transpose(1, 2))
