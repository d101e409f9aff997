"""A training run from a resolved configuration: data first, then the model, then training, in a folder that can be resumed.

What the command line, the demo and the recipes share. Nothing here prints; `tell` receives each line for the user.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from orpo.config.options import ORPOConfig
from orpo.engine.parallel import is_sharded, num_elements, whole_state
from orpo.errors import GuardStop, SignalStop, UserError
from orpo.objective import kind_of
from orpo.run.config import RunConfig, as_facts
from orpo.run.data import RunData, Tell, agree_on_rows, prepare_data
from orpo.run.folder import COMPLETE, FAILED, RUNNING, STOPPED, RunFolder, final_weights
from orpo.run.hold import RunHold, is_complete, options_as_facts, run_as_facts
from orpo.run.keys import RunKeys
from orpo.system.allocator import return_freed_memory
from orpo.system.files import check_writable
from orpo.system.group import agree, on_all
from orpo.system.machine import describe_device, memory_facts, peak_memory_bytes, versions
from orpo.system.plugins import loaded_plugins
from orpo.system.ranks import current_ranks
from orpo.system.redact import redact, redact_text
from orpo.training.guards import SignalGuard, first_cause
from orpo.training.setup import require_kernel
from orpo.training.startmodel import load_run_model, require_spreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orpo.models.load import LoadedModel
    from orpo.training.trainer import ORPOTrainer

logger = logging.getLogger(__name__)


_NLL = {"sequence": "next-token loss (prompt and chosen answer)", "response": "next-token loss (chosen answer)"}


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        folder: the run's folder.
        weights: final weights inside it; None where training was complete before.
        metrics: final evaluation, or an empty dict.
        is_already_complete: nothing was done, since the run was complete.
    """

    folder: Path
    weights: Path | None
    metrics: dict[str, float]
    is_already_complete: bool = False


def build_trainer(
    config: RunConfig,
    args: ORPOConfig,
    data: RunData,
    model: Any,
    callbacks: list[TrainerCallback],
    *,
    trainer_class: type[ORPOTrainer] | None = None,
) -> ORPOTrainer:
    """The trainer, without transformers' own bars."""
    from transformers import PrinterCallback, ProgressCallback

    from orpo.training.trainer import ORPOTrainer

    args.model_init_kwargs = None  # used by load_run_model; the trainer refuses them together with a model that is loaded
    args.disable_tqdm = True
    args.log_level_replica = "error"  # transformers turns the other processes' notes on again
    try:
        trainer = (trainer_class or ORPOTrainer)(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=data.tokenizer,
            peft_config=on_all(lambda: _peft_config(config, data, model)),
            callbacks=callbacks,
        )
    except UserError as error:
        raise _by_key(error) from error
    trainer.encoder, trainer.train_report, trainer.eval_report = data.encoder, data.train_report, data.held_out_report
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


_KEY_OF = {
    "peft_config": "use_peft",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
}
"""What the trainer's arguments are called in a configuration."""


def _by_key(error: UserError) -> UserError:
    """An error about an argument of the trainer, about the key that the user knows."""
    key = _KEY_OF.get(error.where or "")
    if key is None:
        return error
    mend = error.mend and error.mend.replace(str(error.where), key)
    return UserError(error.what, where=key, expected=error.expected, mend=mend)


def _peft_config(config: RunConfig, data: RunData, model: Any) -> Any:
    from orpo.models.newtokens import with_new_tokens

    wanted = config.peft_config()
    return wanted and with_new_tokens(wanted, model, data.tokenizer.convert_tokens_to_ids(list(data.encoder.new_tokens)))


class Observer:
    """Looks at a run's model before and after training; the demo scores held-out pairs there. Does nothing by itself."""

    def before(self, trainer: ORPOTrainer, data: RunData) -> None:
        """The model still has its starting weights, also where the run will be resumed."""

    def after(self, trainer: ORPOTrainer, data: RunData) -> None:
        """The model has its final weights; they are saved."""


