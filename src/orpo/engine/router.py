"""Mixture of experts: the auxiliary loss that keeps a router from sending every token to the same few experts, and the experts' load.

Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6, as transformers computes it over all layers together: with f the share
of tokens that an expert is chosen for and p its mean probability, E · Σ f · p. It is a product of two means, so a mean over micro-batches
would depend on how a step is cut. Here it is taken per group (a prompt and its answers, each token once), and averaged over the
optimizer step by tokens.

Shape suffixes: T tokens, each once, in packed order; E experts, K chosen of them, Y layers with a router.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orpo.engine.layout import PreferenceBatch, RouterResult, StepResult
from orpo.engine.sending import class_of
from orpo.errors import UserError

logger = logging.getLogger(__name__)

_LOSS = "load_balancing_loss_func"
_TAKEN = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""What transformers' own function takes in every family that computes this loss; Doge, whose experts have keys, takes more."""


@dataclass(frozen=True, slots=True)
class Router:
    """What a run asks of a model's routers.

    Attributes:
        coef: weight of the auxiliary loss; 0: the experts' load is counted and nothing added.
        top_k: experts that a token is sent to.
    """

    coef: float
    top_k: int


def router_of(core: Any, coef: float | None = None) -> Router | None:
    """What is asked of a model's routers; None for a model that has none, or whose family knows no such loss.

    Args:
        core: the transformers model, without wrappers.
        coef: weight of the auxiliary loss; None: its configuration's, where that asks for it (`output_router_logits`).

    Raises:
        UserError: a weight was given and the model has no such loss.
    """
    config: Any = getattr(core, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    is_asked = bool(getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False))
    if not _has_loss(core):
        if coef:
            raise UserError(
                f"{class_of(core).__name__} has no auxiliary loss of a router",
                where="router_aux_loss_coef",
                expected="a mixture-of-experts model whose transformers class computes one (Mixtral, Qwen 3 MoE, gpt-oss, OLMoE)",
                mend="leave it out",
            )
        if is_asked and coef is None:
            logger.warning("%s asks for a router's auxiliary loss, and transformers computes none for it", class_of(core).__name__)
        return None
    own = getattr(core, "router_aux_loss_coef", None)
    own = float(own if own is not None else getattr(text, "router_aux_loss_coef", 0.0) or 0.0)
    top_k = int(getattr(core, "num_experts_per_tok", None) or text.num_experts_per_tok)
    if coef is not None:
        return Router(float(coef), top_k)
    if not is_asked or not own:
        why = "its router_aux_loss_coef is 0" if is_asked else "its configuration does not ask for it (output_router_logits)"
        logger.warning(
            "%s is a mixture of experts and trains without the router's auxiliary loss: %s; router_aux_loss_coef: %g adds it, 0 says "
            "that this is meant",
            class_of(core).__name__,
            why,
            own or 0.001,
        )
    return Router(own if is_asked else 0.0, top_k)


def _has_loss(core: Any) -> bool:
    function = getattr(sys.modules.get(class_of(core).__module__), _LOSS, None)
    takes = "output_router_logits" in inspect.signature(class_of(core).forward).parameters
    return takes and function is not None and list(inspect.signature(function).parameters) == _TAKEN


def routing(output: Any, router: Router, batch: PreferenceBatch, rows_T: Tensor | None = None) -> RouterResult | None:
    """The auxiliary loss and the load of a forward pass.

    Args:
        output: what the model returned, called with `output_router_logits=True`.
        router: what is asked.
        batch: the micro-batch; `token_weight` of it says what a token counts.
        rows_T: where the batch's tokens lie in the router's rows, in packed order; None: they are those.

    Returns:
        None where the model keeps its routers to itself and no loss is asked for.

    Raises:
        UserError: the model keeps them to itself and a loss is asked for (GraniteMoE under transformers 5.17, whose own loss is 0 then).
    """
    if getattr(output, "router_logits", None) is None:
        if not router.coef:
            return None
        raise UserError(
            "this model's class in the installed transformers gives no logits of its routers, so there is no auxiliary loss to add",
            where="router_aux_loss_coef",
            expected="a class that returns router_logits",
            mend="a newer transformers, or router_aux_loss_coef: 0, which trains without the loss",
        )
    logits = [layer.reshape(-1, layer.shape[-1]) for layer in output.router_logits]
    # Without what an attention kernel pads the row with.
    logits = [layer[: batch.num_tokens] if rows_T is None else layer.index_select(0, rows_T) for layer in logits]
    if not router.coef or not torch.is_grad_enabled():
        logits = [layer.detach() for layer in logits]
    with torch.autocast(logits[0].device.type, enabled=False):
        return balance(logits, [group.num_tokens for group in batch.groups], router.top_k, batch.token_weight)


def balance(logits: Sequence[Tensor], sizes: Sequence[int], top_k: int, token_weight: float) -> RouterResult:
    """Σ over groups of (tokens of the group · its auxiliary loss) · `token_weight`, and the load.

    Args:
        logits: of each layer's router, shape (T, E).
        sizes: tokens of each group, in order; they add up to T.
        top_k: experts that a token is sent to.
        token_weight: what a token counts: 1 / tokens of the step.
    """
    chosen_TE = torch.zeros(logits[0].shape, device=logits[0].device)
    probability_TE = torch.zeros_like(chosen_TE)
    load = []
    for layer_TE in logits:
        softmax_TE = torch.softmax(layer_TE.float(), -1)
        picks_TK = torch.topk(softmax_TE.detach(), top_k, -1).indices
        # Each expert at most once per token: the scatter adds nothing up, so its result does not depend on an order.
        picked_TE = torch.zeros_like(chosen_TE).scatter_(1, picks_TK, 1.0)
        probability_TE = probability_TE + softmax_TE
        chosen_TE += picked_TE
        load.append(picked_TE.sum(0))
    num_layers, num_experts = len(logits), chosen_TE.shape[1]
    loss = chosen_TE.new_zeros(())
    for size, chosen, probability in zip(sizes, chosen_TE.split(list(sizes)), probability_TE.split(list(sizes)), strict=True):
        rows = size * num_layers
        loss = loss + size * num_experts * torch.sum(chosen.sum(0) / rows * (probability.sum(0) / rows))
    load_YE = torch.stack(load) * float(token_weight > 0)  # a filler counts nowhere
    return RouterResult(loss * token_weight, load_YE)


def rows_in_padded(batch: PreferenceBatch, starts: Sequence[int], length: int) -> Tensor:
    """Where the packed tokens lie among the rows of the padded form: a prompt's as its first answer's sequence has it."""
    rows: list[Tensor] = []
    first = 0
    for group in batch.groups:
        num_prompt = len(group.prompt_ids)
        rows.append(first * length + starts[first] + torch.arange(num_prompt))
        for number, ids in enumerate(group.response_ids):
            start = (first + number) * length + starts[first + number] + num_prompt
            rows.append(start + torch.arange(len(ids)))
        first += len(group.response_ids)
    return torch.cat(rows)


def with_routing(result: StepResult, routed: RouterResult | None, router: Router) -> StepResult:
    """A micro-batch's result with the router's part of the loss, if there is one."""
    if routed is None:
        return result
    return replace(result, loss=result.loss + router.coef * routed.loss, router=replace(routed, loss=routed.loss.detach()))
