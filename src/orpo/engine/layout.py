"""A micro-batch as one packed row: where each segment lies, what it may look at, and which hidden state predicts which token.

A group is a prompt segment followed by its response segments. Every response sees its own prompt and itself; positions restart after
the prompt, so to the model each response reads as if it stood directly behind the prompt. The prompt is thereby computed once for all
its responses, and nothing is padded. Pure index arithmetic: no model, no attention, no data format.

(Sharing prefixes between chosen and rejected answers was published for DPO on GPUs in arXiv 2410.20305.)

Shape suffixes: T packed tokens, N predicted tokens, R responses, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from orpo.data.types import TokenGroup
from orpo.objective import ResponseIndex


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed rows [start, end) that see rows [prefix_start, prefix_end) and, causally, themselves."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def num_prefix(self) -> int:
        return self.prefix_end - self.prefix_start


@dataclass(eq=False)
class PackedLayout:
    """What attention needs to know of a packed row. Travels as a keyword argument of the model's forward."""

    segments: tuple[Segment, ...]
    kernel: str = "sdpa"
    """What computes it (`orpo.engine.kernels`)."""
    cache: dict[object, object] = field(default_factory=dict, repr=False)
    """Masks and plans, made once per micro-batch and shared by the layers."""
    handle: Tensor | None = None
    """The number under which `orpo.engine.opaque` keeps it, where layers are compiled."""
    windows: set[int | None] = field(default_factory=set, repr=False)
    """Sliding windows that attention was called with, for the check at the start of a run."""

    @classmethod
    def of(cls, groups: Iterable[Sequence[int]], kernel: str = "sdpa") -> PackedLayout:
        """The layout of groups side by side, each given by its lengths: tokens of the prompt, then of each answer."""
        segments: list[Segment] = []
        end = 0
        for num_prompt, *answers in groups:
            start, prompt_end = end, end + num_prompt
            segments.append(Segment(start, prompt_end, start, start))
            end = prompt_end
            for length in answers:
                segments.append(Segment(end, end + length, start, prompt_end))
                end += length
        return cls(tuple(segments), kernel=kernel)

    @property
    def num_rows(self) -> int:
        """Packed rows, without what a kernel pads them with."""
        return self.segments[-1].end

    def table(self, num_rows: int) -> np.ndarray:
        """(its segment's start, its prefix's start and end, its position) of every row, int32, shape (4, num_rows).

        A row of padding, behind the last segment, is a segment of itself.
        """
        padding = np.arange(self.num_rows, num_rows)
        # The last column is an offset: a row's position is its place in the pack plus this, since positions go on behind the prefix.
        columns = np.array([(s.start, s.prefix_start, s.prefix_end, s.num_prefix - s.start) for s in self.segments]).T
        lengths = [s.end - s.start for s in self.segments]
        table = np.concatenate([np.repeat(columns, lengths, axis=1), np.stack([padding, padding, padding, -padding])], axis=1)
        table[3] += np.arange(num_rows)
        return table.astype(np.int32)


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a batch that one group owns: predicted tokens, responses, pairs, as half-open ranges."""

    n: tuple[int, int]
    r: tuple[int, int]
    b: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch:
    """A micro-batch: the packed row, the predictions to score, and the pairs.

    Attributes:
        groups: the token groups, for the padded engine and for messages.
        input_ids_T, position_ids_T: int64.
        layout: what attention may see.
        source_N: packed row whose hidden state predicts the token; target_N: the token's id. In group order; inside a group the
            counted prompt tokens first, then each response.
        index: for the objective.
        spans: per group.
        token_weight: what a packed token counts in the router's loss: 1 / packed tokens of the optimizer step, 0 in a filler.

    Example: `batch` is that of `collate`.

        >>> batch.num_tokens, batch.index.num_nll_tokens, batch.index.num_pairs
        (8, 4.0, 1.0)
        >>> batch.with_normalisers(num_nll_tokens=16, num_pairs=4).index.num_pairs  # of a step of four such micro-batches
        4
    """

    groups: tuple[TokenGroup, ...]
    input_ids_T: Tensor
    position_ids_T: Tensor
    layout: PackedLayout
    source_N: Tensor
    target_N: Tensor
    index: ResponseIndex
    spans: tuple[Span, ...]
    token_weight: float

    @property
    def num_tokens(self) -> int:
        """Packed tokens."""
        return int(self.input_ids_T.shape[0])

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> PreferenceBatch:
        """The same batch in memory that a GPU copies from by itself."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> PreferenceBatch:
        index = self.index
        reference_R = index.reference_logp_sum_R
        moved = replace(
            index,
            response_N=move(index.response_N),
            nll_weight_N=move(index.nll_weight_N),
            num_tokens_R=move(index.num_tokens_R),
            chosen_B=move(index.chosen_B),
            rejected_B=move(index.rejected_B),
            reference_logp_sum_R=None if reference_R is None else move(reference_R),
        )
        return replace(
            self,
            input_ids_T=move(self.input_ids_T),
            position_ids_T=move(self.position_ids_T),
            source_N=move(self.source_N),
            target_N=move(self.target_N),
            index=moved,
        )

    def with_normalisers(self, num_nll_tokens: float, num_pairs: float, num_tokens: float | None = None) -> PreferenceBatch:
        """The same batch, normalised by the counts of a whole optimizer step; `num_tokens` are packed ones, unset: its own."""
        # 0 stays 0: a filler is there to keep ranks in step and counts for nothing.
        weight = self.token_weight if num_tokens is None or not self.token_weight else 1.0 / num_tokens
        index = replace(self.index, num_nll_tokens=num_nll_tokens, num_pairs=num_pairs)
        return replace(self, index=index, token_weight=weight)

    def part(self, first: int, last: int) -> tuple[slice, ResponseIndex]:
        """Predicted tokens and index of the groups [first, last), renumbered to stand alone. Normalisers stay the step's."""
        start, end = self.spans[first], self.spans[last - 1]
        n, r, b = slice(start.n[0], end.n[1]), slice(start.r[0], end.r[1]), slice(start.b[0], end.b[1])
        index = self.index
        response_N = index.response_N[n]
        reference_R = index.reference_logp_sum_R
        return n, replace(
            index,
            response_N=torch.where(response_N < 0, response_N, response_N - r.start),  # negative: a token of the prompt
            nll_weight_N=index.nll_weight_N[n],
            num_tokens_R=index.num_tokens_R[r],
            chosen_B=index.chosen_B[b] - r.start,
            rejected_B=index.rejected_B[b] - r.start,
            reference_logp_sum_R=None if reference_R is None else reference_R[r],
        )