def run_training(
    config: RunConfig,
    tell: Tell,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    command: str = "train",
    observer: Observer | None = None,
    data: RunData | None = None,
    trainer_class: type[ORPOTrainer] | None = None,
) -> RunResult:
    """Train as configured; resume what was interrupted, do nothing where all is done.

    Args:
        config: from `orpo.run.config.resolve`.
        tell: receives each line for the user; called on the first process alone.
        callbacks: more callbacks for the trainer, such as a progress bar.
        command: what run.json says the run was started by.
        observer: looks at the model before and after.
        data: rows that are prepared already, in place of those that the configuration names.
        trainer_class: a kind of `ORPOTrainer`.

    Raises:
        UserError: anything wrong with configuration, data, model or folder.
        GuardStop, SignalStop: as `ORPOTrainer.train`.
    """
    with SignalGuard():  # while data and model are prepared; training has its own inside
        return _run_training(config, tell, callbacks, command, observer or Observer(), data, trainer_class)


def _run_training(
    config: RunConfig,
    tell: Tell,
    callbacks: Sequence[TrainerCallback],
    command: str,
    observer: Observer,
    data: RunData | None,
    trainer_class: type[ORPOTrainer] | None,
) -> RunResult:
    args = config.training_args()
    require_kernel(args)  # before rows and weights are read
    run_keys = {item.name: config[item.name] for item in dataclasses.fields(RunKeys)}  # the trainer's own are compared with its folder
    agree({**redact(run_keys), **{name: version for name, version in versions().items() if name != "platform"}})
    on_all(lambda: require_spreadable(config, args))
    tell = tell if args.process_index == 0 else lambda line: None
    for note in config.notes:
        tell(f"note         {note}")
    folder = RunFolder(args.ensure_output_dir())
    on_all(lambda: check_writable(folder.path))
    with RunHold(folder.path, ranks=current_ranks()) as hold:
        if on_all(lambda: is_complete(folder, config)):
            return RunResult(folder.path, final_weights(folder.path), {}, is_already_complete=True)
        tell(f"folder       {folder.path}")
        hold.look_for(args.resume_from_checkpoint, or_newest=True)
        on_all(lambda: _require_same_run(hold, config, args))
        with first_cause(folder.path, current_ranks()):  # also for what goes wrong on one process before the training watches for it
            return _train(config, args, tell, callbacks, command, observer, data, trainer_class, folder=folder, hold=hold)


def _require_same_run(hold: RunHold, config: RunConfig, args: ORPOConfig) -> None:
    """What can be asked before rows and model are loaded."""
    if hold.checkpoint is None and RunFolder(hold.folder).status == COMPLETE:
        weights = final_weights(hold.folder)
        raise UserError(
            "holds a finished run and no checkpoint to go on from",
            where=str(hold.folder),
            mend=f"start a second run from its weights: model_name_or_path: {weights}, and another output_dir",
        )
    options = options_as_facts(args) | {"model_init_kwargs": None}  # the trainer gets a model that is loaded
    hold.require_same(allow=args.allow_changed_resume, run=run_as_facts(config), config=options, rows_per_step=hold.rows_per_step(args))


def _train(
    config: RunConfig,
    args: ORPOConfig,
    tell: Tell,
    callbacks: Sequence[TrainerCallback],
    command: str,
    observer: Observer,
    data: RunData | None,
    trainer_class: type[ORPOTrainer] | None,
    *,
    folder: RunFolder,
    hold: RunHold,
) -> RunResult:
    """The run from its rows to its end, in a folder that is held."""
    if args.world_size > 1:
        tell(f"processes    {args.world_size}, {torch.distributed.get_backend()}, {args.spread.kind}")
    data = on_all(lambda: prepare_data(config, args, tell, rows_per_step=hold.rows_per_step(args))) if data is None else data
    agree_on_rows(data.train, data.held_out)
    tell(f"loading      {config['model_name_or_path']}")
    loaded = on_all(lambda: load_run_model(config, args, data))
    tell(f"model        {describe_model(loaded)}")
    for note in loaded.facts.notes:
        tell(f"             {note}")
    journal = _Journal(folder, config, args, data, loaded, command=command, is_resumed=hold.checkpoint is not None)
    trainer = build_trainer(config, args, data, loaded.model, [*callbacks, journal], trainer_class=trainer_class)
    journal.trainer, trainer.before_sharding, trainer.run_hold = trainer, journal.weigh, hold
    trainer.train_sampler.rows_per_step = hold.rows_per_step(args)
    tell(f"training     {describe_schedule(trainer)}")
    if hold.checkpoint is not None:
        tell(f"resuming     from {hold.checkpoint}")
    observer.before(trainer, data)
    with _failures_recorded(journal, args):
        trainer.train()  # from the checkpoint that was found, and inside the lock that is held until run.json says complete
        for line in data.stream_lines():
            tell(line)
        metrics = _final_evaluation(trainer)
        observer.after(trainer, data)
        journal.finish(metrics)
    if args.process_index == 0 and command != "compare":
        _write_card(folder, tell)
    return RunResult(folder.path, final_weights(folder.path), metrics)


