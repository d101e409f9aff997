"""Log-probabilities of answers, by the engine that trains.

Shape suffixes: N predicted tokens, R responses of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from orpo.inference.compute import inference

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orpo.data.types import TokenGroup
    from orpo.engine.choose import Engine

MAX_TOKENS = 4096
"""Packed tokens of a micro-batch. Changes no result."""

TokenScores = list[tuple[np.ndarray, ...]]
"""Per group, per response: float32 log-probabilities of the response's tokens in nats, its terminator included."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def score_groups(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    *,
    engine: Engine | None = None,
    nll_scope: str = "response",
    max_tokens: int = MAX_TOKENS,
    budget_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Mean log-probability per token of every response.

    Args:
        model: the causal language model, on its device. Comes back as it was.
        groups: what to score.
        engine: the run's own; None chooses one as training does (the shared one, unless it disagrees with the padded one).
        nll_scope: "response" computes the output head for answer tokens only; "sequence" for prompt tokens too. The same scores.
        max_tokens: packed tokens of a micro-batch.
        budget_bytes: most memory of vocabulary-sized tensors; None for the engine's own.
        compute_dtype: None computes in the weights' dtype; bfloat16 is faster, and good to about 0.01 nats in a mean.
        progress: called with (groups done, groups).

    Returns:
        One float64 array of shape (R,) per group, in order, nats per token.

    Example: preferences of a file, as ids, through a model.

        >>> from orpo.data.formats import load_preferences
        >>> from orpo.data.template import TemplateEncoder
        >>> from orpo.evaluate.pairs import score_groups
        >>> from orpo.models.load import load_model
        >>> model, tokenizer, facts = load_model("model", device="cpu")
        >>> preferences, _, _ = load_preferences("pairs.jsonl")
        >>> groups = TemplateEncoder(tokenizer).encode_many(preferences)
        >>> scores = score_groups(model, groups)
        >>> len(scores), scores[0].shape, scores[0].dtype.name
        (12, (2,), 'float64')
    """
    tokens = score_tokens(
        model,
        groups,
        engine=engine,
        nll_scope=nll_scope,
        max_tokens=max_tokens,
        budget_bytes=budget_bytes,
        compute_dtype=compute_dtype,
        progress=progress,
    )
    return [np.array([logps.mean(dtype=np.float64) for logps in responses]) for responses in tokens]


def score_tokens(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    *,
    engine: Engine | None = None,
    nll_scope: str = "response",
    max_tokens: int = MAX_TOKENS,
    budget_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Log-probability of every token of every response; arguments as for `score_groups`.

    Raises:
        UserError: a token has no row of the model's embeddings.
    """
    from orpo.engine.packing import pack

    if not groups:
        return []
    _require_rows(model, groups)
    found: list[tuple[np.ndarray, ...] | None] = [None] * len(groups)
    device = next(model.parameters()).device
    with _own_attention(model) as use_attention:
        if engine is None:
            engine = choose_scoring_engine(model, groups, nll_scope=nll_scope)
        if budget_bytes is not None:
            engine = replace(engine, budget_bytes=budget_bytes)
        use_attention(engine)
        num_done = 0
        costs = [_cost(group, engine) for group in groups]
        with inference(model, compute_dtype):
            for rows in pack(costs, num_ranks=1, max_rows=len(groups), max_tokens=max_tokens):
                answers = _score_batch(model, [groups[row] for row in rows], engine, nll_scope, device)
                for row, responses in zip(rows, answers, strict=True):
                    found[row] = responses
                num_done += len(rows)
                if progress is not None:
                    progress(num_done, len(groups))
    return [responses for responses in found if responses is not None]


def choose_scoring_engine(model: nn.Module, groups: Sequence[TokenGroup], *, nll_scope: str = "response") -> Engine:
    """The engine that `score_tokens` chooses by itself, for callers that score in pieces. The model comes back as it was."""
    from orpo.engine.choose import choose
    from orpo.objective import SFT

    _require_rows(model, groups)
    # In the weights' own dtype: bf16's rounding would drown what the check looks for.
    with _own_attention(model), inference(model):
        return choose(model, groups, SFT(), nll_scope=nll_scope)


def _require_rows(model: nn.Module, groups: Sequence[TokenGroup]) -> None:
    from orpo.engine.shared import unwrap
    from orpo.models.newtokens import require_rows

    def largest(group: TokenGroup) -> int:
        return max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids) if len(ids))

    worst = max(groups, key=largest)
    require_rows(unwrap(model), [largest(worst)], where=str(worst.where))


def _score_batch(
    model: nn.Module, groups: list[TokenGroup], engine: Engine, nll_scope: str, device: torch.device
) -> list[tuple[np.ndarray, ...]]:
    from orpo.engine.layout import collate
    from orpo.objective import SFT

    batch = collate(groups, nll_scope)
    logp_N = engine.step(model, batch.to(device), SFT()).logp_N.float().cpu().numpy()
    response_N = batch.index.response_N.numpy()
    answers = iter(np.split(logp_N[response_N >= 0], np.cumsum([len(ids) for group in groups for ids in group.response_ids])[:-1]))
    return [tuple(next(answers) for _ in group.response_ids) for group in groups]


def _cost(group: TokenGroup, engine: Engine) -> int:
    """Tokens that a group takes in a micro-batch of this engine."""
    if engine.name == "shared":
        return group.num_tokens
    return len(group.response_ids) * group.longest_tokens


@contextmanager
def _own_attention(model: nn.Module) -> Iterator[Callable[[Engine], None]]:
    """Gives a function that puts the engine's attention on the model; the model's own comes back at the end."""
    from orpo.engine import attention
    from orpo.engine.shared import unwrap

    core = unwrap(model)
    before = getattr(getattr(core, "config", None), "_attn_implementation", None) or "sdpa"

    def use(engine: Engine) -> None:
        if engine.name == "shared":
            attention.register()
            core.set_attn_implementation(attention.NAME)
        elif before == attention.NAME:
            core.set_attn_implementation("sdpa")

    try:
        yield use
    finally:
        if hasattr(core, "set_attn_implementation"):
            core.set_attn_implementation(before)