def num_nll_tokens(group: TokenGroup, nll_scope: str) -> int:
    """How many tokens the group counts in the next-token loss. The first token of a sequence is predicted by nothing."""
    wins = group.num_wins
    answers = sum(win * len(ids) for win, ids in zip(wins, group.response_ids, strict=True))
    prompt = sum(wins) * (len(group.prompt_ids) - 1) if nll_scope == "sequence" else 0
    return answers + prompt


class _Builder:
    """Grows the arrays of a batch group by group."""

    def __init__(self, nll_scope: str) -> None:
        self.nll_scope = nll_scope
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.sources: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.responses: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.spans: list[Span] = []
        self.num_rows = self.num_predicted = 0

    def add(self, group: TokenGroup) -> None:
        if not all(map(len, (group.prompt_ids, *group.response_ids))):
            raise ValueError(f"{group.where}: a prompt or an answer has no token")
        first_n, first_r, first_b = self.num_predicted, len(self.lengths), len(self.pairs)
        wins = group.num_wins
        num_prompt = len(group.prompt_ids)
        prompt_start = self.num_rows
        self._segment(group.prompt_ids, np.arange(num_prompt))
        if self.nll_scope == "sequence":
            rows = np.arange(prompt_start, prompt_start + num_prompt - 1)
            # As if each winning answer stood behind a prompt of its own, which is what the padded rows of the paper are.
            self._predict(rows, group.prompt_ids[1:], response=-1, weight=float(sum(wins)))
        for ids, num_wins in zip(group.response_ids, wins, strict=True):
            start = self.num_rows
            self._segment(ids, np.arange(num_prompt, num_prompt + len(ids)))
            # The prompt's last row predicts the first token of every response.
            rows = np.concatenate([[prompt_start + num_prompt - 1], np.arange(start, start + len(ids) - 1)])
            self._predict(rows, ids, response=len(self.lengths), weight=float(num_wins))
            self.lengths.append(len(ids))
        self.pairs.extend((first_r + chosen, first_r + rejected) for chosen, rejected in group.pairs)
        self.spans.append(Span((first_n, self.num_predicted), (first_r, len(self.lengths)), (first_b, len(self.pairs))))

    def _segment(self, ids: np.ndarray, positions: np.ndarray) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.num_rows += len(ids)

    def _predict(self, rows: np.ndarray, targets: np.ndarray, *, response: int, weight: float) -> None:
        self.sources.append(rows)
        self.targets.append(targets)
        self.responses.append(np.full(len(rows), response))
        self.weights.append(np.full(len(rows), weight, dtype=np.float32))
        self.num_predicted += len(rows)


