"""Drawing tokens, each row of a batch from a random stream of its own.

transformers draws for a whole batch from one stream, so that an answer would depend on its neighbours. Here a row's token is the largest of
log-probabilities plus Gumbel noise, which is a draw from the distribution, in two steps: first a block of the vocabulary by the blocks'
probabilities, then a token within it. So a draw takes a few hundred random numbers in place of one for every token, which would take
longer than a small model does. The noise belongs to blocks and tokens: where rounding moves probabilities a little, nearly all draws stay.

Shape suffixes: B rows, V vocabulary, N blocks, W tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_TOKENS = 256
NUM_LIKELIEST = 256
"""So many tokens hold `top_p` nearly always; they are found ten times as fast as all of them are sorted."""


class RowNoise:
    """Chooses each row's next token. A processor of scores for transformers' `generate`, which takes the largest of what it gives.

    Args:
        seeds: of the rows.
        temperature: divides the scores.
        top_p: draw from the likeliest tokens that together reach this probability.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def select(self, rows: list[int]) -> None:
        """Keep these rows."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One for the token that was drawn and zero for the others, shape (B, V); `scores` is written over."""
        scores_BV = scores.float()
        p_BV = scores_BV.div_(self.temperature).softmax(-1)
        if self.top_p < 1:
            p_BV.masked_fill_(is_unlikely(p_BV, self.top_p), 0.0)
        return scores_BV.zero_().scatter_(1, self._draw(p_BV), 1.0)

    def _draw(self, p_BV: Tensor) -> Tensor:
        """A token of each row, shape (B, 1); `p` need not sum to one."""
        size = p_BV.shape[-1]
        p_BN = _block_sums(p_BV)
        noise = self._noise(p_BN.shape[-1] + BLOCK_TOKENS).to(p_BV)
        block_B1 = (p_BN.log() + noise[:, :-BLOCK_TOKENS]).argmax(-1, keepdim=True)
        tokens_BW = block_B1 * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=p_BV.device)
        p_BW = p_BV.gather(1, tokens_BW.clamp(max=size - 1)).masked_fill_(tokens_BW >= size, 0.0)
        return tokens_BW.gather(1, (p_BW.log() + noise[:, -BLOCK_TOKENS:]).argmax(-1, keepdim=True))

    def _noise(self, count: int) -> Tensor:
        """Gumbel noise, on the processor whatever the model's device, so that a seed means the same everywhere."""
        # float32 is fine enough: of some hundred draws the least, which decides, is tens of thousands of its steps away from 0.
        uniform = torch.stack([torch.rand(count, generator=generator) for generator in self.generators])
        return uniform.log_().neg_().log_().neg_()


def _block_sums(p_BV: Tensor) -> Tensor:
    """Probabilities of the blocks; the last one may be shorter."""
    whole = p_BV.shape[-1] // BLOCK_TOKENS * BLOCK_TOKENS
    sums = p_BV[:, :whole].unflatten(1, (-1, BLOCK_TOKENS)).sum(-1)
    return sums if whole == p_BV.shape[-1] else torch.cat([sums, p_BV[:, whole:].sum(-1, keepdim=True)], dim=1)


def is_unlikely(p_BV: Tensor, top_p: float) -> Tensor:
    """Which tokens are not among the likeliest that together reach `top_p`; the one that crosses the line is, and what is as likely."""
    ordered = p_BV.topk(min(NUM_LIKELIEST, p_BV.shape[-1])).values
    cutoff = _last_kept(ordered, top_p)
    is_flat = ordered.sum(-1) < top_p
    if bool(is_flat.any()):
        cutoff[is_flat] = _last_kept(p_BV[is_flat].sort(-1, descending=True).values, top_p)
    return p_BV < cutoff


def _last_kept(ordered: Tensor, top_p: float) -> Tensor:
    """The probability of the token that crosses the line, of each row, from the likeliest on."""
    return ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, torch.inf).min(-1, keepdim=True).values
