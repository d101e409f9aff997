"""Proof of learning on a real model: SmolLM2-135M on the demo's rows, trained in ways that teach nothing or the wrong thing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from orpo import ORPOConfig, ORPOTrainer
from orpo.data import demo
from orpo.errors import GuardStop
from orpo.models.load import load_model
from trainerruns import QUIET

pytestmark = pytest.mark.slow

ROWS = Path(demo.__path__[0]) / "train.jsonl"
NUM_ROWS, PAIRS_PER_STEP = 64, 4


def train(folder: Path, model: Path, *, prepare: Any = None, **options: Any) -> ORPOTrainer:
    """Twelve steps, or as many as asked for."""
    with ROWS.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, NUM_ROWS)]
    loaded = load_model(str(model))
    if prepare is not None:
        prepare(loaded.model)
    defaults = {
        **QUIET,
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "max_steps": 12,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "orpo_alpha": 1.0,
        "logging_steps": 1,
        "max_length": 512,
    }
    args = ORPOConfig(output_dir=str(folder), **{**defaults, **options})
    trainer = ORPOTrainer(model=loaded.model, args=args, train_dataset=rows, processing_class=loaded.tokenizer)
    trainer.train()
    return trainer


def codes(trainer: ORPOTrainer) -> set[str]:
    return {finding.code for finding in trainer.learning.findings}


def test_frozen_weights(smollm2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match="no weight of the model is trainable"):
        train(tmp_path, smollm2_folder, prepare=lambda model: model.requires_grad_(False))


def test_weights_that_get_no_gradient(smollm2_folder: Path, tmp_path: Path) -> None:
    """A trainable tensor that the forward pass does not touch: the others learn, and it is named."""

    def add_unused(model: Any) -> None:
        import torch

        model.model.unused = torch.nn.Linear(8, 8)

    trainer = train(tmp_path, smollm2_folder, prepare=add_unused)
    (finding,) = trainer.learning.findings
    assert finding.code == "unmoved_weights"
    assert "model.unused.weight" in finding.message


def test_an_odds_ratio_term_that_is_negligible(smollm2_folder: Path, tmp_path: Path) -> None:
    assert codes(train(tmp_path, smollm2_folder, orpo_alpha=1e-4)) == {"odds_ratio_negligible"}


def test_a_next_token_loss_that_is_negligible(smollm2_folder: Path, tmp_path: Path) -> None:
    """A rate so small that nothing else happens in these steps."""
    assert codes(train(tmp_path, smollm2_folder, orpo_alpha=1e5, learning_rate=1e-7)) == {"nll_negligible"}


def test_a_healthy_run_is_left_in_peace(smollm2_folder: Path, tmp_path: Path) -> None:
    assert codes(train(tmp_path, smollm2_folder, max_steps=30)) == set()


def test_chosen_answers_that_collapse_and_do_not_end(smollm2_folder: Path, tmp_path: Path) -> None:
    """A weight that leaves the next-token loss little say, at six times the rate: the rejected answers take the chosen ones with them."""
    found = codes(train(tmp_path, smollm2_folder, orpo_alpha=50.0, learning_rate=3e-4, max_steps=24))
    assert found == {"chosen_collapse", "length_drift"}
