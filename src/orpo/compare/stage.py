"""One stage of one run, in a process of its own: python -m orpo.compare.stage SPEC.json

A process per stage, so that peak memory is the stage's own, a crash costs one stage, and every stage starts alike. It leaves, beside
what any run leaves (run.json, metrics.jsonl, model/), a `stage.json` with costs and the scores of validation and test rows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from orpo.compare.data import ComparisonData, load_comparison_data
from orpo.compare.measure import Cost, FlopCounter, MeasuredTrainer, StepClock, reset_peak
from orpo.compare.methods import stage_rows
from orpo.compare.spec import FORMAT, RESULT, StageSpec
from orpo.config.objectives import find
from orpo.system.allocator import return_freed_memory
from orpo.system.files import write_atomically
from orpo.system.machine import peak_memory_bytes
from orpo.training.runner import Observer, load_run_model, run_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from orpo.data.types import TokenGroup
    from orpo.run.config import RunConfig
    from orpo.run.data import RunData


def run_stage(spec: StageSpec) -> None:
    """Train, measure, and write `stage.json`."""

    def tell(line: str) -> None:
        print(line, flush=True)

    config = spec.run_config()
    data = load_comparison_data(config, config.training_args(), spec.split, tell, date=spec.date)
    if spec.method == "start":
        _measure_start(spec, config, data)
    else:
        _train(spec, data, tell)


def _write_result(spec: StageSpec, **facts: Any) -> None:
    Path(spec.folder).mkdir(parents=True, exist_ok=True)
    result = {"format": FORMAT, "objective": spec.objective_name, **facts}
    write_atomically(Path(spec.folder) / RESULT, (json.dumps(result) + "\n").encode())


def _measure_start(spec: StageSpec, config: RunConfig, data: ComparisonData) -> None:
    import torch

    from orpo.models.fingerprint import weights_sha256

    args = config.training_args()
    loaded = load_run_model(config, args, data.run)
    scores = _scores(loaded.model, data, getattr(torch, args.compute_dtype), with_test=True)
    _write_result(spec, model=spec.start, sha256=weights_sha256(loaded.model), scores=scores)


def _train(spec: StageSpec, data: ComparisonData, tell: Any) -> None:
    groups = stage_rows(spec.objective_name, data.for_trials(spec.split.tune_rows) if spec.is_trial else data.train)
    config = spec.run_config(**_schedule(spec, len(groups)))
    watcher = _Watcher(spec, data)
    rows = replace(data.run, train=groups, held_out=data.validation if spec.num_points else None)
    run_training(
        config,
        tell,
        [watcher],
        command="compare",
        observer=watcher,
        data=rows,
        trainer_class=MeasuredTrainer,
    )


def _schedule(spec: StageSpec, num_rows: int) -> dict[str, Any]:
    """When the stage evaluates and saves."""
    config = spec.run_config()
    args = config.training_args()
    changes: dict[str, Any] = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
    if not config.is_given("save_strategy") and not config.is_given("save_steps"):
        changes["save_strategy"] = "no"  # what is done again after a kill is one stage
    if spec.num_points:
        per_epoch = -(-num_rows // (args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size))
        num_steps = args.max_steps if args.max_steps > 0 else round(per_epoch * args.num_train_epochs)
        every = max(1, num_steps // spec.num_points)
        changes |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True}
    return changes


class _Watcher(Observer, TrainerCallback):
    """Measures a stage while it trains, and scores its weights when it is done."""

    def __init__(self, spec: StageSpec, data: ComparisonData) -> None:
        self.spec, self.data = spec, data
        self.cost = Cost()
        self._clock = StepClock(self.cost)

    def before(self, trainer: Any, data: RunData) -> None:
        """The reference's log-probabilities come once, before training, from the weights that the stage starts from."""
        self.cost = trainer.cost
        self._clock.cost = trainer.cost
        if find(self.spec.objective_name).needs_reference:
            add_reference(trainer, self.cost)
        # Chosen now, with the reference at hand: what the comparison of the engines needs is no method's own memory.
        _ = trainer.engine
        return_freed_memory()
        reset_peak()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            return
        spent = Path(args.output_dir) / f"cost-{state.global_step}.json"  # resumed: what was spent before the checkpoint
        if spent.exists():
            vars(self.cost).update(json.loads(spent.read_text(encoding="utf-8")))
        else:
            self.cost.is_partial = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = Path(args.output_dir) / f"cost-{state.global_step}.json"
        write_atomically(path, json.dumps(self.cost.to_dict()).encode())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.stop()

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        self.cost.peak_bytes = max(self.cost.peak_bytes, peak_memory_bytes(args.device) or 0)

    def after(self, trainer: Any, data: RunData) -> None:
        """Scores of the final weights; written before the run counts as complete, or a kill in between would lose them."""
        scores = _scores(trainer.model, self.data, trainer.compute_dtype, with_test=not self.spec.is_trial)
        _write_result(self.spec, cost=self.cost.to_dict(), scores=scores)


def add_reference(trainer: Any, cost: Cost) -> None:
    """Give training and validation rows their summed log-probabilities under the trainer's weights as they are."""
    import time

    began_s = time.perf_counter()
    with FlopCounter() as counter:
        for rows in (trainer.train_dataset, trainer.eval_dataset or []):
            is_training = rows is trainer.train_dataset
            sums = _score_tokens(trainer.model, rows, trainer.compute_dtype)
            for row, responses in enumerate(sums):
                rows[row] = replace(rows[row], reference_logp_sums=tuple(float(logps.sum(dtype="f8")) for logps in responses))
                if is_training:
                    cost.reference_tokens += rows[row].num_tokens
                    cost.forward_passes += len(rows[row].response_ids)
            if is_training:
                cost.flops += counter.total
                cost.reference_s += time.perf_counter() - began_s


def _score_tokens(model: Any, groups: Sequence[TokenGroup], compute_dtype: Any) -> list[tuple[np.ndarray, ...]]:
    import torch

    from orpo.inference.scores import score_tokens

    return score_tokens(model, groups, compute_dtype=None if compute_dtype == torch.float32 else compute_dtype)


def _scores(model: Any, data: ComparisonData, compute_dtype: Any, *, with_test: bool) -> dict[str, list[list[float]]]:
    """Mean log-probability of every answer of the validation rows, and of the test rows, which no trial looks at."""
    parts = {"validation": data.validation, **({"test": data.test} if with_test else {})}
    return {
        name: [[float(logps.mean(dtype="f8")) for logps in responses] for responses in _score_tokens(model, groups, compute_dtype)]
        for name, groups in parts.items()
    }


def main(path: str) -> int:
    """Run a stage as its specification says; the exit code is the command line's for the same error."""
    from orpo.system.process import guarded_exit

    return guarded_exit("compare", lambda: _run(path))


def _run(path: str) -> int:
    from orpo.system.process import configure_logging, quiet_libraries

    configure_logging()
    quiet_libraries()
    run_stage(StageSpec.read(Path(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else "usage: python -m orpo.compare.stage SPEC.json")
