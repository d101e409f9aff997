"""Answers from a model: batched, greedy or sampled, from the very ids and to the very stop tokens of training.

What a prompt is answered with does not depend on what else is in the batch, as far as floating point allows: padding is masked, and every
prompt draws from a random stream of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.errors import UserError
from orpo.inference.compute import inference

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orpo.data.template import TemplateEncoder
    from orpo.data.types import Text
    from orpo.inference.noise import RowNoise

STOP, LENGTH, TOO_LONG = "stop", "length", "prompt_too_long"
BATCH_SIZE = 64
"""Large, since answers that have ended leave the batch."""
_MAX_CACHE_BYTES = 4 * 2**30
"""Most memory for the keys and values of a batch, padding included."""
_USUAL_TOKEN_BYTES = 128 * 2**10
"""Keys and values of a token in a model of 7 billion parameters: where a model's own cannot be told from its configuration."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer.

    Attributes:
        text: without the tokens that ended it.
        num_tokens: generated tokens, the terminator included.
        finish: "stop" (the model ended its turn), "length" (cut at `max_new_tokens`), or "prompt_too_long" for the model's context: then
            nothing was generated.

    Example: `answer` is that of `generate`.

        >>> sorted(answer.to_dict())
        ['finish', 'num_tokens', 'text']
    """

    text: str
    num_tokens: int
    finish: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def generate(
    model: nn.Module,
    tokenizer: Any,
    encoder: TemplateEncoder,
    prompts: Sequence[Text | np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[int, Answer], None] | None = None,
    occurrences: Sequence[int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer every prompt.

    Args:
        model: a causal language model, adapted or not. Comes back as it was.
        tokenizer: turns ids into text.
        encoder: the run's: template and stop tokens are taken from it.
        prompts: texts, messages, or ids that the encoder has made (of a prompt with tools). One that comes several times is read once.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        top_p: sample from the likeliest tokens that together reach this probability.
        seed: of the samples. A prompt that is given several times is answered differently each time.
        batch_size: most prompts at a time; fewer where their keys and values would take too much memory.
        compute_dtype: None for the weights' own; bfloat16 is about twice as fast on float32 weights.
        progress: called with (answers done, prompts).
        each: called with (prompt's number, answer) as soon as it is there.
        on_token: of a single prompt: told each new token as it comes, the one that ends the answer included.
        occurrences: how often each prompt came before, where these prompts are part of a longer list; None counts here.

    Returns:
        Answers in the order of the prompts.

    Raises:
        UserError: an option is out of range, or a token of a prompt has no row of the model's embeddings.

    Example:
        >>> from orpo.inference.generate import generate  # and model and tokenizer as of `score_groups`
        >>> (answer,) = generate(model, tokenizer, TemplateEncoder(tokenizer), ["What is the weather like?"], max_new_tokens=4)
        >>> answer.finish in ("stop", "length"), answer.num_tokens <= 4
        (True, True)
    """
    from orpo.inference.decode import Job

    check_generation(max_new_tokens, temperature, top_p, batch_size)
    ids = _prompt_ids(model, tokenizer, encoder, prompts)
    limit = _context_tokens(model)
    found: dict[int, Answer] = {}

    def keep(row: int, answer: Answer) -> None:
        found[row] = answer
        if each is not None:
            each(row, answer)

    todo = _that_fit(ids, limit, lambda row: keep(row, Answer("", 0, TOO_LONG)))
    seeds = _stream_seeds(ids, seed, count_occurrences(ids) if occurrences is None else occurrences)
    job = Job(model, encoder.terminator_ids, max_new_tokens, limit, _noise(temperature, top_p), on_token)
    with _decoding(model, compute_dtype, max_new_tokens):
        max_tokens = _MAX_CACHE_BYTES // _token_bytes(model, compute_dtype)
        for rows in _batches(todo, [len(one) for one in ids], batch_size, max_tokens, max_new_tokens, limit):
            for row, tokens in zip(rows, job.run([ids[row] for row in rows], [seeds[row] for row in rows]), strict=True):
                keep(row, _answer(tokenizer, tokens, encoder.terminator_ids))
            if progress is not None:
                progress(len(found), len(ids))
    return [found[row] for row in range(len(ids))]


def _that_fit(ids: Sequence[np.ndarray], limit: int | None, too_long: Callable[[int], None]) -> list[int]:
    """Rows that leave room for an answer, the longest first; `too_long` is told the others."""
    todo = generation_order(ids)
    for row in todo:
        if limit and len(ids[row]) >= limit:
            too_long(row)
    return [row for row in todo if not limit or len(ids[row]) < limit]


def _noise(temperature: float, top_p: float) -> Callable[[list[int]], RowNoise] | None:
    """What makes a batch's noise from its rows' seeds; None where the likeliest token is taken."""
    from orpo.inference.noise import RowNoise

    return None if temperature == 0 else partial(RowNoise, temperature=temperature, top_p=top_p)


