"""`ORPOTrainer`: transformers' Trainer around an optimizer step of our own.

The Trainer keeps what it is good at (arguments, callbacks, schedules, devices, trackers). This class owns what decides the result: which
rows a step holds and how it is normalised (`orpo.training.steps`), how log-probabilities are computed (`orpo.engine`), what is logged
(`orpo.training.metrics`), and what is saved and resumed (`orpo.training.saving`). To the Trainer one batch is one whole optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from orpo.checkpoint import current_ranks
from orpo.config.optimizers import explain_optimizer
from orpo.config.options import ORPOConfig
from orpo.data.stored.windows import WindowedGroups
from orpo.engine.choose import Compute, Engine, choose
from orpo.engine.fused import fused_modules
from orpo.engine.layout import PreferenceBatch
from orpo.engine.parallel import is_sharded, num_elements, reshard, synchronised
from orpo.engine.precision import WORKING_DEVICES, MasterAdamW, WorkingWeights, autocast_to
from orpo.errors import UserError
from orpo.models.adapters import raise_rate_of_b
from orpo.objective import METRICS, Objective, kind_of
from orpo.run.data import agree_on_rows
from orpo.run.folder import RunFolder
from orpo.run.scriptrows import as_eval_groups, as_training_groups
from orpo.system.allocator import keep_freed_memory, limit_kernel_cache, map_large_blocks, return_freed_memory
from orpo.system.files import make_run_folder
from orpo.system.group import alike, on_all
from orpo.system.ranks import Ranks, all_reduce_sum
from orpo.training.ahead import Ahead
from orpo.training.gradients import GradientMixin
from orpo.training.graphs import GraphsCallback
from orpo.training.guards import DivergenceGuard, NonFiniteGuard, ProofOfLearning, SignalGuard, first_cause
from orpo.training.guards.callbacks import DivergenceCallback, LearningCallback, SignalCallback
from orpo.training.loaders import LoaderMixin
from orpo.training.metrics import MetricsCallback, MetricSums, end_logps, means
from orpo.training.notebook import NotebookMixin
from orpo.training.outside import OutsideMixin
from orpo.training.saving import CheckpointMixin
from orpo.training.scaling import step_on_host
from orpo.training.search import SearchMixin
from orpo.training.setup import (
    check_best_metric,
    check_rows,
    prepared_model,
    refuse_arguments,
    refuse_overrides,
    require_kernel,
    require_reference,
    require_router_gradient,
    resolve_model,
    resolve_objective,
    use_one_gpu,
)
from orpo.training.spread import SpreadMixin
from orpo.training.steps import EpochCallback, StepBatch, only_item
from orpo.training.stopping import EarlyStopping

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class ORPOTrainer(LoaderMixin, CheckpointMixin, GradientMixin, SpreadMixin, OutsideMixin, SearchMixin, NotebookMixin, Trainer):
    """Trains a causal language model from preference pairs with the ORPO objective, in one stage and without a reference model.

    Source: ORPO (arXiv 2403.07691). A script for TRL's trainer of the same name runs with its import changed. A subclass with a method that
    nothing calls here, such as `compute_loss` or TRL's `odds_ratio_loss`, is refused with what to do instead.

    Args:
        model: a model, or its name: hub id, folder, GGUF file, or the alias `smollm2-135m-instruct`.
        args: options; `ORPOConfig()` if None.
        train_dataset: rows of any shape that `orpo.data.formats` knows (`datasets.Dataset`, list of dicts, path, hub id), or token groups.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; `tokenizer` is the same. If None, the model's own.
        model_init: makes the model anew for every `train()`, in place of `model`.
        callbacks, optimizers, compute_metrics, preprocess_logits_for_metrics: as in transformers; the last two need logits, which are never
            made, and are refused.
        peft_config: adapter to put on the model.
        objective: what to optimise, in place of the ORPO objective of `args`.

    Raises:
        UserError: anything wrong with the model, the data or the options, before anything is trained.

    Example: two steps on a file of pairs; a notebook shows `trainer` as a table with its curves.

        >>> from orpo import ORPOConfig, ORPOTrainer
        >>> config = ORPOConfig(output_dir="runs/two-steps", max_steps=2, learning_rate=1e-3, orpo_alpha=1.0, report_to="none")
        >>> trainer = ORPOTrainer(model="model", args=config, train_dataset="pairs.jsonl")
        >>> trainer.train().global_step
        {...
        2
        >>> trainer.save_model("tuned")
    """

    _tag_names = ("orpo",)
    control: TrainerControl
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Any = None,
        *,
        tokenizer: Any = None,
        objective: Objective | None = None,
    ) -> None:
        args = ORPOConfig() if args is None else args
        refuse_overrides(self, ORPOTrainer)
        refuse_arguments(
            data_collator=data_collator, compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics
        )
        if not isinstance(args, ORPOConfig):
            raise UserError(f"args is a {type(args).__name__}", where="args", expected="an orpo.ORPOConfig")
        limit_kernel_cache()  # not in train(): who scores or generates with this trainer before it must not come first
        if train_dataset is None:
            raise UserError("train_dataset is missing", where="ORPOTrainer")
        args.ensure_output_dir()
        use_one_gpu(args)
        require_kernel(args)
        self._own_objective = objective
        self.training_objective = resolve_objective(args) if objective is None else objective
        check_best_metric(self, args, eval_dataset)
        self._peft_config = peft_config
        self._engine: Engine | None = None
        self._working: WorkingWeights | None = None
        # Each part on all processes or on none: the others would wait for one that cannot read, or make, what they can.
        loaded, tokenizer = on_all(lambda: resolve_model(model, args, processing_class, tokenizer))
        train_groups, self.train_report, self.encoder = on_all(lambda: as_training_groups(train_dataset, tokenizer, args, loaded))
        eval_groups, self.eval_report = on_all(lambda: as_eval_groups(eval_dataset, tokenizer, args, train_groups, self.encoder))
        agree_on_rows(train_groups, eval_groups)
        loaded = None if loaded is None else on_all(lambda: prepared_model(loaded, args, peft_config, tokenizer, self.encoder))
        self.processing_class = tokenizer  # which model_init needs before the Trainer has set it
        if args.should_save:
            make_run_folder(str(args.output_dir))
        self.parallelism = args.spread
        with args.fsdp_hidden():
            super().__init__(
                model=loaded,
                args=args,
                data_collator=only_item,
                train_dataset=train_groups,
                eval_dataset=eval_groups,
                processing_class=tokenizer,
                model_init=model_init,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        check_rows(self.model, tokenizer, self.known_rows, eval_groups)
        self.tolerate_trackers()
        self.use_live_table()
        self.ranks = current_ranks()
        self.sums = MetricSums(self.args.device, world_size=self.args.world_size)
        self.run_folder = RunFolder(self.args.output_dir)
        self.add_callback(EpochCallback(self))
        self._stand_guard()
        self.add_callback(MetricsCallback(self.run_folder.metrics))
        self.train_sampler = self._train_sampler()

    def _stand_guard(self) -> None:
        """Guards against steps that are not finite, runs in which nothing learns or no longer does, and weights that are destroyed."""
        self.nonfinite = NonFiniteGuard(self.args.on_nonfinite, self.args.max_nonfinite_skips, ranks=self.ranks)
        self.learning = ProofOfLearning(kind=kind_of(self.training_objective))
        self.graphs = GraphsCallback()
        self.add_callback(self.graphs)
        self.add_callback(LearningCallback(self.learning, lambda: self._grad_norm))
        agreed = Ranks(self.ranks.rank, self.ranks.world_size)  # what it is given is that of all ranks already
        self.divergence = DivergenceGuard(len(self.processing_class), learning_rate=self.args.learning_rate, ranks=agreed)
        self.add_callback(DivergenceCallback(self.divergence, lambda: None if self.told is None else self.told.nll))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping())

    # ---- model and engine ----------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine of this model, chosen at first use by running the first rows through both."""
        if self._engine is None:
            if self.parallelism.spreads_weights:
                self.spread_weights(None)  # nobody has the weights whole to choose by
            self._engine = choose(
                self.model,
                self.known_rows,
                self.training_objective,
                requested=self.args.engine,
                nll_scope=self.args.nll_scope,
                budget_bytes=self.args.logits_budget_bytes,
                router_coef=self.args.router_aux_loss_coef,
                attention_kernel=self.args.attention_kernel,
                compute=Compute(self.compute_dtype, self._computing, self.zero if self.parallelism.spreads_weights else None),
                longest=self.train_dataset.longest_tokens if isinstance(self.train_dataset, WindowedGroups) else None,
            )
            require_router_gradient(self.args, self._engine.router)
        return self._engine

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matrix products; the objective is float32 whatever this is."""
        return getattr(torch, self.args.compute_dtype)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Low-precision compute: working weights for one process, weights gathered so where sharded, else autocast."""
        if self._uses_working_weights():
            with self._working_weights().active():
                yield
        elif is_sharded(self.model):  # gathered in the dtype of compute
            yield
        else:
            with autocast_to(self.args.device, self.compute_dtype):
                yield

    def _working_weights(self) -> WorkingWeights:
        if self._working is None:
            self._working = WorkingWeights(self.model, self.compute_dtype)
        return self._working

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; on working weights AdamW updates masters and copies in one visit."""
        wants_adamw = self.optimizer is None and self.args.optim in ("adamw_torch", "adamw_torch_fused") and not self.args.optim_args
        if wants_adamw and self._uses_working_weights() and self.optimizer_cls_and_kwargs is None:
            _, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs = (MasterAdamW, options)
        try:
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        except (ImportError, ValueError, TypeError, NotImplementedError) as error:
            raise explain_optimizer(error, str(getattr(self.args.optim, "value", self.args.optim)), given=self.args.optim_args) from error
        if self.args.loraplus_lr_ratio is not None:
            raise_rate_of_b(optimizer, self.model, self.args.loraplus_lr_ratio)
        if isinstance(optimizer, MasterAdamW):
            optimizer.working = self._working_weights()
        if self.accelerator.scaler is not None:
            step_on_host(optimizer)
        return optimizer

    def _uses_working_weights(self) -> bool:
        wanted = self.args.bf16_weights
        is_possible = self.compute_dtype == torch.bfloat16 and self.ranks.world_size == 1 and not self._is_sharded
        is_useful = self.args.device.type in WORKING_DEVICES if wanted is None else wanted
        return is_possible and is_useful

    # ---- training ------------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> TrainOutput:
        """Train. Arguments as in transformers; a checkpoint is resumed only if it verifies and belongs to this run.

        Raises:
            CheckpointError: the checkpoint is damaged, or data or configuration have changed since.
            GuardStop: loss or gradient is not finite, or nothing can learn.
            SignalStop: SIGTERM or SIGINT; one checkpoint was saved.
        """
        refuse_overrides(self, ORPOTrainer)  # what was put on the trainer since
        self.restore_accelerate()
        with ExitStack() as stack:
            stack.enter_context(self.trial_pruned(trial))
            self.begin_training(trial)
            self.forget_step(self.model)  # one that was cut short between its gradients and the optimizer
            hold = stack.enter_context(self.held(resume_from_checkpoint))
            stack.enter_context(first_cause(self.args.output_dir, self.ranks))
            guard = stack.enter_context(SignalGuard(ranks=self.ranks))
            self._signals = SignalCallback(guard, self.save_now, lambda: None if self.told is None else self.told.signum)
            self.told = None
            self._ahead = Ahead(is_pinned=self.args.device.type == "cuda" and self.args.dataloader_pin_memory)
            stack.callback(self._ahead.close)
            self.add_callback(self._signals)
            stack.callback(self.remove_callback, self._signals)
            require_reference(self.training_objective, self.known_rows, self.eval_dataset)
            if self.parallelism.spreads_weights:
                self.spread_weights(self.checkpoint_to_read(hold))
            # Chosen before the model is wrapped; of a model in parts by all together, who come to one answer.
            engine = (alike if self.parallelism.spreads_weights else on_all)(lambda: self.engine)
            checkpoint = self.checkpoint_to_resume(hold)
            self._make_room()  # that of the choice
            if self.args.device.type == "cpu":
                (map_large_blocks if self._is_sharded else keep_freed_memory)()
            if not self.compiling(stack) and self.args.device.type == "cpu" and engine.name == "shared":
                stack.enter_context(fused_modules(self.model))
            self.recomputed_layers = stack.enter_context(self.recomputing())
            if not self.parallelism.spreads_weights:
                self.spread_weights(checkpoint)
            self.settle_ddp(engine)
            stack.enter_context(guard.hold())
            stack.enter_context(self._whole_steps(is_resumed=checkpoint is not None))
            is_complete = checkpoint is not None and self.is_complete_at(checkpoint)
            hold.make_room()
            if checkpoint is not None and is_complete:
                return self.restore_complete(checkpoint)
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    @contextmanager
    def _whole_steps(self, *, is_resumed: bool) -> Iterator[None]:
        """What the Trainer may see while it trains: one batch is one step, it rotates no checkpoints, a resumed run does not start anew."""
        # The Trainer finds its optimizer step by counting batches against the accumulation; here every batch is a whole step. Its own
        # rotation would delete all but the best checkpoint at the end, and its evaluation at the start would be made again on resume.
        hidden = {"gradient_accumulation_steps": 1, "save_total_limit": None, **({"eval_on_start": False} if is_resumed else {})}
        if self.recomputes_here:
            names = ("gradient_checkpointing", "activation_checkpointing")
            hidden |= {name: False for name in names if hasattr(self.args, name)}
        self.hidden_args = {name: getattr(self.args, name) for name in hidden}
        for name, value in hidden.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            for name, value in self.hidden_args.items():
                setattr(self.args, name, value)
            self.hidden_args = {}

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None) -> Tensor:
        """One whole optimizer step up to the gradients: every micro-batch forward and backward, then the norm, the clip, the guard.

        Returns:
            The step's loss, this rank's part times the number of ranks, so that the mean over ranks is the loss.
        """
        self.restore_accelerate()
        self.sums.start()
        with self.whole_or_nothing(model):
            loss = self._compute_step(model, inputs)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self.sums.stop()
        return loss

    def _compute_step(self, model: nn.Module, inputs: StepBatch) -> Tensor:
        model.train()
        # Schedule-free optimizers have two sets of weights, one to train and one to evaluate with, and have to be told.
        if callable(optimizer_train := getattr(self.optimizer, "train", None)):
            optimizer_train()
        loss = torch.zeros((), device=self.args.device)
        logps: list[Tensor] = []
        last, scale = len(inputs.microbatches) - 1, self.loss_scale
        sent = [microbatch.to(self.args.device) for microbatch in inputs.microbatches]  # all at once: nobody waits for a copy
        for number, microbatch in enumerate(inputs.microbatches):
            self.begin_micro_batch(is_last=number == last)
            with synchronised(self.accelerator, model, is_last=number == last), self._computing():
                result = self.engine.step(self.called(model), sent[number], self.training_objective, gradient_scale=scale)
                self.spread_backward(result.loss)
            loss += result.loss.detach()
            logps.append(result.logp_N)
            self.sums.add(result.sums, num_tokens=microbatch.num_tokens, end_logps=end_logps(microbatch, result.logp_N))
            self.sums.add_routing(result.router)
        if self._working is not None:
            self._release_gradients()
        self.sums.end_step(loss, inputs.num_rows)
        self._finish_gradients(model, loss, inputs, logps)
        return loss

    def compute_loss(self, model: nn.Module, inputs: StepBatch, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Loss of a step's micro-batches with a graph to the model, for callers of transformers' interface; training does not use it."""
        results = [self.engine.step(model, batch.to(self.args.device), self.training_objective) for batch in inputs.microbatches]
        loss = torch.stack([result.loss for result in results]).sum()
        return (loss, {"logp_N": [result.logp_N for result in results]}) if return_outputs else loss

    def floating_point_ops(self, inputs: StepBatch) -> int:
        """6 floating-point operations per weight and packed token: forward, and twice that backward."""
        num_tokens = sum(batch.num_tokens for batch in inputs.microbatches)
        return 6 * num_tokens * sum(map(num_elements, self.model.parameters()))

    @property
    def _reward_scale(self) -> float | None:
        return kind_of(self.training_objective).reward_scale(self.training_objective)

    # ---- logs and evaluation -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs become the exact means since the last log; others pass as they are."""
        if "loss" in logs and "learning_rate" in logs:
            logs |= self.with_scale(self.sums.take(reward_scale=self._reward_scale, reduce=all_reduce_sum))
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics over all rows, each counted once on one rank, normalised together."""
        _ = self.engine  # chosen on the model as it is, not in the middle of low-precision compute
        is_training = self.model.training
        self.model.eval()
        totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=self.args.device)
        self._make_room()
        for inputs in dataloader:
            for microbatch in inputs.microbatches:
                result = self._evaluate_microbatch(microbatch)
                totals[:-1] += result.sums
                totals[-1] += result.loss / self.args.world_size  # a rank divides by its share of the counts, as in training
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reshard(self.model)
        self._make_room()
        self.model.train(is_training)
        *values, loss = all_reduce_sum(totals).tolist()
        found = means(dict(zip(METRICS, values, strict=True)), reward_scale=self._reward_scale)
        found.pop("grad_share/odds_ratio", None)  # of gradients, which an evaluation does not make
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {"loss": loss, **found}.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))  # type: ignore[arg-type]

    def _make_room(self) -> None:
        """Between steps and an evaluation, whose tensors have other shapes: or what one has freed would lie beside what the other needs."""
        if self.args.device.type == "cpu":
            return_freed_memory()
            if self._working is not None:
                self._working.set_frozen_aside()

    def _evaluate_microbatch(self, microbatch: PreferenceBatch) -> Any:
        with torch.no_grad(), self._computing():
            return self.engine.step(self.model, microbatch.to(self.args.device), self.training_objective)
