"""What `gpu.py` compares: ways to take the same optimizer step on the same model, each built once per cell.

Every arm works on one model and one optimizer, so that they fit into memory and can take turns. What an arm has besides (our copies of
the weights, Liger's kernels in the model) is there in its turns alone. TRL's trainer and ours are the real ones; what their `train()` does
around a step (data order, schedule, callbacks) is left out on both sides.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from orpo.data.types import TokenGroup

MAX_LENGTH = 4096


class CannotRunError(Exception):
    """This arm is not to be had here, and why."""


@dataclass
class Cell:
    """One model with one mix of lengths, loaded.

    Attributes:
        model, tokenizer, optimizer: shared by all arms.
        groups: rows, enough for all steps; rows: the same as texts, one for each pair.
        pairs_per_row: pairs of each group.
        dtype: of compute.
    """

    model: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    groups: list[TokenGroup]
    rows: list[dict[str, str]]
    pairs_per_row: int
    dtype: torch.dtype
    is_lora: bool
    working: Any = None
    master: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def copies(self, trainer: Any, parameters: list[Any]) -> tuple[Any, Any]:
        """(our low-precision copies of the weights, the optimizer that keeps them up on the same state): one of each for all our arms."""
        from orpo.engine.precision import MasterAdamW, WorkingWeights

        if self.working is None:
            self.working = WorkingWeights(self.model, trainer.compute_dtype)
            self.master = MasterAdamW(parameters, lr=self.optimizer.param_groups[0]["lr"], weight_decay=0.0)
            self.master.state, self.master.working = self.optimizer.state, self.working
        return self.working, self.master

    def forget_copies(self) -> None:
        """Give the memory of our copies back."""
        if self.working is not None:
            self.working.close()
        self.working = self.master = None

    def low_precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()


@dataclass
class Arm:
    """A way to take a step. `kind` is trl, liger-loss or ours."""

    name: str
    kind: str
    checkpointing: bool = False
    with_liger: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    is_extra: bool = False
    """Of interest, and neither side's best: measured when everything else is."""

    @property
    def side(self) -> str:
        """Whose it is; TRL with Liger's kernels counts as TRL."""
        return "orpo" if self.kind == "ours" else "TRL"

    @property
    def compiles(self) -> bool:
        """Whether its first step is mostly a compiler's."""
        return self.compiled or self.options.get("attention_kernel") == "flex"

    def build(self, cell: Cell) -> Any:
        """Something with `turn()`, a context in which it may make steps, and in it `step(first, rows, micro)`: on that many rows from
        `first` on, cut into micro-batches of `micro` rows.

        Raises:
            CannotRunError: not here.
        """
        if (self.with_liger or self.kind == "liger-loss") and importlib.util.find_spec("liger_kernel") is None:
            raise CannotRunError("liger-kernel is not installed")
        if (self.with_liger or self.kind == "liger-loss") and cell.device.type != "cuda":
            raise CannotRunError("Liger's kernels need a GPU")
        if self.kind != "ours" and importlib.util.find_spec("trl") is None:
            raise CannotRunError("trl is not installed")
        return {"trl": Trl, "liger-loss": LigerLoss, "ours": Ours}[self.kind](cell, self)


ARMS = (
    Arm("TRL, Liger's model kernels", "trl", with_liger=True),
    Arm("orpo, varlen", "ours", options={"attention_kernel": "varlen"}),
    Arm("TRL", "trl"),
    Arm("orpo, sdpa", "ours", options={"attention_kernel": "sdpa"}),
    Arm("Liger's fused ORPO loss", "liger-loss", with_liger=True),
    Arm("orpo, flex", "ours", options={"attention_kernel": "flex"}),
    Arm("TRL, checkpointing", "trl", checkpointing=True),
    Arm("orpo, padded", "ours", options={"engine": "padded"}, is_extra=True),
    Arm("orpo, varlen, compiled", "ours", options={"attention_kernel": "varlen"}, compiled=True, is_extra=True),
    Arm("orpo, sdpa, compiled", "ours", options={"attention_kernel": "sdpa"}, compiled=True, is_extra=True),
)
"""In the order in which they are tried: sides in turn, likely winners first."""


class _Stepper:
    def __init__(self, cell: Cell, arm: Arm) -> None:
        self.cell, self.arm = cell, arm
        self.parameters = [parameter for parameter in cell.model.parameters() if parameter.requires_grad]
        self.optimizer = cell.optimizer

    def turn(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def step(self, first: int, rows: int, micro: int) -> None:
        self._set_checkpointing()
        self.cell.model.train()
        self.gradients(first, rows, micro)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, first: int, rows: int, micro: int) -> None:
        raise NotImplementedError

    def _set_checkpointing(self) -> None:
        if self.arm.checkpointing:
            self.cell.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.cell.model.gradient_checkpointing_disable()


