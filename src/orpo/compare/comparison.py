"""The course of a comparison: trials, the choice among them, runs for every seed, evaluations, and `comparison.json` along the way."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.compare.data import ComparisonData, load_comparison_data
from orpo.compare.methods import Method, find_methods, method_of
from orpo.compare.options import CompareOptions
from orpo.compare.process import run_orpo_process, run_stage_process
from orpo.compare.results import Scored, Scores, compare_methods, curve, evaluations, judge_claims, sweep_table, weights
from orpo.compare.spec import FORMAT, RESULT, StageSpec
from orpo.config.parallelism import parallelism_of
from orpo.errors import UserError
from orpo.evaluate.pairs import paired_difference, summarise
from orpo.run.config import as_facts
from orpo.run.folder import COMPLETE, RUNNING
from orpo.system.console import human_seconds
from orpo.system.files import write_atomically
from orpo.system.machine import describe_device, versions
from orpo.system.redact import redact

if TYPE_CHECKING:
    from orpo.run.config import RunConfig

Tell = Callable[[str], None]
FILE = "comparison.json"
SWEEP_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates of a sweep, as multiples of the configuration's."""


def compare(config: RunConfig, options: CompareOptions, tell: Tell = print) -> dict[str, Any]:
    """Compare methods; goes on with what an earlier call left.

    Args:
        config: what is trained, from `orpo.run.config.resolve`; its learning rate and strength are the grid's centre.
        options: which methods, seeds and grids.
        tell: receives each line for the user.

    Returns:
        What `comparison.json` holds.

    Raises:
        UserError: anything wrong with configuration, data or options, or a stage that refused them.
        GuardStop, SignalStop: a stage was stopped; the same call goes on from there.
    """
    from orpo.checkpoint import RunLock

    options.check()
    if options.num_processes > 1 and parallelism_of(config.values, os.environ).is_sharded:
        raise UserError(
            "the stages of a comparison are not sharded: each process holds the whole model",
            where="parallelism",
            mend="leave it out (ddp), or compare with one process",
        )
    folder = Path(options.output or config["output_dir"] or f"{config.output_dir}-comparison").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder):
        return _Comparison(folder, config, options, tell).run()


@dataclass(frozen=True)
class _MethodRun:
    """A method at given settings and seed: its stages, each with its result."""

    method: Method
    options: dict[str, float]
    seed: int
    stages: tuple[tuple[StageSpec, dict[str, Any]], ...]

    def scores(self, part: str) -> Scores:
        """Of the final weights."""
        return [np.asarray(row) for row in self.stages[-1][1]["scores"][part]]

    @property
    def folder(self) -> Path:
        """Of the last stage."""
        return Path(self.stages[-1][0].folder)