def _prompt_ids(model: nn.Module, tokenizer: Any, encoder: TemplateEncoder, prompts: Sequence[Text | np.ndarray]) -> list[np.ndarray]:
    from orpo.engine.shared import unwrap
    from orpo.models.newtokens import require_rows

    ids = [prompt if isinstance(prompt, np.ndarray) else encoder.prompt_ids(prompt) for prompt in prompts]
    require_rows(unwrap(model), [int(one.max()) for one in ids if len(one)], where="the prompt", tokenizer=tokenizer)
    return ids


def check_generation(max_new_tokens: int, temperature: float, top_p: float, batch_size: int = 1) -> None:
    """Options of `generate`.

    Raises:
        UserError: one is out of range.
    """
    ranges = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "temperature": (temperature, 0 <= temperature < float("inf"), "0 (the likeliest token) or more"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0, at most 1"),
        "batch_size": (batch_size, batch_size >= 1, "at least 1"),
    }
    for name, (value, is_right, expected) in ranges.items():
        if not is_right:
            raise UserError(f"found {value:g}", where=name, expected=expected)


def _context_tokens(model: nn.Module) -> int | None:
    """Most positions that the model has."""
    from orpo.engine.shared import unwrap

    config = unwrap(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def generation_order(ids: Sequence[np.ndarray]) -> list[int]:
    """The rows, longest prompts first; equal ones stand together, so that they meet in a batch."""
    first: dict[bytes, int] = {}
    for row, one in enumerate(ids):
        first.setdefault(one.tobytes(), row)
    return sorted(range(len(ids)), key=lambda row: (-len(ids[row]), first[ids[row].tobytes()], row))


def count_occurrences(ids: Sequence[np.ndarray]) -> list[int]:
    """How often each prompt came before in the list."""
    seen: Counter[bytes] = Counter()
    found = []
    for one in ids:
        content = one.tobytes()
        found.append(seen[content])
        seen[content] += 1
    return found


def _stream_seeds(ids: Sequence[np.ndarray], seed: int, occurrences: Sequence[int]) -> list[int]:
    """A seed per prompt from its ids and how often it came before: independent of the batch and of the other prompts."""
    found = []
    for one, occurrence in zip(ids, occurrences, strict=True):
        digest = hashlib.sha256(f"{seed}:{occurrence}:".encode() + one.astype("<i4").tobytes()).digest()
        found.append(int.from_bytes(digest[:8], "little") >> 1)
    return found


def _token_bytes(model: nn.Module, compute_dtype: torch.dtype | None) -> int:
    """Keys and values of one token, all layers."""
    from orpo.engine.shared import unwrap

    config = unwrap(model).config.get_text_config()
    dtype = compute_dtype or next(model.parameters()).dtype
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return max(1, int(2 * config.num_hidden_layers * heads * width * dtype.itemsize))
    except (AttributeError, TypeError):  # another architecture
        return _USUAL_TOKEN_BYTES


def _batches(
    rows: Sequence[int], lengths: Sequence[int], batch_size: int, max_tokens: int, max_new_tokens: int, limit: int | None
) -> Iterator[list[int]]:
    """Runs of rows of about the same size, longest prompts first: little padding, and a lack of memory shows at once.

    A prompt whose answer may come up against the end of the model's context is alone, so that it shortens nobody else's.
    """
    start = 0
    while start < len(rows):
        width = lengths[rows[start]] + max_new_tokens
        fitting = 1 if limit is not None and width > limit else max(1, max_tokens // width)
        num_left = len(rows) - start
        num_batches = -(-num_left // min(batch_size, fitting))
        end = start + (1 if fitting == 1 else -(-num_left // num_batches))
        yield list(rows[start:end])
        start = end


@contextmanager
def _decoding(model: nn.Module, compute_dtype: torch.dtype | None, max_new_tokens: int) -> Iterator[None]:
    """The model as it decodes."""
    from orpo.inference.packed import packed_linears

    with inference(model, compute_dtype), packed_linears(model, max_new_tokens), _plain_generation_config(model):
        yield


@contextmanager
def _plain_generation_config(model: nn.Module) -> Iterator[None]:
    """A model's own generation_config (repetition penalty, sampling, stop tokens) would mix with what is asked for here."""
    from transformers import GenerationConfig

    from orpo.engine.shared import unwrap

    core = unwrap(model)
    before, core.generation_config = core.generation_config, GenerationConfig()
    try:
        yield
    finally:
        core.generation_config = before


def _answer(tokenizer: Any, ids: list[int], stop_ids: tuple[int, ...]) -> Answer:
    is_stopped = bool(ids) and ids[-1] in stop_ids
    text = tokenizer.decode(ids[:-1] if is_stopped else ids, skip_special_tokens=True)
    return Answer(text, len(ids), STOP if is_stopped else LENGTH)
