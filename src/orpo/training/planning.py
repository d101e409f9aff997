"""What a run will need, estimated from its configuration: memory, disk, time. No weights are loaded.

The model is built on the meta device, where tensors have shapes and no content. Its activations are counted there by the hook that
autograd saves tensors through, so that the count holds for any architecture.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orpo.engine.precision import WORKING_DEVICES
from orpo.models.adapters import ALL_LINEAR
from orpo.models.newtokens import positions_of
from orpo.run.config import read_model_config
from orpo.training.metamodel import meta_model
from orpo.training.recompute import AUTO, MemoryNeed, budget_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from orpo.config.options import ORPOConfig
    from orpo.data.types import TokenGroup
    from orpo.run.config import RunConfig
    from orpo.training.steps import StepPlan

logger = logging.getLogger(__name__)

# Bytes of optimizer state per trained weight, by the start of the optimizer's name; AdamW's two moments in float32 where none fits.
_OPTIMIZER_BYTES = {
    "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0, "adafactor": 0.1,
    "sgd": 0.0, "lion": 4.0, "paged_lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0, "adamw_torch_8bit": 2.0, "adamw_torch_4bit": 1.0,
}  # fmt: skip
_ADAMW_BYTES = 8.0
_STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_4BIT_BYTES, _NESTED_4BIT_BYTES, _8BIT_BYTES = 0.5625, 0.516, 1.06  # with the constants of their blocks
_PROBE_TOKENS = 256
_TYPICAL_ACTIVATIONS = 20
"""Numbers saved per token and layer, in widths of the model: 19 to 21 for the Llama family."""
_MATMUL_SHARE = 0.5
"""Share of the peak speed of matrix products that a training step reaches; between 0.3 (short rows, GPU) and 0.55 (measured on a CPU)."""
_CPU_RUNTIME_BYTES = 525 * 2**20
"""Python and the libraries in a training process, before a model is loaded (measured: torch 2.13, transformers 5.23). On a GPU they are
not in the device's memory."""
_EPOCHS_LOOKED_AT = 3
"""Every epoch is cut into other steps; the largest of a few is near the largest of all."""
_CHECKPOINTS_AT_ONCE = 3
"""Two stay whatever the limit, one is written before the oldest goes."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its needs.

    Attributes:
        num_parameters, num_trainable: weights in all, and those that are trained.
        num_matmul: weights that take part in matrix products (all but the input embeddings).
        vocab_size: columns of the logits.
        activation_bytes_per_token: saved for the backward pass, all layers, per packed token.
        layer_input_bytes_per_token: what is saved instead with gradient checkpointing.
        num_layers, layer_parameters: layers, and the weights of the largest.
        num_quantizable: weights of the linear layers, which bitsandbytes packs; embeddings, norms, the output head and experts that are one
            parameter stay as they are.
        num_head: weights of the output head, which is multiplied in a copy of the dtype of compute.
    """

    num_parameters: int
    num_trainable: int
    num_matmul: int
    vocab_size: int
    activation_bytes_per_token: float
    layer_input_bytes_per_token: float
    one_layer_bytes_per_token: float
    num_layers: int = 1
    layer_parameters: int = 0
    num_quantizable: int = 0
    num_head: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The estimate. Bytes are rounded to whole ones; times are None where nothing says how fast the machine is.

    `whole_activations_bytes` are the activations if no layer were computed again.
    """

    num_parameters: int
    num_trainable: int
    tokens_per_microbatch: int
    tokens_per_step: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    runtime_bytes: int
    checkpoint_bytes: int
    final_weights_bytes: int
    num_steps: int | None
    seconds_per_step: float | None
    num_layers: int = 0
    recomputed_layers: int = 0
    whole_activations_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Peak of device memory."""
        model = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return model + self.activations_bytes + self.logits_bytes + self.runtime_bytes

    def disk_bytes(self, save_total_limit: int | None, save_steps: float, *, has_checkpoints: bool = True) -> int:
        """What the run's folder will hold at most: checkpoints, one more being written, and the final weights."""
        if not has_checkpoints:
            return self.final_weights_bytes
        kept = max(save_total_limit + 1, _CHECKPOINTS_AT_ONCE) if save_total_limit is not None else None
        if self.num_steps is not None:
            every = max(1, round(save_steps if save_steps >= 1 else save_steps * self.num_steps))
            made = -(-self.num_steps // every)
            kept = made if kept is None else min(kept, made)
        return (kept or _CHECKPOINTS_AT_ONCE) * self.checkpoint_bytes + self.final_weights_bytes

    @property
    def total_seconds(self) -> float | None:
        """Time of all steps, without evaluation."""
        return None if self.seconds_per_step is None or self.num_steps is None else self.seconds_per_step * self.num_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "total_seconds": self.total_seconds}


