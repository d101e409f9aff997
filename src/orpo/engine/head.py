"""The output head: from hidden states to loss, without a full logits tensor and without computing anything twice.

A pair's loss depends on its own tokens only. So the head takes groups in chunks whose logits fit the budget, and for each chunk makes
log-probabilities, loss, and the gradient with respect to hidden states and head weight in one visit, in place: the logits become the
gradient of the logits. Nothing vocabulary-sized outlives its chunk except the gradient of a trained head itself; a frozen head (LoRA)
keeps nothing at all. Only a group whose own logits exceed the budget is visited twice.

(Liger Kernel has a fused ORPO loss that avoids the full logits by whole pairs; this one packs pairs and follows a byte budget.)

Shape suffixes: T packed tokens, N predicted tokens, C tokens of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orpo.engine.layout import PreferenceBatch
from orpo.engine.logits import PLAIN, LogitRule, log_softmax_in_place, to_gradient
from orpo.objective import METRICS, Objective, ResponseIndex, evaluate

ASKING_IS_FREE = ("cpu",)
"""Devices that the host need not wait for."""

VOCABULARY_BLOCK = 16_384
"""Rows of the head's gradient that a later chunk is added to at a time."""


@dataclass(frozen=True, slots=True)
class HeadJob:
    """Everything the head needs besides hidden states and weight."""

    batch: PreferenceBatch
    objective: Objective
    budget_bytes: int
    rule: LogitRule = PLAIN
    gradient_scale: Tensor | None = None
    """What the loss will be multiplied by (fp16). The gradients are made here, in 16 bits, so they must be large enough already."""


def head_loss(hidden_TD: Tensor, module: nn.Module, job: HeadJob) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, token log-probabilities and metric sums, called inside the output module's own forward.

    Args:
        hidden_TD: last hidden states of the packed row.
        module: the output embedding; a plain linear layer takes the fused way, anything else (LoRA on the head) is called by chunks.

    Returns:
        (loss with a graph, float32 scalar; logp_N, float32, detached; sums, float64).
    """
    # Only positions that predict a counted token meet the vocabulary; with `nll_scope: response` most of a prompt never does.
    hidden_ND = hidden_TD.index_select(0, job.batch.source_N)
    linear = plain_linear(module)
    if linear is None:
        return _called_by_chunks(hidden_ND, module, job)
    inputs = (hidden_ND, linear.weight, linear.bias)
    if not torch.is_grad_enabled():
        # An autograd function is not told of no_grad: evaluation would make the gradient of every weight that could have one.
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)  # type: ignore[assignment]
    return _FusedHead.apply(*inputs, job)


def plain_linear(module: nn.Module) -> nn.Linear | None:
    """The linear layer that the output module is, looking through PEFT's copy for trained modules; None where it is more than that."""
    active = getattr(module, "modules_to_save", None)
    if active is not None and len(getattr(module, "active_adapters", [])) == 1:
        module = active[module.active_adapters[0]]  # type: ignore[index]
    is_plain = isinstance(module, nn.Linear) and type(module).__module__.startswith("torch.nn")
    return module if is_plain else None  # type: ignore[return-value]


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: HeadJob
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        with torch.autocast(device, enabled=False):
            run = _HeadRun(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V, job, ctx.needs_input_grad)  # type: ignore[attr-defined]
            run.visit_all()
        ctx.set_materialize_grads(False)  # or a zero gradient as large as the log-probabilities is made for an output nobody uses
        ctx.hidden_dtype, ctx.weight_dtype = hidden_ND.dtype, weight_VD.dtype  # type: ignore[attr-defined]
        ctx.gradient_scale = job.gradient_scale  # type: ignore[attr-defined]
        # Not saved through save_for_backward: they are results, and used exactly once.
        ctx.grads = (run.d_hidden_ND, run.d_weight_VD, run.d_bias_V)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(run.logp_N, run.sums)
        return run.loss, run.logp_N, run.sums

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        if grad is None:
            return None, None, None, None
        if ctx.gradient_scale is not None:  # type: ignore[attr-defined]
            grad = grad / ctx.gradient_scale  # type: ignore[attr-defined]
        d_hidden, d_weight, d_bias = ctx.grads  # type: ignore[attr-defined]
        ctx.grads = None  # type: ignore[attr-defined]
        # The usual incoming gradient is 1; where asking is free, a pass over the head's gradient is not.
        if not (grad.device.type in ASKING_IS_FREE and grad.item() == 1.0):
            for tensor in (d_hidden, d_weight, d_bias):
                if tensor is not None:
                    tensor.mul_(grad)
        d_hidden = None if d_hidden is None else d_hidden.to(ctx.hidden_dtype)  # type: ignore[attr-defined]
        d_weight = None if d_weight is None else d_weight.to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return d_hidden, d_weight, d_bias, None


