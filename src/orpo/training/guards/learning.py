"""Proof of learning: says within the first steps that a run teaches nothing, or not what was meant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orpo.errors import GuardStop
from orpo.objective import KINDS, ObjectiveKind

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

NEGLIGIBLE_SHARE = 1e-3
"""A term whose part of the gradient (by norm) is below this does not take part in the training."""
MIN_COLLAPSE_NATS = 0.5
COLLAPSE_FACTOR = 0.5
"""Chosen log-probability per token has collapsed when it is this fraction of its first value, and at least 0.5 nats, below it."""
END_DROP_NATS = 2.0
"""The end of a chosen answer has become this much less likely: generated answers will run on."""
LENGTH_FACTOR = 2.0
"""Generated answers have drifted when they are this many times longer or shorter than at first."""
_MIN_STEPS_OF_A_PART = 3
"""Steps before a part of the weights can be said to stand still: a factor that starts at zero (B of LoRA, a gate) keeps the gradient of
what it multiplies at exactly zero in the first step, and a second such factor around it in the next."""
_NUM_FIRST = 3
_SMOOTHING = 0.9


@dataclass(frozen=True, slots=True)
class LearningFinding:
    """Something the user should know about the run: a stable code, the step at which it was seen, and the sentence."""

    code: str
    step: int
    message: str


class ProofOfLearning:
    """Watches the first optimizer steps, and a few metrics over the whole run. Each finding is told once, as a warning.

    Args:
        window_steps: optimizer steps with a learning rate above zero (a warm-up may begin at zero) that make up "the first steps".
        kind: of the objective, ORPO if None: whether it means to have a next-token loss beside its preference term, and what weighs
            the two.
        say: what to do with a finding besides keeping it in `findings`; the default logs a warning.

    Metrics it reads, where the trainer gives them: `grad_share/odds_ratio`, the odds-ratio term's share of the norms of the
    two terms' derivatives with respect to the token log-probabilities; `logps/chosen`; `logps/end`, the log-probability of the chosen
    answers' last token, their terminator; `answer_tokens`, mean tokens of generated answers.
    """

    def __init__(
        self, *, window_steps: int = 10, kind: ObjectiveKind | None = None, say: Callable[[LearningFinding], None] | None = None
    ) -> None:
        self.window_steps, self.kind = window_steps, KINDS["orpo"] if kind is None else kind
        self._say = say or (lambda finding: logger.warning("step %d: %s", finding.step, finding.message))
        self.start_anew()

    def start_anew(self) -> None:
        """Another training begins, with its own first steps and findings."""
        self.findings: list[LearningFinding] = []
        self._before: dict[str, int] = {}
        self._num_steps = self._num_zero_rate = 0
        self._is_window_done = False
        self._grad_norms: list[float] = []
        self._shares: list[float] = []
        self._first: dict[str, list[float]] = {}
        self._smooth: dict[str, float] = {}

    def begin(self, model: torch.nn.Module) -> None:
        """Take the trainable weights' checksums; call it once before the first step.

        Raises:
            GuardStop: the model has no trainable weight.
        """
        self._before = weight_checksums(model)
        if not self._before:
            raise GuardStop("nothing can learn: no weight of the model is trainable\n  to mend it: use_peft, or unfreeze some of them")

    def end_step(self, step: int, model: torch.nn.Module, *, learning_rate: float, grad_norm: float | None = None) -> None:
        """Call it after every optimizer step; it looks at the weights once, when the window is full, and costs nothing after that.

        Raises:
            GuardStop: the gradient was zero and no trainable weight has changed in the whole window.
        """
        if self._is_window_done:
            return
        if learning_rate <= 0:
            self._num_zero_rate += 1
            if self._num_zero_rate == self.window_steps:
                self._tell_zero_rate(step)
            return
        self._num_steps += 1
        if grad_norm is not None:
            self._grad_norms.append(float(grad_norm))
        if self._num_steps >= self.window_steps:
            self.close_window(step, model)

    def close_window(self, step: int, model: torch.nn.Module) -> None:
        """Judge the first steps; also called at the end of a run shorter than the window.

        Raises:
            GuardStop: the gradient was zero and no trainable weight has changed although there were steps.
        """
        if self._is_window_done:
            return
        if not self._num_steps:
            self._tell_zero_rate(step)
            return
        self._is_window_done = True
        has_no_gradient = bool(self._grad_norms) and not any(self._grad_norms)
        after = weight_checksums(model)
        still = [name for name, checksum in self._before.items() if after.get(name) == checksum]
        if still:
            names = ", ".join(still[:4]) + (f" and {len(still) - 4} more" if len(still) > 4 else "")
            few = f"{len(still)} of {len(self._before)} trainable tensors have not changed in {self._num_steps} steps: {names}"
        if has_no_gradient and len(still) == len(self._before):
            raise GuardStop(f"step {step}: nothing learns: the gradient is zero; {few}")
        if has_no_gradient:
            self._tell(
                "zero_gradient", step, f"the gradient was zero in all of the first {self._num_steps} steps; only decay moves weights"
            )
        elif len(still) == len(self._before):
            # Not a stop: a bf16 weight with an fp32 master may stand still through a long warm-up.
            cause = "though the gradient is not zero: are updates rounded away?" if self._grad_norms else "and the gradient is not known:"
            self._tell("unmoved_weights", step, f"nothing has learned yet, {cause} {few}")
        elif still and self._num_steps >= _MIN_STEPS_OF_A_PART:
            self._tell("unmoved_weights", step, few)
        self._before = {}

    def _tell_zero_rate(self, step: int) -> None:
        if self._num_zero_rate:
            self._tell("zero_rate", step, f"the learning rate was 0 in all of the {self._num_zero_rate} steps so far: no weight moves")

    def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at logged metrics."""
        if self.kind.has_two_terms and (share := metrics.get("grad_share/odds_ratio")) is not None:
            self._observe_share(step, float(share))
        logp = metrics.get("logps/chosen")
        if logp is not None and self._fell("logps/chosen", float(logp), COLLAPSE_FACTOR, MIN_COLLAPSE_NATS):
            change = self._change("logps/chosen", "the chosen answers' log-probability per token has collapsed")
            self._tell("chosen_collapse", step, f"{change}; lower {self._weigher}learning_rate")
        logp = metrics.get("logps/end")
        if logp is not None and self._fell("logps/end", float(logp), 0.0, END_DROP_NATS):
            change = self._change("logps/end", "the end of the chosen answers has become unlikely")
            self._tell("length_drift", step, f"{change}; generated answers will run on")
        if (tokens := metrics.get("answer_tokens")) is not None:
            self._observe_length(step, float(tokens))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint: the first values that later ones are compared with, and what has been told."""
        return {
            "first": self._first,
            "smooth": self._smooth,
            "shares": self._shares,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. The window is watched anew after a resume."""
        self._first = {key: list(values) for key, values in state["first"].items()}
        self._smooth, self._shares = dict(state["smooth"]), list(state["shares"])
        self.findings = [LearningFinding(**finding) for finding in state["findings"]]

    def _observe_share(self, step: int, share: float) -> None:
        if len(self._shares) >= _NUM_FIRST:
            return
        self._shares.append(share)
        mean = sum(self._shares) / len(self._shares)
        if len(self._shares) < _NUM_FIRST:
            return
        if mean < NEGLIGIBLE_SHARE:
            meaning = f"this is plain fine-tuning on the chosen answers{self._advice('raise')}"
            self._tell("odds_ratio_negligible", step, f"the {self.kind.preference} is {mean:.1e} of the gradient: {meaning}")
        elif mean > 1 - NEGLIGIBLE_SHARE:
            meaning = f"the chosen answers are not learned as text{self._advice('lower')}"
            self._tell("nll_negligible", step, f"the next-token loss is {1 - mean:.1e} of the gradient: {meaning}")

    @property
    def _weigher(self) -> str:
        return f"{self.kind.key_of(self.kind.strength)} or " if self.kind.strength else ""

    def _advice(self, verb: str) -> str:
        return f"; {verb} {self.kind.key_of(self.kind.strength)}" if self.kind.strength else ""

    def _observe_length(self, step: int, tokens: float) -> None:
        first = self._first.setdefault("answer_tokens", [tokens])[0]
        if first > 0 and not first / LENGTH_FACTOR <= tokens <= first * LENGTH_FACTOR:
            self._tell(
                "length_drift", step, f"generated answers have drifted in length: {tokens:.0f} tokens in the mean, {first:.0f} at first"
            )

    def _fell(self, key: str, value: float, factor: float, least: float) -> bool:
        """Whether the smoothed metric lies far below the mean of its first values."""
        first = self._first.setdefault(key, [])
        if len(first) < _NUM_FIRST:
            first.append(value)
            self._smooth[key] = sum(first) / len(first)
            return False
        self._smooth[key] = _SMOOTHING * self._smooth[key] + (1 - _SMOOTHING) * value
        start = sum(first) / len(first)
        return self._smooth[key] < start - max(least, factor * abs(start))

    def _change(self, key: str, what: str) -> str:
        return f"{what}: {self._smooth[key]:.2f} nats, {sum(self._first[key]) / len(self._first[key]):.2f} at first"

    def _tell(self, code: str, step: int, message: str) -> None:
        if all(finding.code != code for finding in self.findings):
            finding = LearningFinding(code, step, message)
            self.findings.append(finding)
            self._say(finding)


def weight_checksums(model: torch.nn.Module) -> dict[str, int]:
    """A checksum of the bits of each trainable tensor, computed where it lies; of a sharded tensor, of the shard of this rank.

    Two weights that change by opposite amounts of the same bits would cancel, which no training does in a whole tensor.
    """
    import torch

    from orpo.engine.parallel import checksum, own_part  # imports torch, which this file does not

    sums = {}
    for name, parameter in model.named_parameters():
        data = own_part(parameter).detach()
        if parameter.requires_grad and data.numel():
            sums[name] = checksum(data)
    # All in one go: asked one by one, the host would wait for the device as often as there are tensors.
    device = next(iter(sums.values())).device if sums else None
    return dict(zip(sums, torch.stack([value.to(device) for value in sums.values()]).tolist(), strict=True)) if sums else {}