class _Comparison:
    def __init__(self, folder: Path, config: RunConfig, options: CompareOptions, tell: Tell) -> None:
        self.folder, self.config, self.options, self.tell = folder, config, options, tell
        self.methods = find_methods(options.methods)
        date = ((self._read() or {}).get("data") or {}).get("date")  # of the first start, or the rows would be others tomorrow
        self.data: ComparisonData = load_comparison_data(config, config.training_args(), options.split, tell, date=date)
        self.data_facts = self.data.to_dict()
        self.fingerprint = self.data_facts["fingerprint"]
        self.facts: dict[str, Any] = {}
        self.trials: dict[str, list[tuple[dict[str, float], _MethodRun]]] = {}
        self.runs: dict[str, list[_MethodRun]] = {}
        self.start_scores: dict[str, Scores] = {}
        self._summaries: dict[tuple[Path, str], dict[str, Any]] = {}
        self._seen: set[str] = set()
        self._took_s: list[float] = []

    def run(self) -> dict[str, Any]:
        """Everything, in an order that gives something to look at early."""
        self._begin()
        chosen: dict[str, dict[str, float]] = {}
        for method in self._in_order():
            chosen[method.name] = self._tune(method, chosen)
            self._write()
        for seed in self.options.seeds:
            for method in self._in_order():
                run = self._train(method, chosen, seed, is_trial=False)
                self.runs.setdefault(method.name, []).append(run)
                self._write(chosen)
        self._drop_weights()
        for arguments in self.options.evaluations:
            self._evaluate(arguments)
        self._write(chosen, status=COMPLETE)
        return self.facts

    def _in_order(self) -> list[Method]:
        """Methods whose first stage is another's come after it, so that the stage is found done."""
        return sorted(self.methods, key=lambda method: len(method.stages))

    def _begin(self) -> None:
        args = self.config.training_args()
        if (old := self._read()) and old.get("data", {}).get("fingerprint") != self.fingerprint:
            raise UserError(
                "holds a comparison on other rows", where=str(self.folder), mend="choose another --output, or remove the folder"
            )
        start = self._stage(self._spec("start", 0, {}, self.options.seeds[0], self.config["model_name_or_path"], is_trial=False))
        self.start_scores = {part: [np.asarray(row) for row in rows] for part, rows in start["scores"].items()}
        self.facts = {
            "kind": "comparison",
            "format": FORMAT,
            "folder": str(self.folder),
            "status": RUNNING,
            "versions": versions(),
            "device": describe_device(args.device),
            "compute_dtype": args.compute_dtype,
            "configuration": as_facts(self.config),
            "options": asdict(self.options),
            "data": {"source": self.config["dataset_name"], **self.data_facts},
            "start": {
                "model": start["model"],
                "sha256": start["sha256"],
                "test": summarise(self.data.test, self.start_scores["test"]).to_dict(),
                "evaluations": {},
            },
        }
        self._write()

    # ---- settings --------------------------------------------------------------------------------------------------------------------

    def _grid(self, method: Method, *, is_swept: bool = False) -> list[dict[str, float]]:
        """Settings to try of a method's last stage, the same number of learning rates for all; a sweep's are for the map alone."""
        own_rate = float(self.config["learning_rate"])
        rates = self.options.learning_rates or (own_rate,)
        strengths = self.options.strengths.get(method.name, method.strengths)
        if is_swept:
            rates = tuple(sorted({*rates, *(own_rate * factor for factor in SWEEP_RATES)}))
            strengths = tuple(sorted({*strengths, *method.sweep}))
        if method.strength_name is None:
            return [{"learning_rate": rate} for rate in rates]
        return [{"learning_rate": rate, method.strength_name: strength} for rate in rates for strength in strengths]

    def _tried(self, method: Method) -> list[dict[str, float]]:
        """The grid, and behind it what a sweep adds."""
        grid = self._grid(method)
        wider = self._grid(method, is_swept=True) if self.options.sweep and method.sweep else []
        return [*grid, *(options for options in wider if options not in grid)]

    def _tune(self, method: Method, chosen: dict[str, dict[str, float]]) -> dict[str, float]:
        """The settings with the best validation accuracy; of equals, the larger log odds ratio.

        A sweep's wider grid does not take part in the choice: a method that is swept would have more to choose from than the others.
        """
        for stage in method.stages[:-1]:
            if stage not in chosen:
                chosen[stage] = self._tune(method_of(stage), chosen)
        grid, tried = self._grid(method), self._tried(method)
        if len(tried) == 1:
            return tried[0]
        found: list[tuple[dict[str, float], _MethodRun]] = []
        for options in tried:
            run = self._train(method, {**chosen, method.name: options}, self.options.seeds[0], is_trial=True)
            found.append((options, run))
            self.trials[method.name] = found
            self._write()

        def merit(trial: tuple[dict[str, float], _MethodRun]) -> tuple[float, float]:
            summary = self._summary(trial[1], "validation")
            return summary["accuracy"]["value"], summary["log_odds_ratio"]["value"]

        best = max(found[: len(grid)], key=merit)[0]
        self.tell(f"chosen       {method.label}: {_words(best)}")
        return best

    # ---- stages ----------------------------------------------------------------------------------------------------------------------

    def _train(self, method: Method, chosen: dict[str, dict[str, float]], seed: int, *, is_trial: bool) -> _MethodRun:
        """All stages of a method. With no bound on the rows of trials, a trial is the run of its seed."""
        is_trial = is_trial and self.options.split.tune_rows is not None
        start = self.config["model_name_or_path"]
        done: list[tuple[StageSpec, dict[str, Any]]] = []
        for number, stage in enumerate(method.stages):
            is_last = number == len(method.stages) - 1
            # An early stage is that of the method of its own name, with its settings.
            name, index = (method.name, number) if is_last else (stage, 0)
            options = chosen[name]
            spec = self._spec(name, index, options, seed, start, is_trial=is_trial)
            done.append((spec, self._stage(spec)))
            start = weights(Path(spec.folder))
        return _MethodRun(method, chosen[method.name], seed, tuple(done))

    def _spec(self, method: str, number: int, options: dict[str, float], seed: int, start: str, *, is_trial: bool) -> StageSpec:
        spec = StageSpec(
            configuration=self._shared_configuration(),
            split=self.options.split if is_trial else replace(self.options.split, tune_rows=None),
            method=method,
            number=number,
            options=options,
            seed=seed,
            start=start,
            is_trial=is_trial,
            # A curve for the first seed: evaluating along the way costs as much again as training on a few hundred pairs.
            num_points=self.options.num_points if not is_trial and seed == self.options.seeds[0] else 0,
            folder="",
            date=self.data_facts["date"],
            num_processes=1 if method == "start" else self.options.num_processes,
        )
        # A start that is another stage's goes by that stage's name, so that the folder may be moved.
        identity = {**asdict(spec), "start": Path(start).parent.name if number else start, "data": self.fingerprint}
        del identity["date"]  # the fingerprint is of what it printed
        if spec.num_processes == 1:  # as such stages have always been called
            del identity["num_processes"]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        settings = [f"{_short(key)}{value:g}" for key, value in options.items()]
        words = [method, *settings, f"seed{seed}", *(["trial"] if is_trial else [])]
        return replace(spec, folder=str(self.folder / "runs" / f"{'-'.join(words)}-{digest.hexdigest()[:8]}"))

    def _shared_configuration(self) -> dict[str, dict[str, Any]]:
        """The configuration without what a stage sets itself or what only says where things are written."""
        free = {"output_dir", "seed", "learning_rate"}
        return {key: item for key, item in as_facts(self.config).items() if key not in free} | {
            key: {"value": None, "origin": "default"} for key in free
        }

    def _stage(self, spec: StageSpec) -> dict[str, Any]:
        """The result of a stage, from its folder or by running it."""
        folder = Path(spec.folder)
        result = folder / RESULT
        self._seen.add(spec.folder)
        if not result.exists():
            self._run_stage(spec, folder)
        return json.loads(result.read_text(encoding="utf-8"))

    def _run_stage(self, spec: StageSpec, folder: Path) -> None:
        kind = "trial" if spec.is_trial else f"seed {spec.seed}"
        what = "starting weights" if spec.method == "start" else f"{spec.method}, {_words(spec.options)}, {kind}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spec.json"
        spec.write(path)
        total = max(self._num_stages(), len(self._seen))
        mean_s = sum(self._took_s) / len(self._took_s) if self._took_s else None
        left = "" if mean_s is None else f"; about {human_seconds(mean_s * (total - len(self._seen) + 1))} left"
        self.tell(f"stage        {len(self._seen)} of {total}: {what}{left}")
        began_s = time.monotonic()
        run_stage_process(path, what, folder / "log.txt", spec.num_processes)
        took_s = time.monotonic() - began_s
        if spec.method != "start":
            self._took_s.append(took_s)
        self.tell(f"done         {what}: {took_s:.0f} s")

    def _num_stages(self) -> int:
        """Stages of the whole comparison: the start, every setting tried, and every seed's run of each method."""
        early = {stage: method_of(stage) for method in self.methods for stage in method.stages[:-1]}
        total = 1
        for method in {**early, **{method.name: method for method in self.methods}}.values():
            num_trials = len(self._tried(method))
            # With no bound on the rows of trials, the chosen trial is its seed's run.
            num_known = num_trials > 1 and self.options.split.tune_rows is None
            total += (num_trials if num_trials > 1 else 0) + len(self.options.seeds) - num_known
        return total

    def _drop_weights(self) -> None:
        """Weights of trials that no run starts from; those of runs stay, to be evaluated and talked to."""
        kept = {spec.folder for runs in self.runs.values() for run in runs for spec, _ in run.stages}
        for trials in self.trials.values():
            for _, run in trials:
                for spec, _ in run.stages:
                    if spec.folder not in kept:
                        for name in ("model", "adapter"):
                            shutil.rmtree(Path(spec.folder) / name, ignore_errors=True)

    # ---- evaluations -----------------------------------------------------------------------------------------------------------------

    def _evaluate(self, arguments: str) -> None:
        """`orpo eval` on the start and on every method's run of the first seed."""
        targets = {"start": Path(self.folder / "start"), **{name: runs[0].folder for name, runs in self.runs.items()}}
        for name, folder in targets.items():
            words = [self._target_word(word) for word in shlex.split(arguments)]
            target = [self.config["model_name_or_path"], "--output", str(folder / "eval")] if name == "start" else [str(folder)]
            log = folder / "eval.log"
            folder.mkdir(parents=True, exist_ok=True)
            began_s = time.monotonic()
            run_orpo_process(["eval", *target, *words, *([] if name == "start" else ["--no_before"])], f"orpo eval of {name}", log)
            self.tell(f"evaluated    {name}: {arguments} ({time.monotonic() - began_s:.0f} s)")

    def _target_word(self, word: str) -> str:
        if not word.startswith("@"):
            return word
        if word[1:] not in self.runs:
            raise UserError(
                f"{word} names no method of this comparison", where="--eval", expected=", ".join(f"@{name}" for name in self.runs)
            )
        return str(self.runs[word[1:]][0].folder)

    # ---- facts -----------------------------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / FILE
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"cannot be read: {error}", where=str(path), mend="remove it, or choose another --output") from error

    def _write(self, chosen: dict[str, dict[str, float]] | None = None, *, status: str = RUNNING) -> None:
        facts = {
            **self.facts,
            "status": status,
            "methods": {method.name: self._method_facts(method, chosen or {}) for method in self.methods},
        }
        facts["start"] = {**facts["start"], "evaluations": evaluations(self.folder / "start")}
        most = max(map(len, self.runs.values()), default=0)
        scored = {method.name: self._scored(method.name) for method in self.methods if most and len(self.runs.get(method.name, [])) == most}
        labels = {method.name: method.label for method in self.methods}
        verdicts = [verdict for first, second in _verdict_pairs(list(scored)) for verdict in compare_methods(first, second, scored, labels)]
        measured = {name: item for name, item in facts["methods"].items() if item["runs"]}
        sweep = {
            method.name: table
            for method in self.methods
            if method.strength_name and (table := sweep_table(facts["methods"][method.name]["trials"], method.strength_name))
        }
        self.facts = {**facts, "verdicts": verdicts, "claims": judge_claims(measured, verdicts), "sweep": sweep}
        write_atomically(self.folder / FILE, (json.dumps(redact(self.facts), indent=1, ensure_ascii=False) + "\n").encode())

    def _scored(self, name: str) -> Scored:
        return Scored(self.data.test, self.start_scores["test"], [run.scores("test") for run in self.runs[name]])

    def _method_facts(self, method: Method, chosen: dict[str, dict[str, float]]) -> dict[str, Any]:
        runs = self.runs.get(method.name, [])
        facts: dict[str, Any] = {
            "label": method.label,
            "strength_name": method.strength_name,
            "options": chosen.get(method.name),
            "trials": [
                {"id": run.folder.name, "options": options, "validation": self._summary(run, "validation")}
                for options, run in self.trials.get(method.name, [])
            ],
            "runs": [self._run_facts(run) for run in runs],
        }
        if runs:
            scored = self._scored(method.name)
            facts |= {"summary": scored.summary(), "change": scored.change().to_dict()}
        return facts

    def _summary(self, run: _MethodRun, part: str) -> dict[str, Any]:
        """Of a run's final weights; kept, since `comparison.json` is written after every trial."""
        key = (run.folder, part)
        if key not in self._summaries:
            groups = self.data.test if part == "test" else self.data.validation
            self._summaries[key] = summarise(groups, run.scores(part)).to_dict()
        return self._summaries[key]

    def _run_facts(self, run: _MethodRun) -> dict[str, Any]:
        from orpo.compare.measure import total_cost

        stages = [{"objective": result["objective"], **result["cost"]} for _, result in run.stages]
        totals = total_cost(stages)
        scores = run.scores("test")
        return {
            "id": run.folder.name,
            "seed": run.seed,
            "options": run.options,
            "folder": str(run.folder.relative_to(self.folder)),
            "stages": [{name: value for name, value in stage.items() if name != "tokens_at_step"} for stage in stages],
            "totals": totals,
            "test": self._summary(run, "test"),
            "change": paired_difference(self.data.test, self.start_scores["test"], scores).to_dict(),
            "curve": list(curve(run.stages)),
            "evaluations": evaluations(run.folder),
        }


def _verdict_pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """ORPO against each of the others, then the others among themselves."""
    ordered = sorted(names, key=lambda name: name != "orpo")
    yield from itertools.combinations(ordered, 2)


def _short(key: str) -> str:
    """For the name of a folder: `lr`, `alpha`, `beta`."""
    return "lr" if key == "learning_rate" else key.rpartition("_")[2]


def _words(options: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())