def _write_card(folder: RunFolder, tell: Tell) -> None:
    """The model card, for whoever finds the weights. A run that is done does not fail for it."""
    from orpo.report.card import write_card

    try:
        card = write_card(folder.path)
    except Exception as error:
        logger.warning("the model card could not be written (%s: %s)", type(error).__name__, error)
    else:
        tell(f"model card   {card}" if card is not None else f"model card   {folder.path / 'README.md'} is yours and was left as it is")


def describe_model(loaded: LoadedModel) -> str:
    """`SmolLM2 … 134.5 M parameters, float32, cpu`."""
    facts = loaded.facts
    quantized = f", {facts.quantization}" if facts.quantization else ""
    return f"{facts.name}: {facts.num_parameters / 1e6:,.1f} M parameters, {facts.dtype}{quantized}, {facts.device}"


def describe_schedule(trainer: ORPOTrainer) -> str:
    """Steps, pairs of a step, dtype, and how much of the model is trained."""
    args, sampler = trainer.args, trainer.train_sampler
    steps = args.max_steps if args.max_steps > 0 else -(-len(sampler) * args.num_train_epochs // 1)
    trainable = sum(num_elements(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
    objective = trainer.training_objective
    recomputed = ", activations recomputed" if args.gradient_checkpointing is True else ""
    return (
        f"{steps:g} steps of {sampler.rows_per_step} rows, {trainable / 1e6:,.1f} M weights trained, {args.compute_dtype}, "
        f"{kind_of(objective).describe(objective)}, learning rate {args.learning_rate:g}{recomputed}"
    )


def _final_evaluation(trainer: ORPOTrainer) -> dict[str, float]:
    """Metrics on the held-out rows after the last step; those of an evaluation that has just been made count."""
    if trainer.eval_dataset is None:
        return {}
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), None)
    if last is not None and last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last.items() if name.startswith("eval_")}
    return {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_")}


class _Journal(TrainerCallback):
    """Keeps run.json and writes the final weights, all while the folder is held."""

    def __init__(
        self, folder: RunFolder, config: RunConfig, args: ORPOConfig, data: RunData, loaded: LoadedModel, *, command: str, is_resumed: bool
    ) -> None:
        self.folder, self.config, self.args, self.data, self.loaded = folder, config, args, data, loaded
        self.command, self.is_resumed = command, is_resumed
        self.trainer: ORPOTrainer | None = None
        self.is_started = False
        self._starting_sha256: str | None = None

    def weigh(self) -> None:
        """Take the starting weights' checksum while they are whole."""
        from orpo.models.fingerprint import weights_sha256

        if self.args.process_index == 0 and not self.is_resumed:
            self._starting_sha256 = weights_sha256(self.loaded.model, dtype=getattr(torch, self.loaded.facts.dtype))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero or self.trainer is None:
            return
        from orpo.models.fingerprint import weights_sha256

        before = self.folder.read() or {}
        if not self.is_resumed:
            self.folder.metrics.truncate_to(0)  # of an attempt that ended before its first checkpoint
        starts = [*before.get("starts", []), {"time_unix_s": round(time.time(), 3), "step": state.global_step, "argv": sys.argv[1:]}]
        facts = {
            "status": RUNNING,
            "command": self.command,
            "starts": starts,
            "configuration": as_facts(self.config),
            "versions": versions(),
            "device": describe_device(self.args.device),
            "world_size": self.args.world_size,
            "compute_dtype": self.args.compute_dtype,
            **self.trainer.how_computed,
            "seed": self.args.seed,
            "objective": kind_of(self.trainer.training_objective).facts(self.trainer.training_objective, _NLL[self.args.nll_scope]),
            "plugins": [asdict(plugin) for plugin in loaded_plugins()],
            "num_steps": state.max_steps,
            "rows_per_step": self.trainer.train_sampler.rows_per_step,
            "model": self.loaded.facts.to_dict(),
            "data": self.data.facts(),
        }
        if not self.is_resumed:  # on resume the weights in memory are no longer those of the start
            facts["starting_weights_sha256"] = self._starting_sha256 or weights_sha256(self.loaded.model)
        self.folder.write(**facts)
        self.is_started = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None  # noqa: S101  (set before train() is called)
        save_final_weights(self.trainer, self.data)

    def finish(self, metrics: dict[str, float]) -> None:
        """All is done."""
        self._end(COMPLETE, final_metrics=metrics)

    def fail(self, status: str, error: BaseException) -> None:
        """The run ended before its end; what for."""
        self._end(status, ended_by=redact_text(f"{type(error).__name__}: {error}"))

    def _end(self, status: str, **facts: Any) -> None:
        if self.is_started and self.trainer is not None:
            step = self.trainer.state.global_step
            facts["data"] = {
                **(self.folder.read() or {}).get("data", {}),
                "train": self.data.train_report.to_dict(),
            }
            graphs = self.trainer.graphs
            if graphs.num_graphs:
                facts["compiled_graphs"] = {"all": graphs.num_graphs, "after_the_first_steps": graphs.num_late}
            self.folder.write(status=status, ended_unix_s=round(time.time(), 3), last_step=step, **{"ended_by": None, **facts})


def save_final_weights(trainer: ORPOTrainer, data: RunData) -> None:
    """`model/` or `adapter/` with tokenizer and chat template, published by one rename."""
    from orpo.models.export import export_adapter, export_merged, export_whole_state
    from orpo.models.load import is_adapted

    folder = Path(trainer.args.output_dir or ".")
    model = trainer.accelerator.unwrap_model(trainer.model)
    name = "adapter" if is_adapted(model) else "model"
    if is_sharded(model):
        state = whole_state(model, is_kept=trainer.args.should_save)  # collective: no rank has the weights alone
        if trainer.args.should_save:
            export_whole_state(model, state, data.tokenizer, folder / name, stop_token_ids=data.encoder.terminator_ids)
    elif trainer.args.should_save:
        if trainer.args.device.type == "cpu":
            return_freed_memory()  # that of the steps: what is written is loaded once more, beside the model that it is compared with
        if name == "adapter":
            export_adapter(model, data.tokenizer, folder / name, stop_token_ids=data.encoder.terminator_ids, is_overwriting=True)
        else:
            export_merged(model, data.tokenizer, folder / name, stop_token_ids=data.encoder.terminator_ids, is_overwriting=True)


@contextmanager
def _failures_recorded(journal: _Journal, args: ORPOConfig) -> Iterator[None]:
    """Say in run.json how a run ended that did not reach its end; out of memory becomes advice with figures."""
    try:
        yield
    except (SignalStop, GuardStop) as error:
        journal.fail(STOPPED, error)
        raise
    except Exception as error:
        advice = explain_out_of_memory(error, args)
        journal.fail(FAILED, advice or error)
        if advice is not None:
            raise advice from error
        raise


def explain_out_of_memory(error: BaseException, args: ORPOConfig) -> UserError | None:
    """Advice for an allocation that failed, or None for any other error."""
    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in text:
        return None
    held, total = peak_memory_bytes(args.device), memory_facts(args.device)["total_bytes"]
    figures = f"this process has held {held / 2**30:.2f} of {total / 2**30:.1f} GiB; " if held and total else ""
    smaller = max(args.microbatch_tokens // 2, 256)
    return UserError(
        f"out of memory: {figures}{text.splitlines()[0] if text else type(error).__name__}",
        where=f"micro-batches of {args.microbatch_tokens} tokens",
        mend=f"max_tokens_per_microbatch: {smaller} (changes no result), then gradient_checkpointing: true, a shorter max_length, or "
        "use_peft: true; `orpo plan` estimates the memory of a configuration; the last checkpoint is whole, and the same command resumes",
    )
