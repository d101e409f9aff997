"""Scoring for `surprise`: a model as it stands, or trained by ORPO on the other folds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from orpo.audit.surprise import FitAndScore, Score
from orpo.data.types import TokenGroup

LEARNING_RATE = 5e-5
NUM_EPOCHS = 2
ROWS_PER_STEP = 16
ALPHA = 1.0
"""What lets a model of 135M parameters learn a preference from some hundred pairs; larger ones need less."""


def score_with(model_name: str, revision: str | None = None) -> Score:
    """Scores by a model as it stands."""

    def score(groups: Sequence[TokenGroup]) -> Sequence[np.ndarray]:
        from orpo.evaluate.pairs import score_groups
        from orpo.models.load import load_model

        return score_groups(load_model(model_name, revision=revision).model, groups)

    return score


def fit_and_score_with(model_name: str, revision: str | None, encoder: Any, **training: Any) -> FitAndScore:
    """Scores of held-out groups by the model after ORPO on the other groups; each fold starts from the same weights.

    Args:
        encoder: the `TemplateEncoder` that made the groups.
        training: fields of `ORPOConfig` that replace the defaults of this module.
    """

    def fit_and_score(train: Sequence[TokenGroup], held_out: Sequence[TokenGroup]) -> Sequence[np.ndarray]:
        from orpo.config.options import ORPOConfig
        from orpo.evaluate.pairs import score_groups
        from orpo.models.load import load_model
        from orpo.training.trainer import ORPOTrainer

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
            trainer = ORPOTrainer(model=model, args=args, train_dataset=list(train), processing_class=encoder.tokenizer)
            trainer.train()
            return score_groups(trainer.model, held_out)

    return fit_and_score