class _HeadRun:
    """One pass over all predicted tokens, chunk by chunk."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: HeadJob, needs_grad: tuple[bool, ...]) -> None:
        self.hidden_ND, self.weight_VD, self.bias_V, self.job = hidden_ND, weight_VD, bias_V, job
        self.wants_hidden, self.wants_weight = needs_grad[0], needs_grad[1]
        self.wants_bias = bias_V is not None and needs_grad[2]
        device = hidden_ND.device
        self.loss = torch.zeros((), device=device)
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        self.logp_N = torch.empty(hidden_ND.shape[0], device=device)
        self.d_hidden_ND = torch.empty_like(hidden_ND) if self.wants_hidden else None
        self.d_weight_VD: Tensor | None = None
        self.d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if self.wants_bias and bias_V is not None else None
        self.max_rows = max(1, job.budget_bytes // (weight_VD.shape[0] * weight_VD.element_size()))

    def visit_all(self) -> None:
        """Every chunk once. A chunk is a run of groups that fit the budget, or one group that does not."""
        for first, last in self._group_chunks():
            rows, index = self.job.batch.part(first, last)
            # Whole groups: the objective needs both answers of a pair before it can say what any of their tokens weighs.
            if rows.stop - rows.start <= self.max_rows:
                self._visit(rows, index)
            else:
                self._visit_twice(rows, index)

    def _group_chunks(self) -> Iterator[tuple[int, int]]:
        spans = self.job.batch.spans
        first = 0
        while first < len(spans):
            last = first + 1
            while last < len(spans) and spans[last].n[1] - spans[first].n[0] <= self.max_rows:
                last += 1
            yield first, last
            first = last

    def _visit(self, rows: slice, index: ResponseIndex) -> None:
        logits_CV = self._logits(rows)
        # Nothing is trained through this head (evaluation): log-probabilities are all that is asked.
        is_final = not (self.wants_hidden or self.wants_weight or self.wants_bias)
        self.logp_N[rows], factor_C = log_softmax_in_place(logits_CV, self.job.batch.target_N[rows], self.job.rule)
        grad_C = self._evaluate(rows, index)
        if not is_final:
            to_gradient(logits_CV, self.job.batch.target_N[rows], grad_C, factor_C, self.job.rule)
            self._backward(rows, logits_CV)

    def _visit_twice(self, rows: slice, index: ResponseIndex) -> None:
        """A group larger than the budget: first all log-probabilities, then the logits again for the gradient."""
        pieces = [slice(start, min(start + self.max_rows, rows.stop)) for start in range(rows.start, rows.stop, self.max_rows)]
        for piece in pieces:
            self.logp_N[piece], _ = log_softmax_in_place(self._logits(piece), self.job.batch.target_N[piece], self.job.rule)
        grad_C = self._evaluate(rows, index)
        if not (self.wants_hidden or self.wants_weight or self.wants_bias):
            return
        for piece in pieces:
            logits_CV, target_C = self._logits(piece), self.job.batch.target_N[piece]
            _, factor_C = log_softmax_in_place(logits_CV, target_C, self.job.rule)
            to_gradient(logits_CV, target_C, grad_C[piece.start - rows.start : piece.stop - rows.start], factor_C, self.job.rule)
            self._backward(piece, logits_CV)

    def _logits(self, rows: slice) -> Tensor:
        logits_CV = self.hidden_ND[rows] @ self.weight_VD.t()
        return logits_CV if self.bias_V is None else logits_CV.add_(self.bias_V)

    def _evaluate(self, rows: slice, index: ResponseIndex) -> Tensor:
        evaluation = evaluate(self.job.objective, self.logp_N[rows], index)
        self.loss += evaluation.loss
        self.sums += evaluation.sums
        return evaluation.grad_N if self.job.gradient_scale is None else evaluation.grad_N * self.job.gradient_scale

    def _backward(self, rows: slice, d_logits_CV: Tensor) -> None:
        if self.d_hidden_ND is not None:
            torch.mm(d_logits_CV, self.weight_VD, out=self.d_hidden_ND[rows])
        if self.wants_weight:
            self._add_weight_gradient(d_logits_CV, self.hidden_ND[rows])
        if self.d_bias_V is not None:
            self.d_bias_V += d_logits_CV.sum(0, dtype=torch.float32)

    def _add_weight_gradient(self, d_logits_CV: Tensor, hidden_CD: Tensor) -> None:
        """Later chunks are added vocabulary block by block in float32 and stored in the weight's dtype: one gradient, no second copy."""
        if self.d_weight_VD is None:
            self.d_weight_VD = torch.mm(d_logits_CV.t(), hidden_CD)  # made by the first chunk: no pass to fill it with zeros
        elif self.d_weight_VD.dtype == torch.float32:
            self.d_weight_VD.addmm_(d_logits_CV.t(), hidden_CD)
        else:
            for start in range(0, self.d_weight_VD.shape[0], VOCABULARY_BLOCK):
                block = self.d_weight_VD[start : start + VOCABULARY_BLOCK]
                part = torch.mm(d_logits_CV[:, start : start + VOCABULARY_BLOCK].t(), hidden_CD)
                block.copy_(block.float().add_(part))


def _called_by_chunks(hidden_ND: Tensor, module: nn.Module, job: HeadJob) -> tuple[Tensor, Tensor, Tensor]:
    """The way for output modules that are more than a linear layer: autograd through the module, logits recomputed in the backward."""
    from torch.utils.checkpoint import checkpoint

    forward = type(module).forward

    def logps(hidden_CD: Tensor, target_C: Tensor) -> Tensor:
        logits_CV = forward(module, hidden_CD).float() * job.rule.scale
        if job.rule.softcap is not None:
            logits_CV = job.rule.softcap * torch.tanh(logits_CV / job.rule.softcap)
        return logits_CV.gather(1, target_C[:, None])[:, 0] - torch.logsumexp(logits_CV, 1)

    vocabulary = getattr(module, "out_features", None) or module.weight.shape[0]  # type: ignore[index]
    size = max(1, job.budget_bytes // (int(vocabulary) * 4))  # float32, whatever the module computes in
    target_N = job.batch.target_N
    pieces = [
        checkpoint(logps, hidden_ND[start : start + size], target_N[start : start + size], use_reentrant=False)
        for start in range(0, hidden_ND.shape[0], size)
    ]
    logp_N = torch.cat(pieces)
    evaluation = evaluate(job.objective, logp_N, job.batch.index)
    # Of value zero; its gradient with respect to each log-probability is the objective's, which autograd then carries into the module.
    surrogate = (logp_N * evaluation.grad_N).sum()
    return evaluation.loss + surrogate - surrogate.detach(), logp_N.detach(), evaluation.sums
