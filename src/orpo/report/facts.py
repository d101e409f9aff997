"""What a folder holds, read without trust: damaged lines, half-written files and missing parts become notes, not errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo.errors import UserError
from orpo.report.sections import number, part, parts, text
from orpo.run.folder import RunFolder
from orpo.system.redact import redact

RESULTS = ("pairs", "retention", "ifeval", "mtbench", "alpacaeval", "custom")
"""Results of `orpo eval` that go before those of other tasks in a report, in this order."""
_OTHER_FILES = frozenset({"run.json", "demo.json", "comparison.json"})
COMPARISON_FILE = "comparison.json"
ROUNDS_FILE = "rounds.json"
_MAX_FILE_BYTES = 200_000_000


@dataclass
class Logs:
    """The lines of metrics.jsonl, parted by what they tell.

    Attributes:
        training: logs of training steps, in order.
        evaluation: logs of evaluations.
        end: the trainer's own summary, or empty.
        num_not_finite: logged values that are no numbers ("nan", "inf").
    """

    training: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    num_not_finite: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """One line, or one entry of a trainer's `state.log_history`."""
        self.num_not_finite += sum(value in ("nan", "inf", "-inf") for value in record.values() if isinstance(value, str))
        if "train_runtime" in record:
            self.end = record
        elif any(name.startswith("eval_") for name in record):
            self.evaluation.append(record)
        else:
            self.training.append(record)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged name; evaluations by their `eval_` names."""
        records = self.evaluation if name.startswith("eval_") else self.training
        points = [(number(record.get("step")), number(record.get(name))) for record in records]
        known = [(step, value) for step, value in points if step is not None and value is not None]
        return [step for step, _ in known], [value for _, value in known]

    @property
    def evaluation_prefixes(self) -> list[str]:
        """`eval_`, or one prefix for each of several evaluation sets."""
        names = {name.removesuffix("nll_loss") for record in self.evaluation for name in record if name.endswith("nll_loss")}
        return sorted(names)


@dataclass
class RunFacts:
    """A run's folder, read.

    Attributes:
        run: run.json; empty where it is missing.
        results: task -> record of `eval/<task>.json`.
        demo: the demo's own outcome, or empty.
        notes: what is missing, damaged or unusual, in sentences.
    """

    folder: Path
    run: dict[str, Any]
    logs: Logs
    results: dict[str, dict[str, Any]]
    demo: dict[str, Any]
    notes: list[str]

    @property
    def configuration(self) -> dict[str, Any]:
        """Option -> value."""
        return {key: part(item, "value") for key, item in parts(self.run, "configuration").items() if isinstance(item, dict)}

    @property
    def given(self) -> dict[str, Any]:
        """The options that a file or a flag set."""
        stored = parts(self.run, "configuration")
        return {key: value for key, value in self.configuration.items() if part(stored, key, "origin") != "default"}

    @property
    def objective(self) -> dict[str, Any]:
        """What was optimised, as the registry of objectives has told run.json; empty where that is missing."""
        return parts(self.run, "objective")

    @property
    def method(self) -> str:
        """ORPO, or what else the run was trained with."""
        return text(self.objective.get("label"), "ORPO")

    @property
    def preference(self) -> str | None:
        """What the objective's preference term is called, where it has a next-token loss beside it; None where it has not both."""
        term = text(self.objective.get("preference"))
        return term if term and self.objective.get("has_nll") is True else None

    @property
    def status(self) -> str:
        """complete, running, stopped, failed; unknown without run.json."""
        status = self.run.get("status")
        return status if isinstance(status, str) and status else "unknown"


def find_folder(path: str | Path) -> Path:
    """The run's or comparison's folder that a path means: itself, or the run around `model` or `adapter`.

    Raises:
        UserError: it is neither.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        is_there = folder.exists()
        raise UserError("is a file" if is_there else "does not exist", where=str(path), expected="the folder of a run or of a comparison")
    for candidate in (folder, folder.parent):
        if (
            is_comparison(candidate)
            or is_rounds(candidate)
            or (candidate / "run.json").is_file()
            or (candidate == folder and _has_results(folder))
        ):
            return candidate
    raise UserError(
        "is neither a run nor a comparison",
        where=str(path),
        expected=f"a folder with run.json, with {COMPARISON_FILE}, or with results of `orpo eval`",
        mend="`orpo train`, `orpo demo` and `orpo compare` make such folders",
    )


def is_comparison(folder: Path) -> bool:
    """Whether a comparison was made there."""
    return (folder / COMPARISON_FILE).is_file()


def is_rounds(folder: Path) -> bool:
    """Whether `orpo train --rounds` was at work there."""
    return (folder / ROUNDS_FILE).is_file()


def _has_results(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or bool(read_results(folder, []))


def _homes(folder: Path) -> tuple[Path, ...]:
    """Where results may lie: in a run's `eval`, or in the folder itself, as `orpo eval MODEL` leaves them."""
    return (folder / "eval",) if (folder / "run.json").is_file() else (folder / "eval", folder)


def read_run(folder: Path) -> RunFacts:
    """Everything in a run's folder. Secrets that got into a file are taken out once more."""
    notes: list[str] = []
    run = _read_run_json(folder, notes)
    logs = read_logs(folder / "metrics.jsonl", notes, is_expected=bool(run))
    results = read_results(folder, notes)
    demo = read_json(folder / "eval" / "demo.json", notes) or {}
    facts = RunFacts(folder, run, logs, results, demo, notes)
    _note_state(facts)
    return facts


