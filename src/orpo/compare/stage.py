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
from orpo.compare.measure import Cost, FlopCounter, MeasuredTrainer, StepClock, cost_of_all, reset_peak
from orpo.compare.methods import stage_rows
from orpo.compare.spec import FORMAT, RESULT, StageSpec
from orpo.config.objectives import find
from orpo.system.allocator import return_freed_memory
from orpo.system.files import write_atomically
from orpo.system.group import on_all, told_together
from orpo.system.machine import peak_memory_bytes
from orpo.system.place import own_rank
from orpo.system.ranks import current_ranks
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
        if own_rank() == 0:
            print(line, flush=True)

    config = spec.run_config()
    args = told_together(config.training_args)
    data = on_all(lambda: load_comparison_data(config, args, spec.split, tell, date=spec.date))
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
        spent = _cost_path(args.output_dir, state.global_step)  # resumed: what was spent before the checkpoint
        if spent.exists():
            vars(self.cost).update(json.loads(spent.read_text(encoding="utf-8")))
        else:
            self.cost.is_partial = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_atomically(_cost_path(args.output_dir, state.global_step), json.dumps(self.cost.to_dict()).encode())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.stop()

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        self.cost.peak_bytes = max(self.cost.peak_bytes, peak_memory_bytes(args.device) or 0)

    def after(self, trainer: Any, data: RunData) -> None:
        """Scores of the final weights; written before the run counts as complete, or a kill in between would lose them."""
        scores = _scores(trainer.model, self.data, trainer.compute_dtype, with_test=not self.spec.is_trial)
        ranks = current_ranks()
        cost = cost_of_all([Cost(**one) for one in ranks.gather(self.cost.to_dict())])
        if ranks.is_first:
            _write_result(self.spec, cost=cost.to_dict(), scores=scores)
        ranks.gather(None)  # the run counts as complete on nobody's word before the result is there


def _cost_path(folder: str, step: int) -> Path:
    """Where a process keeps what it has spent up to a checkpoint."""
    rank = current_ranks().rank
    return Path(folder) / f"cost-{step}{f'-{rank}' if rank else ''}.json"


def add_reference(trainer: Any, cost: Cost) -> None:
    """Give training and validation rows their summed log-probabilities under the trainer's weights as they are."""
    import time

    began_s, ranks = time.perf_counter(), current_ranks()
    with FlopCounter() as counter:
        for rows in (trainer.train_dataset, trainer.eval_dataset or []):
            is_training = rows is trainer.train_dataset
            own = list(range(ranks.rank, len(rows), ranks.world_size))
            found = _score_tokens(trainer.model, [rows[row] for row in own], trainer.compute_dtype)
            sums = [[float(logps.sum(dtype="f8")) for logps in responses] for responses in found]
            for row in own if is_training else ():
                cost.reference_tokens += rows[row].num_tokens
                cost.forward_passes += len(rows[row].response_ids)
            for rank, of_rank in enumerate(ranks.gather(sums)):
                for row, responses in zip(range(rank, len(rows), ranks.world_size), of_rank, strict=True):
                    rows[row] = replace(rows[row], reference_logp_sums=tuple(responses))
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


def main(path: str, num_processes: int = 1) -> int:
    """Run a stage as its specification says; the exit code is the command line's for the same error.

    Args:
        num_processes: that do it together; this one only starts them if there are several.
    """
    from orpo.system.launch import start
    from orpo.system.process import guarded_exit

    if num_processes > 1:
        return guarded_exit("compare", lambda: start([sys.executable, "-m", "orpo.compare.stage", path, "1"], num_processes))
    return guarded_exit("compare", lambda: _run(path))


def _run(path: str) -> int:
    from orpo.system.process import configure_logging, quiet_libraries

    configure_logging()
    quiet_libraries()
    run_stage(StageSpec.read(Path(path)))
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m orpo.compare.stage SPEC.json [PROCESSES]")
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
