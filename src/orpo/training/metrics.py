"""The numbers that a run logs: exact means since the last log, from plain sums, at one reduction per log.

Names are TRL's. Two of them are traps that are kept: `log_odds_ratio` is the mean of log sigmoid(log OR), and `log_odds_chosen` the mean
of log OR itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from orpo.engine.layout import sent
from orpo.objective import METRICS

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from orpo.engine.layout import PreferenceBatch, RouterResult
    from orpo.run.folder import MetricsLog
    from orpo.training.steps import StepBatch

_EXTRAS = ("loss_sum", "num_steps", "num_tokens", "num_rows", "end_logp_sum", "num_ends", "aux_loss_sum", "num_skipped")
"""Added up beside `METRICS`: step losses, steps, packed tokens and rows, terminators of chosen answers and their log-probabilities, the
router's loss, steps that fp16's scaler left out."""


class MetricSums:
    """Adds up what steps report until somebody asks for the means. A step counts once it has ended: one that an exception cuts short is
    forgotten with the next `start`.

    What the sums of all ranks add up to does not depend on the number of ranks, so they may be handed to another number of them.

    Args:
        device: where the sums are kept.
        world_size: ranks that share each step.
    """

    def __init__(self, device: torch.device, *, world_size: int = 1) -> None:
        self.world_size = world_size
        self._weights = _weights_of(world_size).to(device)
        # Millions of tokens between two logs: in float32 the last ones would no longer change the sum.
        self.values = torch.zeros(len(METRICS) + len(_EXTRAS), dtype=torch.float64, device=device)
        self.load_YE: Tensor | None = None
        """Tokens that chose each expert of each layer; None where there are no experts."""
        self.is_scaled = False
        self.busy_s = 0.0
        self._started_s: float | None = None
        self._step, self._newest = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self._step_load_YE: Tensor | None = None

    def clear(self) -> None:
        """Forget what has been added up, of a training that ended before its log."""
        self.values.zero_()
        self.load_YE = None
        self.busy_s = 0.0
        self._forget_step()

    def _forget_step(self) -> None:
        self._step.zero_()
        self._step_load_YE = None

    def start(self) -> None:
        """A step begins: time runs until `stop`, so evaluation and saving are not counted against throughput."""
        self._started_s = time.perf_counter()
        self._forget_step()

    def stop(self) -> None:
        """A step has ended."""
        if self._started_s is not None:
            self.busy_s += time.perf_counter() - self._started_s
            self._started_s = None

    def add(self, sums: Tensor, *, num_tokens: int, end_logps: Tensor | None = None) -> None:
        """A micro-batch's sums, in the order of `METRICS`, its packed tokens, and its chosen terminators' log-probabilities."""
        self._step[: len(METRICS)] += sums.to(self.values) * self._weights
        self._step[len(METRICS) + 2] += num_tokens
        if end_logps is not None:
            self._step[len(METRICS) + 4] += end_logps.to(self.values).sum()
            self._step[len(METRICS) + 5] += end_logps.numel()

    def add_routing(self, routed: RouterResult | None) -> None:
        """A micro-batch's routing to experts, if it has any."""
        if routed is None:
            return
        self._step[len(METRICS) + 6] += routed.loss.to(self.values) / self.world_size
        self._step_load_YE = _added(self._step_load_YE, routed.load_YE.to(self.values))

    def add_skipped(self, is_skipped: bool) -> None:
        """Whether fp16's scaler leaves this step out; called where there is one."""
        self.is_scaled = True
        self.values[len(METRICS) + 7] += float(is_skipped) / self.world_size

    def end_step(self, loss: Tensor, num_rows: int) -> None:
        """An optimizer step is done: this rank's loss, whose mean over ranks is the step's, and the rows of the whole step."""
        # A share from each rank, so that the sum over ranks counts the step once, whoever adds it up.
        self._step[len(METRICS)] += loss.to(self.values) / self.world_size
        self._step[len(METRICS) + 1] += 1 / self.world_size
        self._step[len(METRICS) + 3] += num_rows / self.world_size
        self.values += self._step
        if self._step_load_YE is not None:
            self.load_YE = _added(self.load_YE, self._step_load_YE)
        self._newest.copy_(self._step)
        self._forget_step()

    def newest_nll(self) -> Tensor:
        """Mean next-token loss of this rank's tokens in the newest step, nats, on the device; NaN where it had none."""
        return self._newest[METRICS.index("nll_sum")] / self._newest[METRICS.index("num_nll_tokens")]

    def take(self, *, reward_scale: float | None, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, over all ranks; starts anew. `reduce` sums a tensor over ranks. Empty if nothing was added."""
        values = reduce(self.values).tolist()
        load_YE = None if self.load_YE is None else reduce(self.load_YE)
        self.values.zero_()
        self.load_YE = None
        busy_s, self.busy_s = self.busy_s, 0.0
        totals = dict(zip((*METRICS, *_EXTRAS), values, strict=True))
        if not totals["num_steps"]:
            return {}
        logs = means(totals, reward_scale=reward_scale)
        logs["loss"] = totals["loss_sum"] / totals["num_steps"]
        if totals["num_ends"]:
            logs["logps/end"] = totals["end_logp_sum"] / totals["num_ends"]
        if load_YE is not None:
            logs["aux_loss"] = totals["aux_loss_sum"] / totals["num_steps"]
            logs |= balance_of(load_YE)
        if self.is_scaled:
            logs["skipped_steps"] = totals["num_skipped"]
        if busy_s > 0:
            logs["tokens_per_second"] = totals["num_tokens"] / busy_s
            logs["pairs_per_second"] = totals["num_pairs"] / busy_s
        return logs

    def state(self) -> dict[str, object]:
        """For a checkpoint; restored by `restore`, so that the log after a resume is the uninterrupted run's."""
        load = None if self.load_YE is None else self.load_YE.tolist()
        return {"values": self.values.tolist(), "load": load, "busy_s": self.busy_s, "is_shared": True}

    def restore(self, states: Sequence[dict[str, Any]], *, rank: int = 0) -> None:
        """Put back what `state` gave on each rank of the run that saved; this rank takes over what no rank of its number is left for."""
        self.clear()
        for state in states[rank :: self.world_size]:
            values = torch.zeros(len(self.values), dtype=torch.float64)
            saved = torch.tensor(state["values"], dtype=torch.float64)
            values[: len(saved)] = saved  # earlier versions kept fewer
            if not state.get("is_shared"):  # version 0.1.0 counted every step on every rank
                values[: len(METRICS)] *= _weights_of(len(states))
                values[len(METRICS) + 1] /= len(states)
            self.values += values.to(self.values.device)
            if state.get("load") is not None:
                self.load_YE = _added(self.load_YE, torch.tensor(state["load"], dtype=torch.float64).to(self.values))
        self.busy_s = float(states[min(rank, len(states) - 1)]["busy_s"])


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _weights_of(world_size: int) -> Tensor:
    """One for each of `METRICS`. A rank divides its loss by its share of the counts, so its gradients are `world_size` times the step's."""
    return torch.tensor([world_size**-2 if name.endswith("_grad_square") else 1.0 for name in METRICS], dtype=torch.float64)


def balance_of(load_YE: Tensor) -> dict[str, float]:
    """How evenly tokens are spread over the experts of a layer, in loads of an even spread (1): of the busiest and of the idlest expert of
    all layers, and the share of experts that got none."""
    mean_Y1 = load_YE.mean(1, keepdim=True).clamp(min=1e-12)
    relative_YE = load_YE / mean_Y1
    busiest, idlest, unused = torch.stack([relative_YE.max(), relative_YE.min(), (load_YE == 0).double().mean()]).tolist()
    return {"experts/busiest": busiest, "experts/idlest": idlest, "experts/unused": unused}


def means(totals: dict[str, float], *, reward_scale: float | None) -> dict[str, float]:
    """Logged means from summed `METRICS`; what has no pair or token to speak of is left out.

    Args:
        totals: by name.
        reward_scale: from mean log-probability to the objective's implicit reward; None where it has none: no rewards are logged.
    """
    logs: dict[str, float] = {}
    if totals["num_nll_tokens"]:
        logs["nll_loss"] = totals["nll_sum"] / totals["num_nll_tokens"]
    pairs = totals["num_pairs"]
    if pairs:
        chosen, rejected = totals["chosen_logp_sum"] / pairs, totals["rejected_logp_sum"] / pairs
        if reward_scale is not None:
            logs |= {
                "rewards/chosen": reward_scale * chosen,
                "rewards/rejected": reward_scale * rejected,
                "rewards/margins": reward_scale * (chosen - rejected),
            }
        logs |= {
            "rewards/accuracies": totals["accuracy_sum"] / pairs,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "log_odds_ratio": totals["log_sigmoid_sum"] / pairs,
            "log_odds_chosen": totals["log_odds_ratio_sum"] / pairs,
        }
    nll_norm, preference_norm = totals["nll_grad_square"] ** 0.5, totals["preference_grad_square"] ** 0.5
    if pairs and nll_norm + preference_norm > 0:
        logs["grad_share/odds_ratio"] = preference_norm / (nll_norm + preference_norm)
    return logs


def end_logps(batch: PreferenceBatch, logp_N: Tensor) -> Tensor:
    """Log-probabilities of the terminators of the chosen answers: when they fall, generated answers run on."""
    # Found on the host, from the groups: picking by a mask of the device would have the host wait for how many there are.
    ends = []
    for group, span in zip(batch.groups, batch.spans, strict=True):
        chosen = {pair[0] for pair in group.pairs} if span.b[0] < span.b[1] else set()
        end = span.n[1]
        for number in reversed(range(len(group.response_ids))):
            if number in chosen and group.is_ended[number]:
                ends.append(end - 1)
            end -= len(group.response_ids[number])
    return logp_N.detach().index_select(0, sent(np.array(sorted(ends), dtype=np.int64), logp_N.device))


def response_sums(inputs: StepBatch, logps: list[Tensor]) -> Iterator[float]:
    """Summed log-probability of each response of the step, in order; computed only if the guard asks."""
    for batch, logp_N in zip(inputs.microbatches, logps, strict=True):
        response_N = batch.index.response_N.to(logp_N.device)
        for response in range(len(batch.index.num_tokens_R)):
            yield float(logp_N[response_N == response].sum())


class MetricsCallback(TrainerCallback):
    """Appends every log of a trainer to `metrics.jsonl`, on the first process alone."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            self.log.append({"step": state.global_step, "time_unix_s": round(time.time(), 3), **logs})
