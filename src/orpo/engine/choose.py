"""Which engine: the shared one, unless it disagrees with the padded one on this very model.

Packing a prompt once is exact for attention that goes through transformers' interface, and wrong without a sound for state-space or
linear-attention layers and for custom code. So the first rows of a run go through both engines, and log-probabilities and gradients are
compared before anything is trained: in the precision of the weights, whose rounding hides least, and in the precision and with the
attention kernel that will train. A model that is spread over processes is compared as it is spread, by all of them together, in what
will train alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orpo.data.stored.measures import measures_of
from orpo.data.types import TokenGroup
from orpo.engine import attention, padded, shared
from orpo.engine.kernels import KERNELS, resolve, suited
from orpo.engine.layout import PreferenceBatch, StepResult, collate, one_by_one
from orpo.engine.parallel import (
    computing_device,
    forget_gradients,
    gradients_of,
    is_in_parts,
    is_shard,
    norm_of,
    num_elements,
    reshard,
    trained_alone,
)
from orpo.engine.router import Router, router_of
from orpo.engine.sending import class_of
from orpo.engine.zero import Zero
from orpo.errors import UserError
from orpo.models.adapters import has_experts
from orpo.objective import Objective
from orpo.system.ranks import all_reduce_max, current_ranks, is_lost_contact

logger = logging.getLogger(__name__)

LOGP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Difference of the tokens' log-probabilities, nats: the largest in float32 (ten times what the exactness tests hold), the mean in low
precision. Two correct engines differ by up to 0.4 nats on single tokens of SmolLM2 in bf16, and by 0.06 in the mean."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a gradient, relative to its norm."""
NEGLIGIBLE_GRADIENT = 1e-4
"""A gradient this small beside the largest one is rounding (a bias of keys in OPT) and is measured by this share of the largest."""
CHECK_PROMPT_TOKENS, CHECK_ANSWER_TOKENS = 96, 32
"""Rows for the check are cut to this: the padded engine makes logits for every position, and its memory would be the peak of the whole run.
What is asked is whether this model's layers keep to the layout, which shows at any length; long rows are the tests' business."""
_QUICK_PARAMETERS = 30_000_000
"""Up to which the comparison is over before anybody asks what is being done."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The chosen engine, ready to call.

    Attributes:
        name: "shared" or "padded".
        reason: why, in words for the log and run.json.
        budget_bytes: most memory of vocabulary-sized tensors (shared engine).
        router: what is asked of a mixture of experts.
        kernel: what computes attention (shared engine).

    Example: `engine` is that of `choose`.

        >>> engine.step(model, batch, ORPO()).loss.requires_grad
        True
    """

    name: str
    reason: str
    budget_bytes: int = shared.DEFAULT_BUDGET_BYTES
    router: Router | None = None
    kernel: str = "sdpa"

    def step(self, model: nn.Module, batch: PreferenceBatch, objective: Objective, *, gradient_scale: Tensor | None = None) -> StepResult:
        """One micro-batch: loss with a graph to the model; `gradient_scale` is what it will be multiplied by (fp16)."""
        if self.name == "shared":
            options: dict[str, Any] = {
                "budget_bytes": self.budget_bytes,
                "router": self.router,
                "gradient_scale": gradient_scale,
                "kernel": self.kernel,
            }
            return shared.step(model, batch, objective, **options)
        return padded.step(model, batch, objective, router=self.router)


