"""Continuing a batch of prompts with transformers' `generate`, without what makes that slow.

Three things cost most where batches are long and answers end at different times: `DynamicCache` copies all keys and values at every token
(on a CPU the largest part of a step), finished answers are computed on until the last one ends, and a prompt that is answered several times
is read as often. Here keys and values are written into room that is set aside, finished rows leave, and equal prompts of a batch are read
once. None of it changes a token: attention sees the same keys, and rows do not see each other. docs/evaluation.md says what it gains.

Shape suffixes: B rows, K key heads, L tokens so far, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from orpo.inference.prefix import NotSharedError, Shared, Sharing, decoding_attention

GROWTH = 1.5
"""Room is made for so many times the tokens that are there."""
MIN_ROOM_TOKENS = 64
MIN_SHARED_TOKENS = 8
"""Shorter prompts are not worth a pass of their own."""
LEAVING_SHARE = 8
"""Finished rows leave when they are one in so many: each time costs a copy of some rows and a new start of `generate`."""


@dataclass(frozen=True, slots=True)
class Job:
    """How to continue prompts.

    Attributes:
        model: with transformers' `generate`.
        stop_ids: tokens that end an answer; the first one also pads.
        max_new_tokens: most tokens of an answer.
        limit: positions that the model has, None where that is unknown.
        noise: makes a processor of scores from the rows' seeds, or None for the likeliest token.
        on_token: told each new token of a single prompt as it comes.
    """

    model: Any
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    limit: int | None
    noise: Callable[[list[int]], Any] | None
    on_token: Callable[[int], None] | None = None

    def run(self, prompts: list[np.ndarray], seeds: list[int]) -> list[list[int]]:
        """New ids of each prompt, its stop token included and what follows it cut off."""
        from orpo.engine.shared import unwrap

        if len({prompt.tobytes() for prompt in prompts}) < len(prompts):
            with decoding_attention(unwrap(self.model)) as can_share:
                if can_share:
                    try:
                        return self._run(prompts, seeds, can_share=True)
                    except NotSharedError:  # before any answer is given
                        pass
        return self._run(prompts, seeds, can_share=False)

    def _run(self, prompts: list[np.ndarray], seeds: list[int], *, can_share: bool) -> list[list[int]]:
        ids, mask = self._padded(prompts)
        width = ids.shape[1]
        room = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - width)
        noise = None if self.noise is None else self.noise(seeds)
        cache = roomy_cache(self.model)
        sharing = self._read_once(prompts, ids, mask, cache, can_share)
        rows = list(range(len(prompts)))
        found: dict[int, list[int]] = {}
        while rows:
            ids = self._stretch(ids, mask, cache, width + room - ids.shape[1], noise, width)
            answers = [_until_stop(row, self.stop_ids) for row in ids[:, width:].tolist()]
            is_at_end = cache is None or ids.shape[1] == width + room
            kept = [] if is_at_end else [place for place, answer in enumerate(answers) if answer[-1] not in self.stop_ids]
            found |= {row: answer for place, (row, answer) in enumerate(zip(rows, answers, strict=True)) if place not in kept}
            rows = [rows[place] for place in kept]
            if rows and cache is not None:
                index = torch.tensor(kept, device=ids.device)
                for kept_too in (noise, sharing):
                    if kept_too is not None:
                        kept_too.select(kept)
                cache.batch_select_indices(index)
                ids = ids[index]
                mask = torch.cat([mask[index], mask.new_ones(len(kept), ids.shape[1] - mask.shape[1])], dim=1)
        return [found[row] for row in range(len(prompts))]

    def _padded(self, prompts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids and mask with the prompts at the right, shapes (B, L)."""
        device = next(self.model.parameters()).device
        width = max(len(ids) for ids in prompts)
        input_ids = torch.full((len(prompts), width), self.stop_ids[0], dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
            mask[row, width - len(ids) :] = 1
        return input_ids.to(device), mask.to(device)

    def _read_once(
        self, prompts: list[np.ndarray], ids: Tensor, mask: Tensor, cache: DynamicCache | None, can_share: bool
    ) -> Sharing | None:
        """Where prompts are there several times: fill the cache with each of them once, and hand its keys and values to all its rows.

        What is handed is shared where the model can, and copied elsewhere.

        The last token is left for `generate`, which needs one to go on from.
        """
        numbers: dict[bytes, int] = {}
        row_of = [numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt in prompts]
        if cache is None or len(numbers) == len(prompts) or ids.shape[1] < MIN_SHARED_TOKENS:
            return None
        first = torch.tensor([row_of.index(number) for number in range(len(numbers))], device=ids.device)
        # One token more, which nobody keeps: so positions and masks are those that `generate` makes for this model.
        self.model.generate(
            input_ids=ids[first, :-1],
            attention_mask=mask[first, :-1],
            generation_config=GenerationConfig(
                max_new_tokens=1, do_sample=False, eos_token_id=list(self.stop_ids), pad_token_id=self.stop_ids[0], use_cache=True
            ),
            past_key_values=cache,
        )
        rows = torch.tensor(row_of, device=ids.device)
        sharing = Sharing(row_of) if can_share else None
        for layer in cache.layers:
            if isinstance(layer, RoomyLayer):
                layer.spread(rows, sharing)
            else:
                layer.batch_select_indices(rows)
        return sharing

    def _stretch(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, room: int, noise: Any, width: int) -> Tensor:
        """Go on until enough rows have ended, all of them have, or there is no more room."""
        stops = list(self.stop_ids)
        leaving: list[StoppingCriteria] = [] if cache is None else [_EnoughEnded(ids, width, stops)]
        if self.on_token is not None:
            leaving.append(_Listening(self.on_token))
        return self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=room, do_sample=False, eos_token_id=stops, pad_token_id=stops[0], use_cache=True
            ),
            logits_processor=LogitsProcessorList([] if noise is None else [noise]),
            stopping_criteria=StoppingCriteriaList(leaving),
            **({} if cache is None else {"past_key_values": cache}),
        )


