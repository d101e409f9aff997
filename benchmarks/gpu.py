"""One GPU, ten minutes: this trainer against TRL's and Liger's, arm by arm on the same random-weight models.

    python benchmarks/gpu.py --minutes 8 --out results        # on a GPU: the cuda tests, then the cells in the order of the goals
    python benchmarks/gpu.py --tests-only                     # the cuda tests alone, as `make test-cuda`
    python benchmarks/gpu.py --dry                            # tiny shapes on a CPU: does the script itself work?

Writes results/gpu.json, gpu.txt and gpu.svg whenever an arm has got further, and a trace of our best arm behind the first cell. What does
not fit into the time that is left is skipped and named (`gpu_plan.py`). benchmarks/gpu.md says how to bring it to a machine without
network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gpu_arms import ARMS, Cell
from gpu_cells import MIXES, MODELS, ROWS_PER_STEP, TINY, Shape, load_model, make_cell
from gpu_plan import NO_TIME, Clock, Job, Measuring, by_speed, deadline, free, jobs_of, wait
from gpu_table import GOALS, figure, table, told_of_tests

HERE = Path(__file__).parent
CELLS = (
    *(("Qwen2.5-3B", mix) for mix in ("HH", "long prompt", "UltraFeedback")),
    *(("Llama-3.1-8B, LoRA", mix) for mix in ("HH", "UltraFeedback")),
    *(("Llama-3.2-1B", mix) for mix in ("HH", "UltraFeedback")),
    ("Qwen2.5-3B", "four answers"),
)
LEAST_S = 20
"""With less time left no other cell is begun."""
TEST_SHARE = 0.3
"""Of all the time, for the tests at most."""


class Results:
    """What is known so far, in files that are whole at any time."""

    def __init__(self, folder: Path, is_dry: bool) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {"environment": environment(), "dry": is_dry, "cells": {}}
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self) -> None:
        """Write everything anew."""
        self._write("gpu.json", json.dumps(self.values, indent=1) + "\n")
        if "matmul_flops" in self.values:
            self._write("gpu.txt", table(self.values) + "\n")
            self._write("gpu.svg", figure(self.values))

    def _write(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.folder / name)


def environment() -> dict[str, Any]:
    """What it runs on."""
    import importlib.metadata

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel", "triton", "bitsandbytes", "orpo")
    facts: dict[str, Any] = {"python": platform.python_version(), "versions": {name: version(name) for name in names}}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        facts |= {"device": torch.cuda.get_device_name(0), "memory_gb": memory / 1e9, "cuda": torch.version.cuda}
    return facts


# ---- the tests -------------------------------------------------------------------------------------------------------------------------


def test_files() -> list[str]:
    """Those with tests marked `cuda`, by their text: to collect every test of the suite would take half a minute of the device's time."""
    files = sorted((HERE.parent / "tests").rglob("test_*.py"))
    return [str(path) for path in files if re.search(r"mark\.cuda|= CUDA_TESTS", path.read_text(encoding="utf-8"))]


def cuda_tests(limit_s: float, log: Path, files: list[str] | None = None) -> dict[str, Any]:
    """The tests marked `cuda` in a process of their own, which is over after `limit_s` with all that it has started.

    Returns:
        Its exit code (None: it was stopped), the seconds it took, how many tests passed, were skipped and failed, and who failed.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += [f"--session-timeout={max(1, limit_s - 5):.0f}"]  # at the end of a test, with a summary of what was done
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # A file, not a pipe: compilers that a test has started would keep a pipe open behind the end of the tests.
        process = subprocess.Popen(
            [*command, *(test_files() if files is None else files)],
            cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a test that hangs, and compilers that outlive theirs
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    return {"code": code, "seconds": round(time.monotonic() - begin, 1), **outcomes(text), "last_lines": text.splitlines()[-30:]}


def outcomes(text: str) -> dict[str, Any]:
    """What pytest's lines say of each test, of a session that was cut off too."""
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    counts = Counter(word.lower() for _, word in found)
    failed = sorted({name for name, word in found if word in ("FAILED", "ERROR")})
    return {"passed": counts["passed"], "skipped": counts["skipped"], "failed": len(failed), "who_failed": failed}


# ---- the cells -------------------------------------------------------------------------------------------------------------------------


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the device's own products, in this very run."""
    size = 8192 if device.type == "cuda" else 256
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        left @ right
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