def make_plan(
    config: RunConfig,
    args: ORPOConfig,
    *,
    row_tokens: float | None = None,
    largest_microbatch_tokens: int | None = None,
    num_rows: int | None = None,
    flops: float | None = None,
) -> Plan:
    """Estimate a run.

    Args:
        config, args: its configuration.
        row_tokens: mean packed tokens of a row; unset: as long as max_length allows.
        largest_microbatch_tokens: packed tokens of the largest micro-batch; unset: as large as the limits allow.
        num_rows: rows to train on; without them and without max_steps the number of steps is unknown.
        flops: speed of matrix products in the dtype of the run.

    Raises:
        UserError: the model's configuration cannot be read.
    """
    dtype = args.compute_dtype
    shape = model_shape(config, dtype)
    most = 2 * (args.max_length or positions_of(read_model_config(config)) or 4096)
    row = min(row_tokens or most, most)
    microbatch = largest_microbatch_tokens or max(most, min(args.microbatch_tokens, round(args.per_device_train_batch_size * row)))
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens_per_step = round(rows_per_step * row)
    num_steps: int | None = args.max_steps if args.max_steps > 0 else None
    if num_steps is None and num_rows is not None:
        num_steps = max(1, round(-(-num_rows // (rows_per_step * args.world_size)) * args.num_train_epochs))
    trained = shape.num_trainable
    weights, stored = _weight_bytes(config, shape, dtype)
    if _base_stays_in_its_file(config, args):
        weights -= frozen_bytes(config, shape)
    optimizer = round(trained * _optimizer_bytes(args))
    gradients = round(trained * _gradient_bytes(args))
    logits, runtime = _logits_bytes(shape, args, microbatch), _CPU_RUNTIME_BYTES if args.device.type == "cpu" else 0
    need = _need(shape, microbatch, fixed=weights + gradients + optimizer + logits + runtime)
    recomputed = _recomputed_layers(need, args)
    flops_per_token = (flops_per_weight(config, args) + 2 * recomputed / need.num_layers) * shape.num_matmul
    seconds = None if flops is None else tokens_per_step * flops_per_token / (flops * _MATMUL_SHARE)
    return Plan(
        num_parameters=shape.num_parameters,
        num_trainable=trained,
        tokens_per_microbatch=microbatch,
        tokens_per_step=tokens_per_step,
        weights_bytes=round(weights),
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=round(need.activations(recomputed)),
        logits_bytes=logits,
        runtime_bytes=runtime,
        checkpoint_bytes=round(stored) + (0 if args.save_only_model else optimizer),
        final_weights_bytes=round(stored),
        num_steps=num_steps,
        seconds_per_step=seconds,
        num_layers=need.num_layers,
        recomputed_layers=recomputed,
        whole_activations_bytes=round(need.activations(0)),
    )


def _need(shape: ModelShape, microbatch_tokens: int, *, fixed: float) -> MemoryNeed:
    outside = shape.activation_bytes_per_token - shape.num_layers * shape.one_layer_bytes_per_token
    return MemoryNeed(
        fixed,
        outside=microbatch_tokens * outside,
        layer=microbatch_tokens * shape.one_layer_bytes_per_token,
        layer_input=microbatch_tokens * shape.layer_input_bytes_per_token / shape.num_layers,
        num_layers=shape.num_layers,
    )


def _logits_bytes(shape: ModelShape, args: ORPOConfig, microbatch_tokens: int) -> int:
    return min(args.logits_budget_bytes, microbatch_tokens * shape.vocab_size * _COMPUTE_BYTES[args.compute_dtype])


def _recomputed_layers(need: MemoryNeed, args: ORPOConfig) -> int:
    if args.gradient_checkpointing == AUTO:
        # What a run would hold of its need before it starts is not held yet: the budget is that of a process that begins.
        return need.fewest(budget_bytes(args))
    return need.num_layers if args.gradient_checkpointing else 0


def weigh_model(model: Any, args: ORPOConfig, microbatch_tokens: int) -> MemoryNeed:
    """What a run of a loaded model needs of its device, by the layers that are computed again.

    Args:
        model: with its adapter, if it has one.
        microbatch_tokens: packed tokens of the largest micro-batch.
    """
    import torch

    from orpo.engine.parallel import num_elements
    from orpo.engine.shared import unwrap

    core, dtype = unwrap(model), args.compute_dtype
    weights = list(model.parameters())
    trained = sum(num_elements(weight) for weight in weights if weight.requires_grad)
    # Of float32 weights a copy in the dtype of compute is made.
    copies = sum(num_elements(weight) for weight in weights if weight.dtype == torch.float32) * (0 if dtype == "float32" else 2)
    per_token, one_layer, layer_inputs = _activation_bytes(core.config, getattr(torch, dtype))
    text = core.config.get_text_config()
    shape = ModelShape(
        num_parameters=sum(map(num_elements, weights)),
        num_trainable=trained,
        num_matmul=0,
        vocab_size=int(text.vocab_size),
        activation_bytes_per_token=per_token,
        layer_input_bytes_per_token=layer_inputs,
        one_layer_bytes_per_token=one_layer,
        num_layers=int(text.num_hidden_layers),
    )
    fixed = sum(num_elements(weight) * weight.element_size() for weight in weights) + copies
    fixed += trained * (_gradient_bytes(args) + _optimizer_bytes(args)) + _logits_bytes(shape, args, microbatch_tokens)
    return _need(shape, microbatch_tokens, fixed=fixed + (_CPU_RUNTIME_BYTES if args.device.type == "cpu" else 0))


def packed_lengths(groups: Sequence[TokenGroup], args: ORPOConfig) -> dict[str, Any]:
    """`row_tokens` and `largest_microbatch_tokens` of these rows, for `make_plan`: of the very steps that a run over them would take."""
    from orpo.training.steps import StepSampler

    sampler = StepSampler(
        groups,
        rows_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        max_rows=args.per_device_train_batch_size,
        max_tokens=args.microbatch_tokens,
        nll_scope=args.nll_scope,
        seed=args.seed if args.data_seed is None else args.data_seed,
        world_size=args.world_size,
    )

    def steps() -> Iterator[list[StepPlan]]:
        for epoch in range(_EPOCHS_LOOKED_AT if args.max_steps > 0 else min(math.ceil(args.num_train_epochs), _EPOCHS_LOOKED_AT)):
            sampler.set_epoch(epoch)
            yield from sampler

    seen = itertools.islice(steps(), args.max_steps if args.max_steps > 0 else None)
    largest = max(int(sampler.sizes[list(batch)].sum()) for plans in seen for plan in plans for batch in plan.microbatches)
    return {"row_tokens": float(sampler.sizes.mean()), "largest_microbatch_tokens": largest}


def flops_per_weight(config: RunConfig, args: ORPOConfig) -> int:
    """Operations per token and weight: 2 forward, 2 for the gradient of the input, 2 for that of a trained weight. Computing a layer again
    takes 2 more."""
    return 2 + 2 + (0 if config["use_peft"] else 2)


def _optimizer_bytes(args: ORPOConfig) -> float:
    return _OPTIMIZER_BYTES.get(str(getattr(args.optim, "value", args.optim)), _ADAMW_BYTES)


def _gradient_bytes(args: ORPOConfig) -> float:
    """Per trained weight: of the bf16 working weights that a single process computes with, else float32."""
    has_working_weights = args.device.type in WORKING_DEVICES and args.world_size == 1 and args.bf16_weights is not False
    return 2.0 if args.compute_dtype == "bfloat16" and has_working_weights else 4.0


def _weight_bytes(config: RunConfig, shape: ModelShape, dtype: str) -> tuple[float, float]:
    """(in memory, on disk) of the weights: float32 for trained ones, with a copy in the dtype of compute where that is lower."""
    trained = shape.num_trainable
    working = 2.0 if dtype != "float32" else 0.0
    if not config["use_peft"]:
        return trained * (4.0 + working), trained * 4.0
    return frozen_bytes(config, shape) + copy_bytes(config, shape, working) + trained * (4.0 + working), trained * 4.0


def frozen_bytes(config: RunConfig, shape: ModelShape) -> float:
    """What an adapter's base takes. What bitsandbytes does not pack is brought into float32 for the training, by PEFT."""
    if config["load_in_4bit"] or config["load_in_8bit"]:
        packed = _8BIT_BYTES if config["load_in_8bit"] else _NESTED_4BIT_BYTES if config["use_bnb_nested_quant"] else _4BIT_BYTES
        return shape.num_quantizable * packed + (shape.num_parameters - shape.num_quantizable) * 4.0
    return shape.num_parameters * _STORED_BYTES.get(config["dtype"] or "float32", 2.0)


def _base_stays_in_its_file(config: RunConfig, args: ORPOConfig) -> bool:
    """Whether an adapter's base is mapped from its files and let go of once its working copies are made (`WorkingWeights`)."""
    is_copied = args.compute_dtype == "bfloat16" and args.world_size == 1 and args.bf16_weights is not False
    is_plain = config["use_peft"] and not (config["load_in_4bit"] or config["load_in_8bit"]) and config["dtype"] in (None, "float32")
    stored = str(getattr(read_model_config(config), "dtype", None)).removeprefix("torch.")
    return args.device.type == "cpu" and is_copied and is_plain and stored == "float32"


def copy_bytes(config: RunConfig, shape: ModelShape, working: float) -> float:
    """Copies of an adapter's base in the dtype of compute, `working` bytes a weight: of all weights where they are float32, of the output
    head alone where the others are packed."""
    if config["load_in_4bit"] or config["load_in_8bit"]:
        return shape.num_head * working
    return shape.num_parameters * working if _STORED_BYTES.get(config["dtype"] or "float32", 2.0) == 4.0 else 0.0


def model_shape(config: RunConfig, dtype: str) -> ModelShape:
    """Count a model's weights and activations on the meta device.

    Raises:
        UserError: its configuration cannot be read, or its architecture cannot be built from it.
    """
    import torch
    from torch import nn

    from orpo.engine.parallel import decoder_layers

    model_config = read_model_config(config)
    model = meta_model(model_config, torch.float32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    is_tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    num_trainable = _num_adapter_weights(model, config) if config["use_peft"] else num_parameters
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if module is not head and (isinstance(module, nn.Linear) or _is_conv1d(module))]
    per_token, one_layer, layer_inputs = _activation_bytes(model_config, getattr(torch, dtype))
    return ModelShape(
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        num_matmul=num_parameters - (0 if is_tied else embeddings),
        vocab_size=int(model_config.get_text_config().vocab_size),
        activation_bytes_per_token=per_token,
        layer_input_bytes_per_token=layer_inputs,
        one_layer_bytes_per_token=one_layer,
        num_layers=int(model_config.get_text_config().num_hidden_layers),
        layer_parameters=max((sum(weight.numel() for weight in layer.parameters()) for layer in decoder_layers(model)), default=0),
        num_quantizable=sum(module.weight.numel() for module in linear),
        num_head=0 if head is None else head.weight.numel(),
    )


def _activation_bytes(model_config: Any, dtype: torch.dtype) -> tuple[float, float, float]:
    """Per packed token: (all layers, one layer, the inputs of all layers), from models of one and two layers."""
    num_layers, width = int(model_config.get_text_config().num_hidden_layers), int(model_config.get_text_config().hidden_size)
    try:
        few = [_saved_bytes(_with_layers(model_config, count), dtype) for count in (1, 2)]
    except Exception as error:  # an architecture may look at values, which meta tensors lack, or refuse to be shortened in ways of its own
        logger.debug("activations are guessed from the width alone: %s", error)
        few = [_PROBE_TOKENS * width * dtype.itemsize * _TYPICAL_ACTIVATIONS * count for count in (1, 2)]
    one_layer = max(few[1] - few[0], 0) / _PROBE_TOKENS
    rest = max(few[0] / _PROBE_TOKENS - one_layer, 0)
    layer_inputs = num_layers * width * dtype.itemsize
    return num_layers * one_layer + rest, one_layer, float(layer_inputs)


def _with_layers(model_config: Any, count: int) -> Any:
    smaller = copy.deepcopy(model_config)
    text = smaller.get_text_config()
    text.num_hidden_layers = count
    text.pad_token_id = smaller.pad_token_id = None  # some models search the ids for padding, and meta tensors have no values
    if vars(text).get("layer_types"):  # of some (Mamba, Jamba) it is a property that follows the number of layers
        text.layer_types = text.layer_types[:count]
    return smaller


def _saved_bytes(model_config: Any, dtype: torch.dtype) -> int:
    """Bytes that autograd saves in a forward pass without the output head, each storage once, weights aside."""
    import torch

    model = meta_model(model_config, dtype)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # kept alive, or its address would be used again
        return tensor

    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for key, storage in saved.items() if key not in own)


def _num_adapter_weights(model: PreTrainedModel, config: RunConfig) -> int:
    """Weights of the LoRA adapter: rank x (inputs + outputs) of each adapted linear layer, and the layers trained whole."""
    from torch import nn

    targets = config["lora_target_modules"]
    head = model.get_output_embeddings()
    total = 0
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in (config["lora_modules_to_save"] or ()):
            total += sum(parameter.numel() for parameter in module.parameters())
        rows_columns = tuple(module.weight.shape) if isinstance(module, nn.Linear) or _is_conv1d(module) else None
        if targets in (None, ALL_LINEAR):
            is_meant = module is not head
        else:
            is_meant = bool(re.fullmatch(targets, name)) if isinstance(targets, str) else last in targets
        if rows_columns is not None and is_meant:
            total += config["lora_r"] * sum(rows_columns)
    return total


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layers, whose weights stand the other way round."""
    return type(module).__name__ == "Conv1D"