@dataclass(frozen=True, slots=True)
class Compute:
    """How a run computes: in what precision, the context that its steps are made in, and what holds the model where DeepSpeed does."""

    dtype: torch.dtype
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    zero: Zero | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the two engines are apart on the rows of the check.

    Attributes:
        logp_difference: of token log-probabilities, nats; the largest in float32, the mean in low precision.
        gradient_difference: the largest of the sampled parameters, relative; None where nothing is trained.
        dtype: the lowest precision that the model computes in.
        windows: sliding windows that packed attention was told of.
    """

    logp_difference: float
    gradient_difference: float | None
    dtype: torch.dtype
    windows: frozenset[int | None] = frozenset()

    @property
    def holds(self) -> bool:
        gradient = 0.0 if self.gradient_difference is None else self.gradient_difference
        return self.logp_difference <= LOGP_TOLERANCE[self.dtype] and gradient <= GRADIENT_TOLERANCE[self.dtype]  # a NaN compares false

    def __str__(self) -> str:
        which = "by at most" if self.dtype == torch.float32 else "in the mean by"
        gradients = "" if self.gradient_difference is None else f", gradients by {self.gradient_difference:.1e} of their norm"
        return f"log-probabilities differ {which} {self.logp_difference:.1e} nats{gradients} ({str(self.dtype).removeprefix('torch.')})"


def choose(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    objective: Objective,
    *,
    requested: str = "auto",
    nll_scope: str = "sequence",
    budget_bytes: int = shared.DEFAULT_BUDGET_BYTES,
    router_coef: float | None = None,
    attention_kernel: str = "auto",
    compute: Compute | None = None,
    longest: int | None = None,
) -> Engine:
    """Choose the engine and leave the model ready for it.

    Args:
        model: the causal language model, on its device, not yet wrapped for data parallelism; its weights may be in parts, and then all
            ranks call with the same rows.
        groups: rows of the run; the first ones are compared.
        objective, nll_scope: of the run.
        requested: "auto", "shared" or "padded".
        budget_bytes: for the shared engine.
        router_coef: weight of a router's auxiliary loss; None: what the model's configuration asks for.
        attention_kernel: "auto" or one of `orpo.engine.kernels.KERNELS`.
        compute: of the run; None: as the weights are.
        longest: tokens that no row of the run exceeds, where `groups` are not all of them.

    Raises:
        UserError: the shared engine or a kernel was asked for and does not hold for this model.

    Example: `model` is that of `token_logps`, `group` that of `TokenGroup`.

        >>> from orpo.engine.choose import choose
        >>> engine = choose(model, [group], ORPO())
        >>> engine.name
        'shared'
    """
    core = shared.unwrap(model)
    router = router_of(core, router_coef)
    compute = Compute(_precision(model)) if compute is None else compute
    kernel = suited(attention_kernel, resolve(attention_kernel, computing_device(model), compute.dtype), core)
    if requested == "padded":
        return Engine("padded", "asked for", router=router)
    before = _attention_of(core)
    problem, told = _obstacle(core), ""
    if problem is None:
        rows = rows_for_check(groups)
        if sum(map(num_elements, core.parameters())) > _QUICK_PARAMETERS:
            logger.info("comparing    the two engines on the first %d rows", len(rows))
        options = {"nll_scope": nll_scope, "budget_bytes": budget_bytes, "router": router}
        longest = longest or int(measures_of(groups).longest_tokens.max())
        problem, told = _tried(model, rows, objective, _ways(model, kernel, compute), longest, options)
    if is_in_parts(model):
        problem = next((one for one in current_ranks().gather(problem) if one is not None), None)
    if problem is None:
        core.set_attn_implementation(attention.NAME)
        logger.info("shared engine: %s", told)
        return Engine("shared", f"agrees with the padded engine: {told}", budget_bytes, router, kernel)
    if hasattr(core, "set_attn_implementation"):
        core.set_attn_implementation(before)
    name = class_of(core).__name__
    if requested == "shared" or attention_kernel != "auto":
        where, mend = ("engine", "use engine: auto or padded") if requested == "shared" else ("attention_kernel", "attention_kernel: auto")
        raise UserError(f"the shared engine does not hold for {name}: {problem}", where=where, mend=mend)
    logger.warning("%s falls back to the padded engine, which is slower and needs more memory: %s", name, problem)
    return Engine("padded", f"the shared engine does not hold for {name}: {problem}", router=router)


def _tried(
    model: nn.Module,
    rows: Sequence[TokenGroup],
    objective: Objective,
    ways: Sequence[dict[str, Any]],
    longest: int,
    options: Mapping[str, Any],
) -> tuple[str | None, str]:
    """What speaks against the shared engine, None where nothing does; and how far the engines are apart."""
    try:
        agreements = [compare(model, rows, objective, **options, **how) for how in ways]
        problem = next((str(agreement) for agreement in agreements if not agreement.holds), None)
        problem = problem or _hidden_window(shared.unwrap(model), longest, agreements[0])
    except torch.OutOfMemoryError:
        raise  # says nothing of the model, and the padded engine needs more
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError) as error:
        if is_in_parts(model) and is_lost_contact(error):
            raise
        return f"{type(error).__name__}: {error}", ""
    return problem, "; ".join(map(str, agreements))


def _ways(model: nn.Module, kernel: str, compute: Compute) -> list[dict[str, Any]]:
    """What is compared: the weights' own precision, and where it is another one, that of the run."""
    own = _precision(model)
    if is_in_parts(model):  # there is no other way to compute with it
        return [{"kernel": kernel, "compute": replace(compute, dtype=own) if compute.dtype == torch.float32 else compute}]
    dtypes = KERNELS[kernel].dtypes
    ways: list[dict[str, Any]] = [{"kernel": kernel if dtypes is None or own in dtypes else "sdpa"}]
    if compute.dtype not in (own, torch.float32):  # weights in 16 bits compute as they are where float32 is wanted
        ways.append({"kernel": kernel, "compute": compute})
    return ways