def _read_run_json(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        facts = RunFolder(folder).read()
    except (UserError, RecursionError) as error:
        problem = error.what if isinstance(error, UserError) else "nested too deeply"
        notes.append(f"run.json cannot be used ({problem}): configuration, data and versions are unknown.")
        return {}
    if facts is None:
        notes.append("There is no run.json: configuration, data and versions are unknown.")
    return redact(facts or {})


def _note_state(facts: RunFacts) -> None:
    ended = facts.run.get("ended_by")
    steps = f"step {facts.run.get('last_step')} of {facts.run.get('num_steps')}"
    if facts.status == "running":
        last = facts.logs.training[-1].get("step") if facts.logs.training else None
        reached = f"the last log is of step {last} of {facts.run.get('num_steps')}" if last is not None else "no step is logged yet"
        facts.notes.append(
            f"The run has not ended: {reached}. What follows is what there is so far; the same command resumes a broken run."
        )
    elif facts.status in ("stopped", "failed"):
        facts.notes.append(f"The run {facts.status} at {steps}{f': {ended}' if isinstance(ended, str) else ''}.")
    if facts.logs.num_not_finite:
        facts.notes.append(f"{facts.logs.num_not_finite} logged values are not finite numbers; they leave gaps in the curves.")
    has_pairs = "pairs" in facts.results or facts.demo
    if facts.run and facts.status == "complete" and not has_pairs:
        facts.notes.append(f"Nothing was compared with the model before the training yet: orpo eval {facts.folder}")


def read_logs(path: Path, notes: list[str], *, is_expected: bool = True) -> Logs:
    """The lines of metrics.jsonl. A damaged line is counted and named; the one that a kill left unfinished is passed over."""
    logs = Logs()
    if not path.is_file():
        if is_expected:
            notes.append("There is no metrics.jsonl: no curves.")
        return logs
    damaged: list[int] = []
    for line_number, record in _lines(path, damaged):
        if number(record.get("step")) is None:
            damaged.append(line_number)
            continue
        logs.add(record)
    if damaged:
        named = ", ".join(map(str, damaged[:5])) + (" …" if len(damaged) > 5 else "")
        lines = "line is" if len(damaged) == 1 else "lines are"
        notes.append(f"metrics.jsonl: {len(damaged)} {lines} damaged and left out ({named}).")
    return logs


def _lines(path: Path, damaged: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # being written, or cut off by a kill
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield line_number, record
            elif line.strip():
                damaged.append(line_number)


def read_results(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Task -> record of each result that is there, of whatever task: a result says itself which one it is of."""
    found: dict[str, dict[str, Any]] = {}
    for home in _homes(folder):
        for path in sorted(home.glob("*.json"), key=lambda path: (_place(path.stem), path.stem)):
            if path.stem in found or path.name in _OTHER_FILES:
                continue
            record = read_json(path, notes)
            if record is None:
                continue
            if isinstance(record.get("result"), dict):
                found[path.stem] = record
            elif path.stem in RESULTS or "task" in record:
                notes.append(f"{home.name}/{path.name} is no result of `orpo eval`; it is left out.")
    return found


def _place(task: str) -> int:
    return RESULTS.index(task) if task in RESULTS else len(RESULTS)


def read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """An object from a file, without secrets; None where there is none, with a note where it cannot be read."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError("it is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}")
        return None
    redacted: dict[str, Any] = redact(value)
    return redacted


def read_whole(path: Path, notes: list[str], key: str, kind: type, *, writer: str) -> dict[str, Any]:
    """The object that a page is made of.

    Args:
        key, kind: what it holds at least.
        writer: the command that writes it.

    Raises:
        UserError: it is damaged; there is nothing else to go by.
    """
    found = read_json(path, notes)
    if found is None or not isinstance(found.get(key), kind):
        problem = notes[0] if notes else f"holds no {key}"
        raise UserError(problem, where=str(path), expected=f"what `{writer}` writes", mend=f"run `{writer}` again")
    return found


@dataclass
class ComparisonFacts:
    """A comparison's folder, read.

    Attributes:
        found: comparison.json, without secrets.
        notes: what is missing or damaged.
    """

    folder: Path
    found: dict[str, Any]
    notes: list[str]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Name -> what is known of a method, in the order of the comparison."""
        return {name: dict(value) for name, value in parts(self.found, "methods").items() if isinstance(value, Mapping)}

    def label_of(self, name: str) -> str:
        """A method's name for people."""
        return text(part(self.found, "methods", name, "label"), name)


def read_comparison(folder: Path) -> ComparisonFacts:
    """Everything in a comparison's folder.

    Raises:
        UserError: comparison.json is damaged; there is nothing else to go by.
    """
    notes: list[str] = []
    found = read_whole(folder / COMPARISON_FILE, notes, "methods", dict, writer="orpo compare")
    facts = ComparisonFacts(folder, found, notes)
    _note_comparison_state(facts)
    return facts


def _note_comparison_state(facts: ComparisonFacts) -> None:
    status = text(facts.found.get("status"), "unknown")
    if status == "complete":
        return
    done = [
        facts.label_of(name) for name, method in facts.methods.items() if number(part(method, "summary", "margin", "value")) is not None
    ]
    missing = [facts.label_of(name) for name in facts.methods if facts.label_of(name) not in done]
    told = f"done: {', '.join(done) or 'nothing'}; missing: {', '.join(missing) or 'nothing'}"
    facts.notes.append(f"The comparison is not complete ({status}). {told}. The same `orpo compare` command goes on from there.")
