"""Find before training what can be found: orpo check CONFIG.yaml [--key value …]

Checks the configuration, the run's folder, the data, the template's boundaries, disk and memory, and makes one real step and an
evaluation on the longest rows. Nothing of the run is created. Exit code 0: it would run; 2: something must be mended.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orpo.config.options import ORPOConfig
    from orpo.data.types import TokenGroup
    from orpo.run.config import RunConfig
    from orpo.run.data import RunData
    from orpo.training.planning import Plan

NAME = "check"
HELP = "find what would go wrong in a run, before it is started"
TAKES_KEYS = True

OK, WARNING, PROBLEM, SKIPPED = "ok", "warning", "problem", "skipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that are no keys of the configuration."""
    parser.usage = "orpo check [CONFIG.yaml] [--key value …] [--json] [--quick]"
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="do not load the model and make no step")


@dataclass
class CheckResult:
    """The outcome of one check: `status` is ok, warning, problem or skipped."""

    name: str
    status: str
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)


LABEL_CELLS = 24
"""Width of a finding's status and name, behind which it is told."""


class CheckReport:
    """Findings in order; a check that raises a user error is a problem, and those that depend on it are skipped.

    Attributes:
        command: what would run where nothing is found.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.findings: list[CheckResult] = []
        self.command = "orpo train"
        self._tell = tell

    def add(self, name: str, status: str, detail: str, **facts: Any) -> None:
        """Record and show one finding."""
        self.findings.append(CheckResult(name, status, detail, facts))
        self._tell(f"{status:<8} {name:<14} {detail}")

    def attempt(self, name: str, check: Callable[[], Any]) -> Any:
        """Run a check that records its own finding; None where it failed."""
        try:
            return check()
        except UserError as error:
            self.add(name, PROBLEM, str(error))
            return None

    def show(self, line: str) -> None:
        """A line for the reader that is no finding."""
        self._tell(line)

    def skip(self, *names: str) -> None:
        """Say what could not be looked at."""
        for name in names:
            self.add(name, SKIPPED, "needs what failed above")

    @property
    def is_ok(self) -> bool:
        """Whether the run could be started."""
        return all(finding.status != PROBLEM for finding in self.findings)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be; 2 where there is a problem."""
    from orpo.system.console import print_json, report_console, say
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    console = report_console(is_json=args.json)
    report = CheckReport(lambda line: say(console, line, label_cells=LABEL_CELLS))
    check_all(args.keys, report, is_quick=args.quick)
    if args.json:
        print_json({"is_ok": report.is_ok, "findings": [asdict(finding) for finding in report.findings]})
    else:
        say(console, f"ready: {report.command} would run" if report.is_ok else "not ready: mend the problems above")
    return 0 if report.is_ok else UserError.exit_code


def check_all(keys: list[str], report: CheckReport, *, is_quick: bool = False) -> None:
    """All checks in the order in which a run would meet the problems."""
    resolved = report.attempt("configuration", lambda: _check_configuration(keys, report))
    if resolved is None:
        report.skip("folder", "data", "template", "disk", "memory", "step")
        return
    config, args = resolved
    is_writable = report.attempt("folder", lambda: _check_folder(config, report))
    if config["on_policy"] is not None or config["rounds"] is not None:
        report.attempt("data", lambda: _check_rounds(config, report))
        for name in ("disk", "memory", "step"):
            report.add(name, SKIPPED, "the pairs that rounds train on are not there yet")
        return
    data = report.attempt("data", lambda: _check_data(config, args, report))
    plan = report.attempt("model", lambda: _plan(config, args, data))
    if plan is None:
        report.skip("disk", "memory", "step")
        return
    if is_writable:
        _check_disk(config, args, plan, report)
    else:
        report.skip("disk")
    _check_memory(args, plan, report)
    if is_quick:
        report.add("step", SKIPPED, "--quick")
    elif data is None:
        report.skip("step")
    else:
        report.attempt("step", lambda: _check_step(config, args, data, report))


def _check_configuration(keys: list[str], report: CheckReport) -> tuple[RunConfig, ORPOConfig]:
    from orpo.run.config import given_facts, resolve
    from orpo.training.setup import require_kernel

    config = resolve(None, keys, is_launch=False)
    args = config.training_args()
    require_kernel(args)
    if config["load_in_4bit"] or config["load_in_8bit"]:  # told with --quick as well, which loads nothing
        from orpo.models.quantized import require_bitsandbytes

        require_bitsandbytes(in_4bit=config["load_in_4bit"])
    given = given_facts(config)
    report.add("configuration", OK, f"{len(given)} keys given, {args.compute_dtype} on {args.device}", values=given)
    for key, item in given.items():
        report.show(f"{'':<23} {key} = {item['value']}   ({item['origin']})")
    for note in config.notes:
        report.add("configuration", WARNING, note)
    if config.is_spread_later:
        report.command = "orpo train --num_processes N"
    return config, args


