"""Random token groups for tests of the engines and the trainer. A module, so that processes started by a test can import it too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orpo.data.types import Pairs, TokenGroup, Where

PAIR: Pairs = ((0, 1),)
SIX_PAIRS: Pairs = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def group(prompt: Sequence[int], *responses: Sequence[int], pairs: Pairs | None = None, row: int = 0) -> TokenGroup:
    """A group of the given ids; one pair for two responses, none for one, unless told otherwise."""
    if pairs is None:
        pairs = PAIR if len(responses) > 1 else ()
    ids = tuple(np.asarray(response, dtype=np.int32) for response in responses)
    return TokenGroup(np.asarray(prompt, dtype=np.int32), ids, pairs, (True,) * len(ids), Where("rows.jsonl", row))


def random_group(
    chance: np.random.Generator,
    *,
    vocab_size: int = 128,
    prompt: tuple[int, int] = (1, 14),
    answer: tuple[int, int] = (1, 12),
    kind: str = "pair",
) -> TokenGroup:
    """A group of random ids; lengths are drawn from half-open ranges.

    Args:
        kind: "pair", "sft" (one answer, no pair), "four" (four answers, six pairs) or "partial" (three answers, two pairs).
    """
    num_answers, pairs = {"pair": (2, PAIR), "sft": (1, ()), "four": (4, SIX_PAIRS), "partial": (3, ((0, 1), (2, 1)))}[kind]

    def ids(lengths: tuple[int, int]) -> list[int]:
        return chance.integers(3, vocab_size, size=chance.integers(*lengths)).tolist()

    return group(ids(prompt), *(ids(answer) for _ in range(num_answers)), pairs=pairs)


def random_groups(number: int, *, seed: int = 0, kinds: Sequence[str] = ("pair",), **lengths: tuple[int, int] | int) -> list[TokenGroup]:
    """Groups of the given kinds in turn."""
    chance = np.random.default_rng(seed)
    return [random_group(chance, kind=kinds[number % len(kinds)], **lengths) for number in range(number)]  # type: ignore[arg-type]


def as_pairs(item: TokenGroup) -> list[TokenGroup]:
    """The list of pairs that a group stands for."""
    return [group(item.prompt_ids, item.response_ids[chosen], item.response_ids[rejected]) for chosen, rejected in item.pairs]
