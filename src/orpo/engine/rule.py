"""How one call of attention weighs its keys: what its scores are multiplied by, how far they reach, what bends them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRule:
    """What a model's attention asks for beside queries, keys and values.

    Attributes:
        scale: of the scores, before anything else happens to them.
        window: a row sees itself and this many positions less one before it; None: all.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        sinks_H: one more score per query head, for a key without a value (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """A softmax of scaled scores and nothing else."""
        return self.softcap is None and self.sinks_H is None