def collate(groups: Sequence[TokenGroup], nll_scope: str = "sequence") -> PreferenceBatch:
    """Pack groups into one micro-batch, normalised by its own counts (`with_normalisers` sets the step's).

    Args:
        groups: at least one.
        nll_scope: "sequence" counts prompt and chosen tokens in the next-token loss (paper, TRL), "response" the chosen ones only.

    Returns:
        The batch on the CPU; ids int64, weights float32.

    Raises:
        ValueError: no group, or one with an empty prompt or answer.

    Example: `group` is that of `TokenGroup`. Eight packed tokens; all but the first of the prompt are predicted.

        >>> from orpo.engine.layout import collate
        >>> batch = collate([group])
        >>> batch.input_ids_T.tolist(), batch.position_ids_T.tolist()
        ([5, 6, 7, 8, 2, 9, 10, 2], [0, 1, 2, 3, 4, 3, 4, 5])
        >>> batch.index.response_N.tolist()
        [-1, -1, 0, 0, 1, 1, 1]
    """
    if not groups:
        raise ValueError("a batch needs at least one group")
    builder = _Builder(nll_scope)
    for group in groups:
        builder.add(group)
    pairs = np.asarray(builder.pairs, dtype=np.int64).reshape(-1, 2)
    references = [value for group in groups for value in (group.reference_logp_sums or ())]
    index = ResponseIndex(
        response_N=_long(builder.responses),
        nll_weight_N=torch.from_numpy(np.concatenate(builder.weights)),
        num_tokens_R=torch.tensor(builder.lengths, dtype=torch.float32),
        chosen_B=torch.from_numpy(pairs[:, 0].copy()),
        rejected_B=torch.from_numpy(pairs[:, 1].copy()),
        num_nll_tokens=float(sum(num_nll_tokens(group, nll_scope) for group in groups)),
        num_pairs=float(len(pairs)),
        # None unless every answer has one: the sums of some would stand at the wrong answers.
        reference_logp_sum_R=torch.tensor(references, dtype=torch.float32) if len(references) == len(builder.lengths) else None,
    )
    return PreferenceBatch(
        groups=tuple(groups),
        input_ids_T=_long(builder.ids),
        position_ids_T=_long(builder.positions),
        layout=PackedLayout.of([len(group.prompt_ids), *map(len, group.response_ids)] for group in groups),
        source_N=_long(builder.sources),
        target_N=_long(builder.targets),
        index=index,
        spans=tuple(builder.spans),
        token_weight=1.0 / builder.num_rows,
    )


def one_by_one(batch: PreferenceBatch, nll_scope: str) -> list[PreferenceBatch]:
    """The groups of a batch as batches of their own, normalised together; on the same device."""
    counts = batch.index.num_nll_tokens, batch.index.num_pairs, 1.0 / batch.token_weight
    return [collate([group], nll_scope).to(batch.input_ids_T.device).with_normalisers(*counts) for group in batch.groups]


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device; to a GPU it goes through pinned memory, so that nobody waits for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _long(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


@dataclass(frozen=True, slots=True)
class RouterResult:
    """One micro-batch's routing to experts.

    Attributes:
        loss: float32 scalar with a graph to the model; this micro-batch's part of the step's auxiliary loss, before the coefficient.
        load_YE: how many tokens chose each expert, per layer with a router; detached.
    """

    loss: Tensor
    load_YE: Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """One micro-batch through an engine.

    Attributes:
        loss: float32 scalar with a graph to the model; this micro-batch's part of the optimizer step's loss.
        logp_N: float32 token log-probabilities in the batch's order, detached.
        sums: float64, the names of `orpo.objective.METRICS`.
        router: of a mixture of experts; `loss` has its part with its coefficient already.

    Example: `model` and `batch` are those of `padded.step`.

        >>> result = padded.step(model, batch, ORPO())
        >>> result.logp_N.shape, result.sums.dtype
        (torch.Size([7]), torch.float64)
    """

    loss: Tensor
    logp_N: Tensor
    sums: Tensor
    router: RouterResult | None = None
