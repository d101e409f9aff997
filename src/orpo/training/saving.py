"""The part of the trainer that saves and resumes: transformers' hooks, turned to `orpo.checkpoint`.

transformers writes into the published folder, trusts the newest one, pickles, and rotates at the end of training. None of that is used.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from orpo.checkpoint import checkpoint_name, load_rng, load_scaler, prune, publish, read_manifest, save_rng, verify
from orpo.config.parallelism import Parallelism
from orpo.data.dataset import fingerprint
from orpo.data.stored.windows import StreamPosition
from orpo.engine.parallel import is_sharded, whole_state
from orpo.models.dtype import settle_dtype, spread_dtype
from orpo.run.hold import RunHold, options_as_facts
from orpo.system.parts import has_weights_in_parts
from orpo.system.plugins import plugin_sha256
from orpo.training.guards.callbacks import SignalCallback
from orpo.training.savers import SpreadState, StateSaver, WholeState, ZeroState
from orpo.training.schedule import require_same_rates
from orpo.training.stopping import has_stopped_improving
from orpo.training.streams import StreamSampler

logger = logging.getLogger(__name__)

STATE_NAME = "orpo_state.json"
"""Sums since the last log, length of metrics.jsonl, guards."""

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class CheckpointMixin(_Base):
    """Saving and resuming for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    control: Any
    hidden_args: dict[str, Any] = {}  # noqa: RUF012  (replaced, never changed)
    run_hold: RunHold | None = None
    """The folder, where somebody holds it for longer than the training takes."""
    parallelism: Parallelism
    _facts: dict[str, Any] | None = None
    _early_facts: dict[str, Any] | None = None
    """Those without the engine, where they were asked for before it was chosen."""
    _signals: SignalCallback
    _is_evaluation_due = False
    _evaluated_from: int | None = None
    """Length of metrics.jsonl before the evaluation that is running: what it has logged is logged again after a resume."""

    @functools.cached_property
    def saver(self) -> StateSaver:
        """How this run's weights and optimizer are saved; nobody else here asks whether they are spread."""
        kinds: dict[str, type[StateSaver]] = {"ddp": WholeState, "fsdp2": SpreadState}
        return kinds.get(self.parallelism.kind, ZeroState)(self)

    # ---- save ----------------------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        run_dir = Path(self.args.output_dir)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run_dir / checkpoint_name(self.state.best_global_step))
        # Gathered before the save: inside it a rank that fails would leave the others in a collective of another kind.
        self.saver.prepare(self.ranks, weights_only=self.args.save_only_model)
        write = functools.partial(self._write_checkpoint, sums=self.ranks.gather(self.sums.state()))
        folder = publish(run_dir, self.state.global_step, write, facts=self.facts(), ranks=self.ranks)
        if self.ranks.is_first:
            prune(run_dir, keep=self.hidden_args.get("save_total_limit"), best=self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def save_now(self, step: int) -> Path:
        """Save the state after `step`, for a signal that comes during an evaluation; in place of one without the evaluation due."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return Path(self.args.output_dir) / checkpoint_name(step)

    def _write_checkpoint(self, folder: Path, sums: list[Any]) -> None:
        """This rank's files of a checkpoint."""
        self.saver.save(folder, self.ranks, weights_only=self.args.save_only_model)
        if not self.args.save_only_model:
            save_rng(folder, rank=self.ranks.rank)
        if self.ranks.is_first:
            self._export_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self.run_folder.metrics.sync()
            own = {
                "sums": sums,
                "metrics_bytes": self.run_folder.metrics.num_bytes if self._evaluated_from is None else self._evaluated_from,
                "is_evaluation_due": self._evaluated_from is not None or self._signals.is_evaluation_due,
                "nonfinite": self.nonfinite.state_dict(),
                "learning": self.learning.state_dict(),
                "divergence": self.divergence.state_dict(),
                "stream": self.train_sampler.position.to_state() if isinstance(self.train_sampler, StreamSampler) else None,
            }
            (folder / STATE_NAME).write_text(json.dumps(own))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; weights in parts are brought together by rank 0, and all ranks call it."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = whole_state(self.model, is_kept=self.ranks.is_first)
        if self.args.should_save:
            self._save(output_dir, state)
        self.ranks.gather(None)

    def _export_callbacks(self) -> None:
        """Callbacks with a state of their own put it into the trainer's, as transformers does before a save."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, stored = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(stored.get(name), list):
                stored[name].append(callback.state())
            else:
                stored[name] = callback.state()

    def _evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        self._evaluated_from = self.run_folder.metrics.num_bytes
        try:
            return super()._evaluate(*arguments, **keywords)
        finally:
            self._evaluated_from = None

    def make_up_evaluation(self) -> None:
        """Run the evaluation that a signal cut short or put off before the checkpoint this run goes on from."""
        if self._is_evaluation_due:
            self._is_evaluation_due = False
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # transformers pickles its arguments beside the weights; nobody needs them, and nothing here is unpickled.
        pickled = Path(output_dir or self.args.output_dir) / "training_args.bin"
        if self.args.should_save and pickled.exists():
            pickled.unlink()

    def facts(self) -> dict[str, Any]:
        """What a resumed run must share with the one that saved."""
        if self._facts is None:
            self._facts = {**(self._early_facts or self._facts_without_engine()), "engine": self.engine.name}
        return self._facts

    def _facts_without_engine(self) -> dict[str, Any]:
        return {
            "data": fingerprint(self.train_dataset),
            "rows_per_step": self.train_sampler.rows_per_step,
            "compute_dtype": self.args.compute_dtype,
            "objective_code": plugin_sha256(type(self.training_objective)),
            "config": options_as_facts(self.args, **self.hidden_args),
        }

    # ---- resume --------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def held(self, wanted: str | bool | None) -> Iterator[RunHold]:
        """The run's folder and the checkpoint in it to go on from: held by who started the run, or for as long as the training takes.

        Args:
            wanted: as `RunHold.look_for`; nothing where the run is held already.
        """
        if self.run_hold is not None:
            yield self.run_hold
            return
        with RunHold(self.args.output_dir, ranks=self.ranks) as hold:
            hold.look_for(wanted)
            yield hold

    def checkpoint_to_read(self, hold: RunHold) -> str | None:
        """The same before the engine is chosen, for weights that have to be read by then.

        Raises:
            CheckpointError: it is of another run, as far as can be said without the engine.
        """
        self.train_sampler.rows_per_step = hold.rows_per_step(self.args)
        self._early_facts = self._facts_without_engine()
        hold.require_same(allow=self.args.allow_changed_resume, **self._early_facts)
        return None if hold.checkpoint is None else str(hold.checkpoint)

    def checkpoint_to_resume(self, hold: RunHold) -> str | None:
        """The checkpoint to go on from, proved whole and of this run; None to start anew.

        Raises:
            CheckpointError: it is of another run.
        """
        self._facts = None
        self.train_sampler.rows_per_step = hold.rows_per_step(self.args)
        # Without a checkpoint too: what the run's start already knew of itself is what its checkpoints keep.
        hold.require_same(allow=self.args.allow_changed_resume, **self.facts())
        self._facts, self._early_facts = dict(hold.now), None
        if hold.checkpoint is None or hold.manifest is None:
            return None
        if versions := hold.other_versions():
            logger.warning("the checkpoint was written with other versions, so results may differ: %s", versions)
        if hold.manifest.world_size != self.ranks.world_size:
            logger.warning(
                "the checkpoint was written by %d processes, now there are %d: the same rows in every step, results differ by rounding",
                hold.manifest.world_size,
                self.ranks.world_size,
            )
        logger.info("resuming from %s", hold.checkpoint)
        return str(hold.checkpoint)

    def is_complete_at(self, checkpoint: str) -> bool:
        """Whether the checkpoint is the run's last; transformers would do one step more before it notices.

        Raises:
            CheckpointError: the run is to have another number of steps, for which those that are done would have been others.
        """
        folder = Path(checkpoint)
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        if has_stopped_improving(state.log_history, self.args):
            return True
        step, num_steps = read_manifest(folder).step, self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if self.lr_scheduler is None or self._created_lr_scheduler:  # else it is the user's own
            require_same_rates(self.args, folder, step=step, old_steps=state.max_steps, new_steps=num_steps)
        return step >= num_steps

    def restore_complete(self, checkpoint: str) -> TrainOutput:
        """State and weights of a run that is done already, without a step; only an evaluation that a signal put off is made up."""
        logger.info("the run is complete")
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        self._load_from_checkpoint(checkpoint)
        state = _own_state(Path(checkpoint))
        if state["is_evaluation_due"]:
            self._load_own_state(Path(checkpoint))
        elif self._writes_the_log_of(Path(checkpoint)):
            # An evaluation after the last step is made anew; the summary of the process that trained stays.
            self.run_folder.metrics.drop_after(int(state["metrics_bytes"]), lambda record: any(key.startswith("eval_") for key in record))
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)  # makes up the evaluation
        if self.args.load_best_model_at_end and self.state.best_global_step:
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / checkpoint_name(self.state.best_global_step))
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)  # writes the final weights
        return TrainOutput(self.state.global_step, math.nan, {})  # no step was made that had a loss

    def load_whole_weights(self, checkpoint: str | None) -> None:
        """Before the model is sharded: the weights of a checkpoint that has them whole."""
        if checkpoint is not None and not has_weights_in_parts(checkpoint):
            settle_dtype(self.model.parameters(), spread_dtype(self.model))  # or what is loaded would be rounded to what is there
            self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_whole = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.saver.load_weights(Path(resume_from_checkpoint), load_whole)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        verify(folder)
        self.saver.load_best(folder, super()._load_best_model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.saver.load_state(Path(checkpoint))
            self._load_own_state(Path(checkpoint))

    def _load_own_state(self, folder: Path) -> None:
        state = _own_state(folder)
        self.sums.restore(state["sums"], rank=self.ranks.rank)
        self.nonfinite.load_state_dict(state["nonfinite"])
        self.learning.load_state_dict(state["learning"])
        if "divergence" in state:  # checkpoints of version 0.1.0 have none
            self.divergence.load_state_dict(state["divergence"])
        if isinstance(self.train_sampler, StreamSampler):
            self.train_sampler.position = StreamPosition(**state["stream"])
        self._is_evaluation_due = state["is_evaluation_due"]
        if self._writes_the_log_of(folder):
            self.run_folder.metrics.truncate_to(int(state["metrics_bytes"]))

    def _writes_the_log_of(self, checkpoint: Path) -> bool:
        """Whether metrics.jsonl goes on where the checkpoint's ended: on rank 0, in the folder that the checkpoint is in."""
        return self.ranks.is_first and os.path.realpath(checkpoint.parent) == os.path.realpath(self.args.output_dir)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            load_scaler(self.accelerator.scaler, checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng(checkpoint, rank=self.ranks.rank)


def _own_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_NAME).read_text())
