"""The part of the trainer that fits a model into memory: its weights spread over ranks, in place of accelerate's own FSDP, and layers
computed again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from orpo.config.parallelism import Parallelism
from orpo.data.types import TokenGroup
from orpo.engine.choose import Engine, has_unused_weights
from orpo.engine.parallel import decoder_layers, is_sharded, shard
from orpo.engine.zero import Zero
from orpo.errors import UserError
from orpo.objective import Objective
from orpo.system.allocator import map_large_blocks, return_freed_memory
from orpo.system.group import on_all
from orpo.system.parts import has_weights_in_parts
from orpo.system.ranks import Ranks
from orpo.training.compiling import compile_layers
from orpo.training.planning import packed_lengths, weigh_model
from orpo.training.recompute import AUTO, fewest_layers, recomputed

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SpreadMixin(_Base):
    """Spreading, layers computed again, and compiled ones for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    parallelism: Parallelism
    optimizer: Any
    training_objective: Objective
    before_sharding: Callable[[], None] = staticmethod(lambda: None)
    """Called when the weights are whole for the last time."""
    load_whole_weights: Callable[[str | None], None]
    ranks: Ranks
    args: Any
    recomputed_layers: int | None = None
    compiled: str | None = None
    zero: Zero | None = None
    """What DeepSpeed holds, once it does."""

    if TYPE_CHECKING:

        @property
        def known_rows(self) -> Sequence[TokenGroup]:
            """Of `LoaderMixin`."""

    @property
    def _is_sharded(self) -> bool:
        return self.parallelism.is_sharded

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, without accelerate's own FSDP."""
        with self.args.fsdp_hidden():
            super().create_accelerator_and_postprocess()
        self._accelerate_state = [(kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]

    def restore_accelerate(self) -> None:
        """Put back what accelerate keeps for the whole process, where another configuration has emptied it.

        transformers does so whenever one is made, and only a trainer made of it fills it again; this trainer would not go on without.
        """
        for state, values in self._accelerate_state:
            if not state:
                state.update(values)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As in transformers; a model that is on the CPU stays as it is: `cpu:0`, as a process of several has it, would make a copy.

        One whose layers are brought to the device as they are spread is never there whole.
        """
        if self.parallelism.spreads_weights:  # not `args`, which hide FSDP while transformers' Trainer is made
            return
        if device.type != "cpu" or any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
            super()._move_model_to_device(model, device)

    def recomputing(self) -> AbstractContextManager[int | None]:
        """`gradient_checkpointing: auto`: as few layers computed again as fit, the same number on every rank."""
        settings = self.args.gradient_checkpointing_kwargs
        if not self.recomputes_here:
            return nullcontext()
        if self.args.gradient_checkpointing is True:
            return recomputed(self.model, len(decoder_layers(self.model)), settings)
        need = weigh_model(self.model, self.args, packed_lengths(self.known_rows, self.args)["largest_microbatch_tokens"])
        count = self.ranks.max([fewest_layers(self.model, need, self.args)])[0]
        return recomputed(self.model, count, settings)

    @property
    def recomputes_here(self) -> bool:
        """Whether layers are computed again by need, or around their compiled form; else it is transformers' part."""
        wanted = self.args.gradient_checkpointing
        return wanted == AUTO or bool(wanted and self.args.torch_compile)

    def compiling(self, stack: ExitStack) -> bool:
        """`torch_compile: true`: the layers compiled until the stack is closed; whether they are, which `how_computed` tells too."""
        if not self.args.torch_compile:
            return False
        problem = compile_layers(self, stack)
        self.compiled = "yes" if problem is None else f"no: {problem}"
        return problem is None

    @property
    def how_computed(self) -> dict[str, Any]:
        """For run.json: engine and kernel, the router's loss of a mixture of experts, layers computed again, whether they are compiled."""
        engine: Engine = self.engine
        router = engine.router
        return {
            "engine": engine.name,
            "attention_kernel": engine.kernel,
            "router": None if router is None else {"aux_loss_coef": router.coef, "experts_per_token": router.top_k},
            "recomputed_layers": self.recomputed_layers,
            "compiled": self.compiled,
        }

    def spread_weights(self, checkpoint: str | None) -> None:
        """Spread the weights over the ranks, those of a checkpoint that has them whole too."""
        if not self._is_sharded:
            return
        if is_sharded(self.model):
            self._refuse_whole(checkpoint)
            return
        is_read_here = self.ranks.is_first or not self.parallelism.spreads_weights
        on_all(lambda: self.load_whole_weights(checkpoint) if is_read_here else None)
        self.before_sharding()
        if self.args.device.type == "cpu":
            map_large_blocks()
        self._start_zero() if self.parallelism.zero else self._shard()
        if self.args.device.type == "cpu":
            return_freed_memory()  # the weights as they were whole
        self.model._is_accelerate_prepared = True  # or accelerate would put DDP around it
        self._keep_as_spread(self.model)

    def _refuse_whole(self, checkpoint: str | None) -> None:
        if self.parallelism.spreads_weights and checkpoint is not None and not has_weights_in_parts(checkpoint):
            raise UserError(
                "this trainer has spread its weights already, and the checkpoint's are whole",
                where=checkpoint,
                mend="call train(resume_from_checkpoint=…) on a new trainer, before anything is evaluated",
            )

    def _keep_as_spread(self, model: nn.Module) -> None:
        """The same for accelerate before 1.15, which looks at the mark on optimizers alone."""
        prepare = self.accelerator.prepare_model

        def prepare_model(other: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
            return other if other is model else prepare(other, *arguments, **keywords)

        self.accelerator.prepare_model = prepare_model

    def begin_micro_batch(self, *, is_last: bool) -> None:
        """Before the forward pass of a micro-batch of a step."""
        if self.zero is not None:
            self.zero.begin_micro_batch(is_last=is_last)

    def called(self, model: nn.Module) -> Any:
        """The model as a training step calls it."""
        return model if self.zero is None else self.zero.engine

    def spread_backward(self, loss: Tensor) -> None:
        """Gradients of this rank's part of a step's loss, which is already divided by the whole step's counts, times the ranks."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:  # DDP and ZeRO take the mean over ranks; FSDP's shards are summed.
            self.accelerator.backward(loss / self.args.world_size if self._is_sharded else loss)

    def settle_ddp(self, engine: Engine) -> None:
        """Turn off DDP's search for weights without a gradient, which walks the graph in every micro-batch, where there are none."""
        wrapper = self.accelerator.ddp_handler
        if self._is_sharded or self.args.world_size == 1 or self.args.ddp_find_unused_parameters is not None or wrapper is None:
            return
        if wrapper.find_unused_parameters:
            wrapper.find_unused_parameters = has_unused_weights(self.model, engine, self.known_rows, self.training_objective)

    def _start_zero(self) -> None:
        self.zero = Zero(
            self.model,
            decoder_layers(self.model),
            self.create_optimizer,
            settings=self.parallelism.zero,
            device=self.args.device,
            dtype=getattr(torch, self.args.compute_dtype),
            max_grad_norm=self.args.max_grad_norm or 0.0,
        )
        self.optimizer = self.zero.optimizer

    def _shard(self) -> None:
        wanted = self.parallelism
        per_replica = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if wanted.is_hybrid else 0
        shard(
            self.model,
            device=self.args.device,
            dtype=getattr(torch, self.args.compute_dtype),
            layers=wanted.layers,
            reshards=wanted.reshards,
            offloads=wanted.offloads,
            per_replica=per_replica,
        )