def _check_folder(config: RunConfig, report: CheckReport) -> bool:
    """The folder, or the nearest one above it that is there, can be written."""
    from orpo.checkpoint import list_checkpoints
    from orpo.run.folder import COMPLETE, RunFolder

    folder = Path(config.output_dir).absolute()
    present = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=present, prefix=".orpo-check-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(present), mend="choose another output_dir, or change its permissions"
        ) from error
    num = len(list_checkpoints(folder))
    if RunFolder(folder).status == COMPLETE:
        report.add("folder", WARNING, f"{folder}: a complete run is here; the same configuration would do nothing, another is refused")
    else:
        report.add(
            "folder", OK, f"{folder}: " + (f"a run with {num} checkpoints is here; it would be resumed" if num else "can be written")
        )
    return True


def _check_rounds(config: RunConfig, report: CheckReport) -> None:
    """Rounds: their options, prompts and scorers."""
    from orpo.inference.ready import Loading
    from orpo.onpolicy.rounds import read_options, read_round_prompts

    num_rounds, _, options = read_options(config)
    asked, held_out = read_round_prompts(config, lambda line: report.add("data", WARNING, line.partition(" ")[2].strip()))
    for scorer in options.scorers(str(config["model_name_or_path"]), Loading()):
        scorer.check([*asked.prompts, *held_out])
    report.add("data", OK, f"{len(asked.prompts)} of {asked.num_rows} prompts to train on, {len(held_out)} held out")
    report.add("rounds", OK, f"{num_rounds}, {options.num_samples} answers to each prompt, scored by {', '.join(options.scorer_names())}")


def _check_data(config: RunConfig, args: ORPOConfig, report: CheckReport) -> RunData:
    from orpo.data.dataset import fingerprint
    from orpo.run.data import prepare_data

    data = prepare_data(config, args, lambda line: None)
    facts = data.encoder.describe()
    num_held_out = len(data.held_out) if data.held_out is not None else 0
    report.add(
        "data",
        OK,
        f"{len(data.known_rows)} of {data.train_report.num_rows} rows to train on, {num_held_out} held out"
        + (" (the first window of the stream)" if args.streaming else ""),
        train=data.train_report.to_dict(),
        held_out=data.held_out_report.to_dict() if data.held_out_report else None,
        fingerprint=fingerprint(data.train),
        held_out_fingerprint=None if data.held_out is None else fingerprint(data.held_out),
    )
    for warning in [*data.train_report.histogram(), *data.train_report.warnings()]:
        report.add("data", WARNING, warning.strip())
    boundary = f", boundary {facts['boundary']}" if "boundary" in facts else ""
    report.add("template", OK, f"{facts['template']}: answers end with {facts['terminator']!r}{boundary}", **facts)
    return data


def _plan(config: RunConfig, args: ORPOConfig, data: RunData | None) -> Plan:
    from orpo.training.planning import make_plan, packed_lengths

    if data is None:
        return make_plan(config, args)
    num_rows = None if args.streaming else len(data.known_rows)
    return make_plan(config, args, num_rows=num_rows, **packed_lengths(data.known_rows, args))


def _check_disk(config: RunConfig, args: ORPOConfig, plan: Plan, report: CheckReport) -> None:
    from orpo.system.console import human_bytes

    folder = Path(config.output_dir).absolute()
    present = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(present).free
    has_checkpoints = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    needed = plan.disk_bytes(args.save_total_limit, args.save_steps, has_checkpoints=has_checkpoints)
    detail = f"{human_bytes(needed)} at most for checkpoints and final weights, {human_bytes(free)} free"
    if needed > free:
        detail += "\n  to mend it: save_total_limit: 2, a larger save_steps, or an output_dir on another disk"
    report.add("disk", PROBLEM if needed > free else OK, detail, needed_bytes=needed, free_bytes=free)


def _check_memory(args: ORPOConfig, plan: Plan, report: CheckReport) -> None:
    from orpo.system.console import human_bytes
    from orpo.system.machine import memory_facts

    memory = memory_facts(args.device)
    free = memory["free_bytes"] or memory["total_bytes"]
    detail = f"about {human_bytes(plan.memory_bytes)} on {args.device}, " + (f"{human_bytes(free)} free" if free else "free: unknown")
    is_tight = free is not None and plan.memory_bytes > free
    if is_tight:
        detail += "\n  to mend it: max_tokens_per_microbatch, gradient_checkpointing: true, use_peft: true, or a smaller model"
    # An estimate is no proof: the step below decides.
    report.add("memory", WARNING if is_tight else OK, detail, estimate_bytes=plan.memory_bytes, free_bytes=free)