def rows_for_check(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The first two rows, cut where they are long: the end of the prompt, the beginning of each answer."""
    return [
        replace(
            group,
            prompt_ids=group.prompt_ids[-CHECK_PROMPT_TOKENS:],
            response_ids=tuple(ids[:CHECK_ANSWER_TOKENS] for ids in group.response_ids),
        )
        for group in groups[:2]
    ]


def has_unused_weights(model: nn.Module, engine: Engine, groups: Sequence[TokenGroup], objective: Objective) -> bool:
    """Whether some trainable weights take no part in the loss of the first rows, or may take none in that of others (experts)."""
    if has_experts(shared.unwrap(model)):
        return True
    batch = collate(rows_for_check(groups), "sequence").to(next(model.parameters()).device)
    with torch.enable_grad():
        reached = _leaves(engine.step(model, batch, objective).loss)
    return any(weight.requires_grad and id(weight) not in reached for weight in model.parameters())


def _leaves(loss: Tensor) -> set[int]:
    """Ids of the tensors that a backward pass would give gradients to."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting += [inner for inner, _ in node.next_functions]
    return found


def compare(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    objective: Objective,
    nll_scope: str = "sequence",
    budget_bytes: int = 2**28,
    router: Router | None = None,
    *,
    kernel: str = "sdpa",
    compute: Compute | None = None,
) -> Agreement:
    """Run rows through both engines. Leaves no gradient behind, and the model's attention as it was.

    Args:
        model: a causal language model, possibly wrapped (PEFT), on its device.
        groups: rows of both engines, whole; `rows_for_check` cuts them.
        objective, nll_scope, budget_bytes, router: as in `choose`.

    Raises:
        ValueError: dropout inside attention is on.

    Example: `model` is that of `token_logps`, `group` that of `TokenGroup`.

        >>> from orpo.engine.choose import compare
        >>> agreement = compare(model, [group], ORPO())
        >>> agreement.holds, agreement.logp_difference < 1e-5
        (True, True)
    """
    core = shared.unwrap(model)
    parameters = _sampled_parameters(model)
    compute = Compute(_precision(model)) if compute is None else compute
    batch = collate(groups, nll_scope).to(computing_device(model))
    attention.register()
    called = model if compute.zero is None else compute.zero.engine
    is_training = model.training
    model.eval()  # the comparison must not depend on dropout; checkpointing recomputes the same values either way
    try:
        with torch.enable_grad(), compute.context(), trained_alone(model, parameters):  # the caller may be an evaluation
            # Of a model in parts one row after the other, since a process may have room for little more than its part; the router's loss
            # is of all tokens together.
            rows = one_by_one(batch, nll_scope) if is_in_parts(model) and router is None else [batch]
            expected = _added(_values(model, padded.step(called, row, objective, router=router), parameters, compute) for row in rows)
            with attention_implementation(core, attention.NAME):
                options: dict[str, Any] = {"budget_bytes": budget_bytes, "router": router, "kernel": kernel}
                result = shared.step(called, batch, objective, **options, gradient_scale=_scale(model, compute))
                found = _values(model, result, parameters, compute)
                if _has_dropout(model):
                    _run_with_dropout(model, batch, objective, budget_bytes)
    except BaseException as error:
        if is_in_parts(model) and not is_lost_contact(error):
            forget_gradients(model, compute.zero)  # or what was gathered would stay, and be added to
        raise
    finally:
        model.train(is_training)
    difference_N = (found[0] - expected[0]).abs()
    logp_difference = float(difference_N.max() if compute.dtype == torch.float32 else difference_N.mean())
    gradient_difference = _gradient_difference(found[1:], expected[1:], are_rows=compute.zero is not None)
    if is_in_parts(model):
        logp_difference, gradient_difference = _largest(logp_difference, gradient_difference, batch.input_ids_T.device)
    return Agreement(logp_difference, gradient_difference, compute.dtype, frozenset(batch.layout.windows))


def _largest(logp: float, gradient: float | None, device: torch.device) -> tuple[float, float | None]:
    """Of any rank: all come to one choice."""
    own = torch.tensor([logp, 0.0 if gradient is None else gradient], dtype=torch.float64, device=device)
    logp, largest = all_reduce_max(own.nan_to_num(nan=torch.inf)).tolist()
    return logp, None if gradient is None else largest


def _precision(model: nn.Module) -> torch.dtype:
    """The lowest precision that the model computes in. Layers of bitsandbytes convert their input."""
    dtypes: set[Any] = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    if getattr(shared.unwrap(model), "is_loaded_in_8bit", False):
        dtypes.add(torch.bfloat16)  # inputs are rounded to 8 bits, row by row
    return next((kind for kind in (torch.bfloat16, torch.float16) if kind in dtypes), torch.float32)


def _gradient_difference(found: list[Tensor], expected: list[Tensor], *, are_rows: bool) -> float | None:
    """The largest distance of a gradient from what it should be, relative to its norm; None where there is no gradient."""
    if not expected:
        return None
    norms = [_norm(gradient, are_rows=are_rows) for gradient in expected]
    floor = max(NEGLIGIBLE_GRADIENT * max(norms), 1e-12)
    return max(_norm(a - b, are_rows=are_rows) / max(norm, floor) for a, b, norm in zip(found, expected, norms, strict=True))


def _norm(gradient: Tensor, *, are_rows: bool) -> float:
    return float(norm_of([gradient], are_rows=are_rows) if are_rows or is_shard(gradient) else gradient.norm())


@contextmanager
def attention_implementation(core: Any, name: str) -> Iterator[None]:
    """The model under another attention implementation while the context lasts."""
    before = _attention_of(core)
    core.set_attn_implementation(name)
    try:
        yield
    finally:
        core.set_attn_implementation(before)


def _attention_of(core: Any) -> Any:
    return getattr(core.config, "_attn_implementation", None) or "sdpa"


def _obstacle(core: Any) -> str | None:
    """What rules the shared engine out before it is tried."""
    if not hasattr(core, "set_attn_implementation") or not hasattr(core, "get_output_embeddings"):
        return "it is not a transformers model"
    if core.get_output_embeddings() is None:
        return "it has no output embedding"
    return None


def _has_dropout(model: nn.Module) -> bool:
    """Whether any dropout is on: modules, and rates that attention layers keep as a number."""
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        if any(rates) or (isinstance(module, nn.Dropout) and module.p > 0):
            return True
    return False


def _run_with_dropout(model: nn.Module, batch: PreferenceBatch, objective: Objective, budget_bytes: int) -> None:
    """A forward in training mode: dropout inside attention raises there, whatever the model calls it. Leaves the random state alone."""
    device = batch.input_ids_T.device
    devices = [] if device.type == "cpu" else [device]
    model.train()
    with torch.random.fork_rng(devices), torch.no_grad():
        shared.step(model, batch, objective, budget_bytes=budget_bytes)
    reshard(model)


def _hidden_window(core: Any, longest: int, agreement: Agreement) -> str | None:
    """A restriction in the model's masks alone, of which packed attention hears nothing, that some row of the run is longer than.

    The rows of the check may be too short to show it (Qwen 2 MoE's window, Llama 4's chunks).
    """
    config = core.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("sliding_attention", "chunked_attention"))
    for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        size = getattr(config, name, None)
        if size is not None and size < longest and kind in kinds and size not in agreement.windows:
            return f"its {name} of {size} is in its masks alone, and there are rows of {longest} tokens"
    return None