class Bench:
    """The jobs one after the other; a model stays for as long as the next job is of it too."""

    def __init__(self, args: argparse.Namespace, clock: Clock, results: Results) -> None:
        self.args, self.clock, self.results = args, clock, results
        self.device = torch.device("cpu" if args.dry else "cuda")
        self.steps = (1, 2) if args.dry else (3, 8)
        self.shapes: dict[str, Shape] = TINY if args.dry else MODELS
        self._start_s: dict[str, float] = {}
        self._model: tuple[str, Any, torch.optim.Optimizer] | None = None

    def run(self) -> None:
        """As many as fit."""
        speed = self.results.values["matmul_flops"] = matmul_speed(self.device, torch.float32 if self.args.dry else torch.bfloat16)
        cells = list(CELLS[: self.args.cells])
        jobs = jobs_of(cells, sum(f"{model}, {mix}" in GOALS for model, mix in cells), list(ARMS))
        while jobs:
            found = self.results.values["cells"].setdefault(jobs[0].cell, {})
            if self.clock.left_s < (0 if jobs[0].is_goal else LEAST_S):
                found |= {arm.name: dict(NO_TIME) for arm in jobs[0].arms}
            else:
                print(f"{jobs[0].cell} … {self.clock.left_s:.0f} s left", file=sys.stderr, flush=True)
                self._run_job(jobs[0], deadline(self.clock, jobs), speed, found)
            self.results.keep()
            done = jobs.pop(0)
            for job in jobs:
                if job.is_goal:
                    job.arms = by_speed(done.arms, found)

    def _run_job(self, job: Job, until: float, speed: float, found: dict[str, Any]) -> None:
        try:
            rows = 4 if self.args.dry else ROWS_PER_STEP[job.mix]
            cell = self._cell(job, rows)
            given = {"steps": self.steps, "clock": self.clock, "until": until, "speed": speed}
            measuring = Measuring(job, cell, rows=rows, results=found, keep=self.results.keep, start_s=self._start_s, **given)
            measuring.run()
            if self.args.trace and job.is_goal:
                self.args.trace = not self._trace(measuring)
            measuring.ready.clear()
            free(cell)
        except Exception as error:  # the other cells are worth having
            found["all arms"] = {"failed": f"{type(error).__name__}: {error}"[:300]}

    def _cell(self, job: Job, rows: int) -> Cell:
        shape = self.shapes[job.model]
        if self._model is None or self._model[0] != job.model:
            self._model = None  # before the next one is made
            self._model = (job.model, *load_model(shape, self.device))
        lengths = tuple(max(2, length // 16) for length in MIXES[job.mix]) if self.args.dry else MIXES[job.mix]
        return make_cell(*self._model[1:], shape, lengths, rows)

    def _trace(self, measuring: Measuring) -> bool:
        """One micro-batch of our best arm, for chrome://tracing; whether there is one. A whole step's file would take a minute to write."""
        ours = [ready for ready in measuring.ready.values() if ready.arm.side == "orpo"]
        if not ours:
            return False
        best = min(ours, key=lambda ready: ready.step_s)
        try:
            with best.stepper.turn(), torch.profiler.profile() as profile:
                best.stepper.step(0, best.micro, best.micro)
                wait(self.device)
            profile.export_chrome_trace(str(self.results.folder / "gpu-trace.json"))
            self.results.values["trace"] = best.arm.name
        except Exception as error:  # nothing is measured by it
            self.results.values["trace"] = f"failed: {type(error).__name__}: {error}"[:300]
        return True


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything; what does not fit is skipped")
    parser.add_argument("--test-minutes", type=float, default=2.0, help="of them for the cuda tests, three tenths at most; 0: none")
    parser.add_argument("--tests-only", action="store_true", help="the cuda tests and nothing else")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only so many, from the first")
    parser.add_argument(
        "--trace", action=argparse.BooleanOptionalAction, default=True, help="one micro-batch of our best arm, for chrome://tracing"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, clock: Clock | None = None) -> int:
    args = _options(argv)
    if not (args.dry or args.tests_only or torch.cuda.is_available()):
        print("no GPU is here; --dry tries the script on a CPU", file=sys.stderr)
        return 2
    clock = Clock(args.minutes) if clock is None else clock
    results = Results(args.out, args.dry)
    results.keep()
    if args.tests_only or (not args.dry and args.test_minutes > 0):
        limit = args.test_minutes if args.tests_only else min(args.test_minutes, TEST_SHARE * args.minutes)
        tests = results.values["tests"] = cuda_tests(60 * limit, args.out / "tests.log")
        results.keep()
        print(told_of_tests(tests), flush=True)
        if args.tests_only:
            return 1 if tests["failed"] or tests["code"] not in (0, 5) else 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` stops it as Ctrl-C does
    try:
        Bench(args, clock, results).run()
    except KeyboardInterrupt:
        print("stopped; what was measured is kept", file=sys.stderr)
        results.keep()
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        if "matmul_flops" in results.values:
            print(table(results.values))
    failed = [name for arms in results.values["cells"].values() for name, result in arms.items() if "failed" in result]
    return 1 if failed and args.dry else 0


if __name__ == "__main__":
    sys.exit(main())