class _EnoughEnded(StoppingCriteria):
    """Stops all rows of a batch as soon as enough of them have ended."""

    def __init__(self, ids: Tensor, width: int, stops: list[int]) -> None:
        self.stops = torch.tensor(stops, device=ids.device)
        self.is_ended_B = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.num_enough = max(1, len(ids) // LEAVING_SHARE)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.is_ended_B |= torch.isin(input_ids[:, -1], self.stops)
        return (self.is_ended_B.sum() >= self.num_enough).expand(len(input_ids))


class _Listening(StoppingCriteria):
    """Stops nothing: it is what `generate` calls after every token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.on_token(int(input_ids[0, -1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def roomy_cache(model: Any) -> DynamicCache | None:
    """A cache for keys and values that does not move them at every token, or None for models with another kind of memory."""
    from orpo.engine.shared import unwrap

    core = unwrap(model)
    takes_cache = getattr(core, "_supports_default_dynamic_cache", lambda: False)()
    cache = DynamicCache(config=core.config.get_text_config(decoder=True)) if takes_cache else None
    # `type`, not `isinstance`: a subclass keeps its keys in a way of its own (quantized), which plain buffers would undo.
    if cache is None or not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, in buffers with room for more tokens: `keys` and `values` are views of what is filled.

    Attributes:
        shared: what rows of one prompt share (the prompt but for its last token), kept apart; None where each row has all of its own.
    """

    keys: Tensor
    values: Tensor
    shared: Shared | None = None
    _rooms: list[Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, shapes (B, K, L, E).

        Raises:
            NotSharedError: the model's attention did not read what is shared.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._begin(key_states, value_states)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._rooms[0].shape[2]:
            self._rooms = [_moved(filled, max(int(end * GROWTH), end + MIN_ROOM_TOKENS)) for filled in (self.keys, self.values)]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        if self.shared is not None:
            self.shared.offer(self.keys)
        return self.keys, self.values

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self._rooms = [self.keys, self.values]

    def get_seq_length(self) -> int:
        """Tokens of a row, shared ones included."""
        if not self.is_initialized:
            return 0
        return int(self.keys.shape[2]) + (0 if self.shared is None else self.shared.num_tokens)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in ascending order: they move up within the buffers."""
        end = self.keys.shape[2]
        for room in self._rooms:
            for target, source in enumerate(indices.tolist()):
                # Ascending: a row moves up to a place whose own row has moved already or has ended.
                if target != source:
                    room[target, :, :end] = room[source, :, :end]
        self._rooms = [room[: len(indices)] for room in self._rooms]
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        if self.shared is not None:
            self.shared.select()

    def spread(self, rows: Tensor, sharing: Sharing | None = None) -> None:
        """Make rows anew out of those that are there: row `i` has the tokens of `rows[i]`, as a copy or, with `sharing`, together."""
        if sharing is not None:
            self.shared = Shared(self.keys.contiguous(), self.values.contiguous(), sharing)
            self._begin(*(filled.new_empty(len(rows), filled.shape[1], 0, filled.shape[3]) for filled in (self.keys, self.values)))
            return
        end = self.get_seq_length()
        num_tokens = max(int(end * GROWTH), end + MIN_ROOM_TOKENS)
        self._rooms = [_moved(filled, num_tokens, rows) for filled in (self.keys, self.values)]
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)


def _moved(filled_BKLE: Tensor, num_tokens: int, rows: Tensor | None = None) -> Tensor:
    """A larger buffer that begins with what is there, of all rows or of those that are named."""
    num_rows, heads, length, width = filled_BKLE.shape
    room = filled_BKLE.new_empty(num_rows if rows is None else len(rows), heads, num_tokens, width)
    room[:, :, :length] = filled_BKLE if rows is None else filled_BKLE[rows]
    return room


def _until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((position + 1 for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
