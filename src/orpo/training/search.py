"""Training again and again: a search for hyperparameters, and a trainer whose arguments were changed since it was made."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import enable_full_determinism, set_seed
from transformers.trainer_utils import HPSearchBackend

from orpo.config.objectives import find
from orpo.errors import GuardStop
from orpo.run.folder import RunFolder
from orpo.system.files import make_run_folder
from orpo.system.group import on_all
from orpo.training.metrics import MetricsCallback
from orpo.training.setup import prepared_model, resolve_objective

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer as _Base
    from transformers.trainer_utils import BestRun

    from orpo.engine.choose import Engine
    from orpo.engine.precision import WorkingWeights
    from orpo.objective import Objective
    from orpo.training.guards import DivergenceGuard, ProofOfLearning
else:
    _Base = object

logger = logging.getLogger(__name__)


class SearchMixin(_Base):
    """Training again and again for `ORPOTrainer`: with other arguments, as trials of a search or by hand, and with a fresh model each time.

    transformers sets a trial's values in the middle of `train()`, when the step's rows and the objective have long been made of the old
    ones. Here they come first, and each trial has its own folder, `run-0`, `run-1`, … in the output folder.
    """

    args: Any
    hp_search_backend: Any
    training_objective: Objective
    learning: ProofOfLearning
    divergence: DivergenceGuard
    _own_objective: Objective | None
    _engine: Engine | None
    _working: WorkingWeights | None
    _fresh_model: nn.Module | None = None
    _search_dir: str | None = None

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *arguments: Any, **keywords: Any
    ) -> BestRun | list[BestRun]:
        """As in transformers; the trainer needs `model_init`. Afterwards its arguments are what they were before.

        Args:
            hp_space: trial -> values of any fields of `ORPOConfig`, `orpo_alpha` and `orpo_beta` among them.
            compute_objective: evaluation metrics -> what is minimised or maximised; the evaluation loss by default. That contains
                `orpo_alpha` itself: where alpha is searched, take a metric that does not, such as `eval_rewards/accuracies`.
            arguments, keywords: n_trials, direction, backend, hp_name, and what the backend takes.
        """
        before = dict(self.args.__dict__)
        self._search_dir = str(self.args.output_dir)
        try:
            return super().hyperparameter_search(hp_space, compute_objective or _evaluation_loss, *arguments, **keywords)
        finally:
            self.args.__dict__.update(before)
            self._search_dir = self.hp_search_backend = None
            self._use_folder(str(self.args.output_dir))

    def begin_training(self, trial: Any) -> None:
        """Bring everything that is made of the arguments up to what they are now; with `model_init`, make the model."""
        if trial is not None and self.hp_search_backend is not None:
            super()._hp_search_setup(trial)
            self.args.output_dir = self._search_dir
            self.args.output_dir = self._get_output_dir(trial)
            self._use_folder(self.args.output_dir)
            own = {option.key for option in find(self.args.objective).options} & set(getattr(trial, "params", trial))
            if self.compute_objective is _evaluation_loss and own:
                logger.warning(
                    "trials of other %s are compared by their evaluation loss, which contains them; "
                    "give compute_objective, such as lambda metrics: metrics['eval_rewards/accuracies'] with direction='maximize'",
                    " or ".join(sorted(own)),
                )
        if self._own_objective is None:
            self.training_objective = resolve_objective(self.args)
        self.train_sampler = self._train_sampler()
        self.sums.clear()
        self.learning.start_anew()
        self.divergence.start_anew(self.args.learning_rate)
        if self.model_init is not None:
            enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)
            self.model = self.model_wrapped = self.call_model_init(trial)
            if self.place_model_on_device:
                self._move_model_to_device(self.model, self.args.device)
            self._fresh_model = self.model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`, brought into the same state as one that is handed over."""
        if self._fresh_model is not None:  # made a moment ago, since the engine is chosen on it
            model, self._fresh_model = self._fresh_model, None
            return model
        self._engine, self._working = None, None
        make = super().call_model_init
        return on_all(lambda: prepared_model(make(trial), self.args, self._peft_config, self.processing_class, self.encoder))

    def _hp_search_setup(self, trial: Any) -> None:
        if trial is None or self.hp_search_backend is None:  # else it is done: by now it would undo what a step hides from the Trainer
            super()._hp_search_setup(trial)

    def _use_folder(self, folder: str) -> None:
        if self.args.should_save:
            make_run_folder(folder)
        self.run_folder = RunFolder(folder)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MetricsCallback):
                callback.log = self.run_folder.metrics

    @contextmanager
    def trial_pruned(self, trial: Any) -> Iterator[None]:
        """A trial that a guard stops ends like one that optuna prunes: a rate that destroys the model is a finding of the search."""
        try:
            yield
        except GuardStop as error:
            if trial is None or self.hp_search_backend != HPSearchBackend.OPTUNA:
                raise
            import optuna

            logger.warning("trial %d: %s", trial.number, error)
            raise optuna.TrialPruned(str(error)) from error


def _evaluation_loss(metrics: dict[str, float]) -> float:
    """transformers' default would add up all metrics."""
    return metrics["eval_loss"]
