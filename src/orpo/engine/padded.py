"""The plain engine: every answer is a padded sequence of its own, prompt included. Slow, obvious, and the oracle for the shared one.

It also serves the models that the shared engine does not hold for (state-space and linear-attention layers, custom code).

Shape suffixes: R responses, L padded length, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orpo.data.types import TokenGroup
from orpo.engine.layout import PreferenceBatch, StepResult
from orpo.engine.router import Router, routing, rows_in_padded, with_routing
from orpo.engine.shared import unwrap
from orpo.models.softcap import honour_soft_cap
from orpo.objective import Objective, evaluate


def token_logps(model: nn.Module, batch: PreferenceBatch, pad_side: str = "right") -> Tensor:
    """Log-probabilities of the batch's predicted tokens, in its order, float32, shape (N,), with a graph to the model.

    Args:
        model: a causal language model; called as `model(input_ids=, attention_mask=, position_ids=)`.
        batch: the micro-batch, on the model's device.
        pad_side: where the padding goes; changes no value.

    Example: any causal language model of transformers; `batch` is that of `collate`.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orpo.engine import padded
        >>> shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).eval()
        >>> logp_N = padded.token_logps(model, batch)
        >>> logp_N.shape, bool((logp_N <= 0).all())
        (torch.Size([7]), True)
    """
    return _forward(model, batch, pad_side)[0]


def _forward(model: nn.Module, batch: PreferenceBatch, pad_side: str = "right", router: Router | None = None) -> tuple[Tensor, Any, Tensor]:
    """(token log-probabilities, what the model returned, where each packed token lies in the padded rows)."""
    honour_soft_cap(unwrap(model))  # not for this call alone: checkpointed layers run again in the backward pass
    sequences = [(group, ids) for group in batch.groups for ids in group.response_ids]
    length = max(len(group.prompt_ids) + len(ids) for group, ids in sequences)
    device = batch.input_ids_T.device
    input_ids_RL = torch.zeros(len(sequences), length, dtype=torch.long)
    mask_RL = torch.zeros(len(sequences), length, dtype=torch.long)
    starts = []
    for row, (group, ids) in enumerate(sequences):
        size = len(group.prompt_ids) + len(ids)
        start = length - size if pad_side == "left" else 0
        starts.append(start)
        input_ids_RL[row, start : start + len(group.prompt_ids)] = torch.from_numpy(group.prompt_ids.astype("int64"))
        input_ids_RL[row, start + len(group.prompt_ids) : start + size] = torch.from_numpy(ids.astype("int64"))
        mask_RL[row, start : start + size] = 1
    position_ids_RL = (mask_RL.cumsum(-1) - 1).clamp(min=0)
    rows, columns = _predicting_positions(batch, starts)
    output = model(
        input_ids=input_ids_RL.to(device),
        attention_mask=mask_RL.to(device),
        position_ids=position_ids_RL.to(device),
        use_cache=False,
        **({"output_router_logits": True} if router else {}),
    )
    logits_NV = output.logits[rows.to(device), columns.to(device)].float()
    logp_N = logits_NV.gather(-1, batch.target_N[:, None])[:, 0] - torch.logsumexp(logits_NV, -1)
    return logp_N, output, rows_in_padded(batch, starts, length).to(device)


def step(model: nn.Module, batch: PreferenceBatch, objective: Objective, *, router: Router | None = None) -> StepResult:
    """Loss with a graph to the model, by autograd through the token log-probabilities.

    Args:
        model: a causal language model, on the batch's device, in any float dtype.
        batch: the micro-batch.
        objective: what the log-probabilities are for.
        router: what is asked of a mixture of experts.

    Example: `model` is that of `token_logps`, `batch` that of `collate`.

        >>> from orpo.objective import ORPO
        >>> result = padded.step(model, batch, ORPO(orpo_alpha=0.1))
        >>> result.loss.backward()
        >>> model.lm_head.weight.grad.shape
        torch.Size([32, 16])
    """
    logp_N, output, rows_T = _forward(model, batch, router=router)
    evaluation = evaluate(objective, logp_N, batch.index)
    # The objective's derivative is attached by a surrogate, so that both engines share one evaluation of the equations.
    surrogate = (logp_N * evaluation.grad_N).sum()
    result = StepResult(evaluation.loss + surrogate - surrogate.detach(), logp_N.detach(), evaluation.sums)
    return result if router is None else with_routing(result, routing(output, router, batch, rows_T), router)


def _predicting_positions(batch: PreferenceBatch, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Row and column in the padded logits for each predicted token. A prompt token is read from its group's first winner."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    first_response = 0
    for group, span in zip(batch.groups, batch.spans, strict=True):
        num_answer_tokens = sum(len(ids) for ids in group.response_ids)
        num_prompt_tokens = span.n[1] - span.n[0] - num_answer_tokens
        winner = first_response + _first_winner(group)
        rows.append(torch.full((num_prompt_tokens,), winner))
        columns.append(starts[winner] + torch.arange(num_prompt_tokens))
        for offset, ids in enumerate(group.response_ids):
            row = first_response + offset
            first = starts[row] + len(group.prompt_ids) - 1
            rows.append(torch.full((len(ids),), row))
            columns.append(torch.arange(first, first + len(ids)))
        first_response += len(group.response_ids)
    return torch.cat(rows), torch.cat(columns)


def _first_winner(group: TokenGroup) -> int:
    return group.pairs[0][0] if group.pairs else 0
