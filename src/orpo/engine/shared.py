"""The fast engine: each prompt once, groups packed without padding, no full logits tensor.

The inner model is reached through the wrapped model's own forward and the head inside the output module's own call, so that wrappers
that gather weights per module (ZeRO-3, FSDP2) and gradient hooks (DDP) see what they expect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo.engine.attention import LAYOUT_KEYWORD
from orpo.engine.flex import padded_rows
from orpo.engine.head import HeadJob, LogitRule, head_loss
from orpo.engine.layout import PreferenceBatch, StepResult
from orpo.engine.router import Router, routing, with_routing
from orpo.engine.sending import class_of
from orpo.objective import Objective

DEFAULT_BUDGET_BYTES = 256 * 2**20


def step(
    model: nn.Module,
    batch: PreferenceBatch,
    objective: Objective,
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    router: Router | None = None,
    gradient_scale: Tensor | None = None,
    kernel: str = "sdpa",
) -> StepResult:
    """Loss with a graph to the model, and the token log-probabilities on the way.

    Args:
        model: a causal language model prepared by `orpo.engine.choose`, possibly wrapped (PEFT, DDP).
        batch: the micro-batch, on the model's device.
        objective: what the log-probabilities are for.
        budget_bytes: most memory that vocabulary-sized tensors may take at once.
        router: what is asked of a mixture of experts.
        gradient_scale: what the loss will be multiplied by before its backward pass (fp16).
        kernel: for attention, one of `orpo.engine.kernels.KERNELS`.

    Raises:
        RuntimeError: the model does not call its output embedding.

    Example: `Engine.step` calls it; see `orpo.engine.choose.choose`. By hand, the model must be told of the packed attention.

        >>> from orpo.engine import attention, shared
        >>> attention.register()
        >>> model.set_attn_implementation(attention.NAME)
        >>> packed = shared.step(model, batch, ORPO(orpo_alpha=0.1))
        >>> torch.allclose(packed.loss, result.loss, atol=1e-5)
        True
        >>> model.set_attn_implementation("sdpa")
    """
    core = unwrap(model)
    batch.layout.kernel = kernel
    padding = padded_rows(batch.num_tokens) - batch.num_tokens if kernel == "flex" else 0
    num_masked = batch.num_tokens + padding if router else 1
    job = HeadJob(batch, objective, budget_bytes, LogitRule.of(core.config.get_text_config()), gradient_scale)
    with _head_installed(core, job) as results:
        output = model(
            input_ids=F.pad(batch.input_ids_T, (0, padding))[None],  # the head never looks at padding
            position_ids=F.pad(batch.position_ids_T, (0, padding))[None],
            # transformers returns a 4-d mask as it is; the packed attention reads the layout instead. Of a mixture of experts the model
            # takes it for one number per token, in a loss of its own that nobody reads.
            attention_mask=torch.ones(1, 1, 1, num_masked, dtype=torch.bool, device=batch.input_ids_T.device),
            use_cache=False,
            **{LAYOUT_KEYWORD: batch.layout},
            **({"output_router_logits": True} if router else {}),
        )
    if not results:
        raise RuntimeError(f"{class_of(core).__name__} did not call its output embedding")
    loss, logp_N, sums = results[0]
    # The stand-in for the logits stays in the graph, with weight zero, so that wrappers that hook the model's output are triggered.
    result = StepResult(loss + 0.0 * output.logits.sum(), logp_N, sums)
    return result if router is None else with_routing(result, routing(output, router, batch), router)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DDP, torch.compile or PEFT wrappers."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


@contextmanager
def _head_installed(core: Any, job: HeadJob) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Let the output module compute losses in place of logits while the context lasts."""
    module = core.get_output_embeddings()
    results: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        results.append(head_loss(hidden_states[0], module, job))
        return results[0][0].reshape(1, 1, 1).clone()  # not a view, of which FSDP2 warns at each start

    module.forward = forward  # an attribute of this instance, which hides the class's method and hooks still surround
    try:
        yield results
    finally:
        del module.forward  # and the class's own is found again