def _sampled_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A few trainable weights from the first layer to the last: enough to see a wrong backward, little enough for any memory."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        return []
    picks = {round(position * (len(trainable) - 1) / 6) for position in range(7)}
    return [trainable[index] for index in sorted(picks)]


def _values(model: nn.Module, result: StepResult, parameters: list[nn.Parameter], compute: Compute) -> list[Tensor]:
    """Token log-probabilities, then gradients."""
    scale = _scale(model, compute)
    if not parameters:
        reshard(model)
        return [result.logp_N]
    gradients = gradients_of(result.loss if scale is None else result.loss * scale, parameters, model, compute.zero)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    found = [zero if gradient is None else gradient for gradient, zero in zip(gradients, zeros, strict=True)]
    return [result.logp_N, *(gradient.float() if scale is None else gradient.float() / scale for gradient in found)]


def _added(rows: Iterable[list[Tensor]]) -> list[Tensor]:
    """`_values` of one batch from those of its rows."""
    logps, *gradients = zip(*rows, strict=True)
    return [torch.cat(logps), *(sum(rest, first) for first, *rest in gradients)]


def _scale(model: nn.Module, compute: Compute) -> Tensor | None:
    """In fp16 small gradients would be 0 in both engines."""
    return torch.tensor(2.0**12, device=computing_device(model)) if compute.dtype == torch.float16 else None