def _for_a_trial(args: ORPOConfig, scratch: str) -> ORPOConfig:
    """The options of one step that nobody hears of: transformers' trainer creates the hub repository, opens the trackers and asks for
    evaluation rows when it is built."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    trial = copy.copy(args)
    trial.output_dir, trial.gradient_accumulation_steps = scratch, 1
    trial.eval_strategy, trial.save_strategy, trial.load_best_model_at_end = IntervalStrategy.NO, SaveStrategy.NO, False
    trial.do_eval, trial.report_to, trial.push_to_hub = False, [], False
    return trial


def _checkpoint_activations(trainer: Any, args: ORPOConfig, stack: ExitStack) -> str:
    """As when training begins: the settings are looked at by the first backward pass alone. Gives what is to be told."""
    model = trainer.model
    told = ", layers compiled" if trainer.compiling(stack) else f", compiled: {trainer.compiled}" if args.torch_compile else ""
    if trainer.recomputes_here:
        num_layers = stack.enter_context(trainer.recomputing())
        return f"{told}, {num_layers} layers computed again"
    if args.gradient_checkpointing:
        kwargs = dict(args.gradient_checkpointing_kwargs or {})
        own = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs or None, **own)
    return told


def _try_optimizer(trainer: Any, args: ORPOConfig) -> None:
    """Let the optimizer make its step; some are made anywhere and step on one kind of device alone."""
    from orpo.config.optimizers import explain_optimizer
    from orpo.training.runner import explain_out_of_memory

    try:
        if (scaler := trainer.accelerator.scaler) is None:
            trainer.optimizer.step()
        else:
            scaler.step(trainer.optimizer)
    except Exception as error:  # whatever a package raises
        name = str(getattr(args.optim, "value", args.optim))
        raise explain_out_of_memory(error, args) or explain_optimizer(error, name, given=args.optim_args) from error


def _longest(groups: Sequence[TokenGroup], number: int) -> list[TokenGroup]:
    """The rows of most tokens, the longest first."""
    from orpo.data.stored.measures import measures_of

    order = (-measures_of(groups).num_tokens).argsort(kind="stable")
    return [groups[int(row)] for row in order[:number]]


def _check_step(config: RunConfig, args: ORPOConfig, data: RunData, report: CheckReport) -> None:
    """One real step on the longest rows, with the optimizer, and an evaluation; in a folder that is removed again."""
    import torch

    from orpo.system.console import human_bytes
    from orpo.system.machine import peak_memory_bytes
    from orpo.training.runner import build_trainer, explain_out_of_memory, load_run_model

    longest = _longest(data.known_rows, args.per_device_train_batch_size)
    held_out = _longest(data.held_out or [], args.per_device_eval_batch_size)
    report.show(f"working      loads the model, compares the engines, makes one step of {len(longest)} rows")
    loaded = load_run_model(config, args, data)
    with tempfile.TemporaryDirectory(prefix="orpo-check-") as scratch:
        args = _for_a_trial(args, scratch)
        trainer = build_trainer(config, args, replace(data, train=longest, held_out=None), loaded.model, [])
        try:
            engine = trainer.engine.name
            start = time.perf_counter()
            trainer.create_optimizer_and_scheduler(num_training_steps=2)
            with ExitStack() as stack:
                told = _checkpoint_activations(trainer, args, stack)
                loss = trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
            norm = trainer._grad_norm  # before clipping; None where the weights are sharded
            _try_optimizer(trainer, args)
            seconds = time.perf_counter() - start
            if held_out:
                trainer.evaluate(held_out)
        except (RuntimeError, MemoryError) as error:
            raise explain_out_of_memory(error, args) or error from error
    if not torch.isfinite(loss):
        raise UserError(f"the loss is {float(loss)}", where="first step", mend="look at the rows, or set bf16: false")
    if norm == 0:
        raise UserError("no weight gets a gradient", where="first step", mend="nothing would learn; look at lora_target_modules")
    peak = peak_memory_bytes(args.device)
    shown_norm = "unknown" if norm is None else f"{norm:.3g}"
    report.add(
        "step",
        OK,
        f"loss {float(loss):.3f}, gradient norm {shown_norm}, {seconds:.1f} s for the {len(longest)} longest rows, {engine} engine{told}, "
        f"peak of this process {human_bytes(peak) if peak else 'unknown'}",
        loss=float(loss),
        grad_norm=norm,
        seconds=seconds,
        peak_bytes=peak,
        engine=engine,
        num_tokens=sum(group.num_tokens for group in longest),
    )
