"""Scoring for `surprise`: a model as it stands, or trained by ORPO on the other folds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from orpo.audit.surprise import FitAndScore, Score
from orpo.data.types import TokenGroup

LEARNING_RATE = 5e-5
NUM_EPOCHS = 2
ROWS_PER_STEP = 16
ALPHA = 1.0
"""What lets a model of 135M parameters learn a preference from some hundred pairs; larger ones need less."""


Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def score_with(model_name: str, revision: str | None = None, *, progress: Progress | None = None) -> Score:
    """Scores by a model as it stands."""

    def score(groups: Sequence[TokenGroup]) -> Sequence[np.ndarray]:
        from orpo.evaluate.pairs import score_groups
        from orpo.models.load import load_model

        what = f"pairs scored by {model_name}"
        told = None if progress is None else lambda done, total: progress(what, done, total)
        return score_groups(load_model(model_name, revision=revision).model, groups, progress=told)

    return score


def fit_and_score_with(
    model_name: str, revision: str | None, encoder: Any, *, num_folds: int = 5, progress: Progress | None = None, **training: Any
) -> FitAndScore:
    """Scores of held-out groups by the model after ORPO on the other groups; each fold starts from the same weights.

    Args:
        encoder: the `TemplateEncoder` that made the groups.
        num_folds: how often it will be called.
        progress: told of the rows of all folds that were trained on and scored.
        training: fields of `ORPOConfig` that replace the defaults of this module.
    """
    meter = _Meter(num_folds, training.get("num_train_epochs", NUM_EPOCHS), progress)

    def fit_and_score(train: Sequence[TokenGroup], held_out: Sequence[TokenGroup]) -> Sequence[np.ndarray]:
        from transformers import PrinterCallback

        from orpo.config.options import ORPOConfig
        from orpo.evaluate.pairs import score_groups
        from orpo.models.load import load_model
        from orpo.training.trainer import ORPOTrainer

        meter.begin(len(train), len(held_out))
        with tempfile.TemporaryDirectory(prefix="orpo-audit-") as folder:
            settings: dict[str, Any] = {
                "learning_rate": LEARNING_RATE,
                "num_train_epochs": NUM_EPOCHS,
                "per_device_train_batch_size": ROWS_PER_STEP,
                "orpo_alpha": ALPHA,
                "warmup_steps": 5,
                "max_length": encoder.max_length,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **training,
            }
            model = load_model(model_name, revision=revision).model
            args = ORPOConfig(output_dir=folder, **settings)
            trainer = ORPOTrainer(
                model=model,
                args=args,
                train_dataset=list(train),
                processing_class=encoder.tokenizer,
                callbacks=[meter.callback(args.train_batch_size * args.gradient_accumulation_steps)],
            )
            trainer.remove_callback(PrinterCallback)  # it writes to stdout, which belongs to --json
            trainer.train()
            return score_groups(trainer.model, held_out, progress=meter.scored)

    return fit_and_score


class _Meter:
    """How far all folds together are, in rows: those trained on, once for each epoch, and those scored."""

    def __init__(self, num_folds: int, num_epochs: float, progress: Progress | None) -> None:
        self._num_folds, self._num_epochs, self._progress = num_folds, num_epochs, progress
        self._fold = 0
        self._per_fold = self._trained = 0

    def begin(self, num_train: int, num_held_out: int) -> None:
        """A further fold; all are about as long as this one."""
        self._fold += 1
        self._trained = round(num_train * self._num_epochs)
        self._per_fold = self._trained + num_held_out
        self._tell(0)

    def callback(self, rows_per_step: int) -> Any:
        """Tells of every step of the fold's training."""
        from transformers import TrainerCallback

        meter = self

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                meter._tell(min(state.global_step * rows_per_step, meter._trained))

        return Steps()

    def scored(self, done: int, total: int) -> None:
        """So many of the held-out rows."""
        self._tell(self._trained + done)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            total = self._num_folds * self._per_fold
            before = (self._fold - 1) * self._per_fold
            self._progress(f"rows of {self._num_folds} folds, trained on and scored", min(before + done, total), total)