class Trl(_Stepper):
    """TRL's ORPOTrainer: its own tokenisation, collator and loss."""

    def __init__(self, cell: Cell, arm: Arm) -> None:
        super().__init__(cell, arm)
        from datasets import Dataset
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        config = ORPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=cell.device.type == "cpu", bf16=False, report_to="none", max_length=MAX_LENGTH,
            gradient_checkpointing=False, disable_tqdm=True, beta=0.1,
        )  # fmt: skip
        self.trainer = ORPOTrainer(
            model=cell.model, args=config, train_dataset=Dataset.from_list(cell.rows), processing_class=cell.tokenizer
        )
        self.rows = self.trainer.train_dataset

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Without our copies in memory, and with Liger's kernels in the model where it is to have them."""
        self.cell.forget_copies()
        # An arm of ours that was refused has left accelerate's shared state empty.
        Accelerator(cpu=self.cell.device.type == "cpu")
        with liger_kernels(self.cell.model) if self.arm.with_liger else nullcontext():
            yield

    def gradients(self, first: int, rows: int, micro: int) -> None:
        """As its training loop does: every micro-batch, then the clip."""
        pairs = range(first * self.cell.pairs_per_row, (first + rows) * self.cell.pairs_per_row)
        starts = range(pairs.start, pairs.stop, micro * self.cell.pairs_per_row)
        self.trainer.current_gradient_accumulation_steps = len(starts)
        for start in starts:
            batch = [self.rows[index] for index in range(start, min(start + micro * self.cell.pairs_per_row, pairs.stop))]
            with self.cell.low_precision():
                self.backward(self.trainer.data_collator(batch), len(starts))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)

    def backward(self, batch: dict[str, Any], num_microbatches: int) -> None:
        self.trainer.training_step(self.cell.model, batch)


class LigerLoss(Trl):
    """Liger's fused ORPO loss on TRL's batches: the head and the loss in one, by chunks of pairs."""

    def backward(self, batch: dict[str, Any], num_microbatches: int) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        joined = self.trainer.concatenated_inputs(batch, is_encoder_decoder=False, padding_value=self.trainer.padding_value)
        ids, mask, labels = (joined[f"concatenated_{name}"].to(self.cell.device) for name in ("input_ids", "attention_mask", "labels"))
        core = self.cell.model.get_base_model() if self.cell.is_lora else self.cell.model
        hidden = core.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        nll_labels = ids.masked_fill(mask == 0, -100)
        loss, *_ = LigerFusedLinearORPOLoss(beta=0.1)(
            core.lm_head.weight.to(hidden.dtype), hidden[:, :-1], labels[:, 1:], None, nll_labels[:, 1:]
        )
        (loss / num_microbatches).backward()


class Ours(_Stepper):
    """This trainer's own `training_step`: engine, norm, clip and guard."""

    def __init__(self, cell: Cell, arm: Arm) -> None:
        super().__init__(cell, arm)
        from orpo import ORPOConfig, ORPOTrainer
        from orpo.errors import UserError

        options = {"engine": "shared", **arm.options} if "engine" not in arm.options else arm.options
        try:
            config = ORPOConfig(
                output_dir=tempfile.mkdtemp(), use_cpu=cell.device.type == "cpu", bf16=cell.dtype == torch.bfloat16, report_to="none",
                max_length=MAX_LENGTH, disable_tqdm=True, orpo_alpha=0.1, **options,
            )  # fmt: skip
            self.trainer = ORPOTrainer(model=cell.model, args=config, train_dataset=cell.groups, processing_class=cell.tokenizer)
            with self.turn():
                _ = self.trainer.engine  # compared with the padded one, in this precision and with this kernel
        except UserError as error:
            raise CannotRunError(str(error).splitlines()[0]) from error
        self.forwards = self._compiled_forwards()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """With the working copies, as `train()` has them in bf16, brought up to what other arms' steps have made of the weights."""
        if self.trainer._uses_working_weights():
            self.trainer._working, self.optimizer = self.cell.copies(self.trainer, self.parameters)
            with self.trainer._computing():
                pass
        self.trainer.optimizer = self.optimizer
        try:
            yield
        finally:
            self.trainer._working, self.optimizer = None, self.cell.optimizer
            self.trainer.optimizer = self.optimizer

    def gradients(self, first: int, rows: int, micro: int) -> None:
        from orpo.engine import attention
        from orpo.engine.choose import attention_implementation
        from orpo.engine.shared import unwrap
        from orpo.training.steps import StepDataset, StepSampler

        groups = self.cell.groups[first : first + rows]
        sampler = StepSampler(groups, rows_per_step=len(groups), max_rows=micro, max_tokens=2**30)
        batch = StepDataset(groups)[sampler.plan(range(len(groups)))]
        name = attention.NAME if self.trainer.engine.name == "shared" else "sdpa"
        with attention_implementation(unwrap(self.cell.model), name), self._compiled():
            self.trainer.training_step(self.cell.model, batch)

    def _compiled_forwards(self) -> list[Any]:
        """The decoder layers' forward as `torch_compile: true` makes it; kept, or every turn would compile anew."""
        from orpo.engine.compiled import compiled_layers
        from orpo.engine.parallel import decoder_layers

        self.layers = decoder_layers(self.cell.model) if self.arm.compiled else []
        with compiled_layers(self.cell.model) if self.arm.compiled else nullcontext():
            return [layer.forward for layer in self.layers]

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


@contextmanager
def liger_kernels(model: Any) -> Iterator[None]:
    """Liger's kernels in the model while the context lasts; what they change in transformers' own module comes back."""
    import sys

    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = sys.modules[type(core).__module__]
    names = dict(vars(module))
    own = {kind: dict(vars(kind)) for kind in names.values() if isinstance(kind, type) and kind.__module__ == module.__name__}
    instances = {part: dict(vars(part)) for part in core.modules()}
    options = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
    MODEL_TYPE_TO_APPLY_LIGER_FN[core.config.model_type](model=core, **options)
    try:
        yield
    finally:
        vars(module).update(names)
        for kind, attributes in own.items():
            for name, value in attributes.items():
                if callable(value) and vars(kind).get(name) is not value:
                    setattr(kind, name, value)
        for part, attributes in instances.items():
            for name in [name for name in vars(part) if name not in attributes]:
                delattr(part, name)
