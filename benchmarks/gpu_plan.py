"""What `gpu.py` does with the minutes that it was given: which arms come first, how many steps each gets, and what is left out.

A cell has a budget. Six tenths of it are for building the arms and warming them up, one of TRL's and one of ours in turn, the likely
winners first: by the list at first, then by the cell before. What is left goes to timed steps, as many as fit by what the warm-up took, the
best of each side first. So a slow arm costs other arms their place, and no goal its figure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_arms import Arm, CannotRunError, Cell
from gpu_cells import flops_of

WARM_UP_SHARE = 0.6
"""Of a cell's time, for building and warming up."""
SLOW_SHARE = 0.3
"""Of a cell's time: an arm that takes longer to be built and warm comes last in the next cell."""
FEWEST_STEPS = 3
"""Timed steps that an arm gets before a slower one gets any."""
COMPILING_S = 120
"""What compiled layers may take before their first step; with less time left they are left out."""
COMMON_ROWS = 2
"""Rows of a micro-batch where memory is compared."""
MEMORY_SHARE = 0.92
"""Of the device's memory, for the largest micro-batch that is tried: lengths differ from step to step."""
NO_TIME = {"skipped": "no time left"}


class Clock:
    """The time that was given, from now on."""

    def __init__(self, minutes: float) -> None:
        self.end = self.now() + 60 * minutes

    def now(self) -> float:
        return time.perf_counter()

    @property
    def left_s(self) -> float:
        return self.end - self.now()


@dataclass
class Job:
    """Some arms on one cell.

    Attributes:
        model, mix: of the cell.
        arms: in the order in which they are tried.
        is_goal: whether a goal rests on it: then one arm of each side is measured whatever it takes.
    """

    model: str
    mix: str
    arms: list[Arm]
    is_goal: bool = False

    @property
    def cell(self) -> str:
        return f"{self.model}, {self.mix}"


def jobs_of(cells: list[tuple[str, str]], goals: int, arms: list[Arm]) -> list[Job]:
    """What decides the goals first, then the same arms on the other cells, then the other arms on all of them."""
    deciding, others = [arm for arm in arms if not arm.is_extra], [arm for arm in arms if arm.is_extra]
    first = [Job(*cell, deciding, is_goal=number < goals) for number, cell in enumerate(cells)]
    return [*first, *(Job(*cell, others) for cell in cells if others)]


def by_speed(arms: list[Arm], results: dict[str, Any]) -> list[Arm]:
    """The arms in the order that another cell suggests: sides in turn, the fastest there first, then those that are not known, and last
    those whose start alone took too long."""

    def rank(arm: Arm) -> tuple[bool, bool, float]:
        found = results.get(arm.name, {})
        rate = float(found.get("pairs_per_s", 0.0))
        is_last = found.get("start_share", 0.0) > SLOW_SHARE or "cannot" in found or "failed" in found
        return is_last, not rate, -rate

    places = {arm.name: place for side in ("TRL", "orpo") for place, arm in enumerate(sorted(_of(arms, side), key=rank))}
    return sorted(arms, key=lambda arm: places[arm.name])


def _of(arms: list[Arm], side: str) -> list[Arm]:
    return [arm for arm in arms if arm.side == side]


def deadline(clock: Clock, jobs: list[Job]) -> float:
    """Until when the first of the jobs may go on: those of the goals share what is left, later ones take all of it."""
    num_goals = sum(job.is_goal for job in jobs)
    return clock.now() + clock.left_s / max(1, num_goals)


@dataclass
class Ready:
    """An arm that is built and warm."""

    arm: Arm
    stepper: Any
    micro: int
    step_s: float = 0.0


class Measuring:
    """The arms of one job, warmed up one by one and then in turns.

    Args:
        job, cell: what is measured.
        rows: of a step.
        steps: (to warm up, to time) at most.
        clock: the time in all; until: when this job is to be over.
        speed: of the device's products, operations per second.
        results: by arm, filled here; keep: called whenever there is more in them.
        start_s: what it took to build and warm each arm when it was last done; kept up here.
    """

    def __init__(
        self,
        job: Job,
        cell: Cell,
        *,
        rows: int,
        steps: tuple[int, int],
        clock: Clock,
        until: float,
        speed: float,
        results: dict[str, Any],
        keep: Callable[[], None],
        start_s: dict[str, float],
    ) -> None:
        self.job, self.cell, self.rows, self.clock, self.until, self.speed = job, cell, rows, clock, until, speed
        self.results, self.keep, self.start_s = results, keep, start_s
        self.warm_up, self.num_timed = steps
        self.ready: dict[str, Ready] = {}
        self._began = clock.now()
        self._last_start_s: dict[str, float] = {}

    def run(self) -> None:
        """Everything."""
        for arm in self.job.arms:
            self._start(arm)
            self.keep()
        for name in self._turns():
            if self._may_take_turn(name):
                self._take_turn(self.ready[name])
                self.keep()

    # ---- warming up ----------------------------------------------------------------------------------------------------------------

    def _start(self, arm: Arm) -> None:
        if not self._has_time_for(arm):
            self.results[arm.name] = dict(NO_TIME)
            return
        start = self.clock.now()
        result = self.results[arm.name] = {"warm_up": {}, "timed": {}, "is_later": arm.is_extra}
        try:
            self.ready[arm.name] = self._warmed_up(arm, result)
        except CannotRunError as error:
            self.results[arm.name] = {"cannot": str(error)}
        except Exception as error:  # one arm that fails must not cost the others
            self.results[arm.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        free(self.cell)
        self._last_start_s[arm.side] = self.start_s[arm.name] = took_s = self.clock.now() - start
        self.results[arm.name]["start_share"] = took_s / (self.until - self._began)

    def _has_time_for(self, arm: Arm) -> bool:
        now = self.clock.now()
        if self.job.is_goal and arm.side not in {one.arm.side for one in self.ready.values()}:
            return self.clock.left_s > 0
        expected = self.start_s.get(arm.name, max(COMPILING_S if arm.compiled else 0, self._last_start_s.get(arm.side, 10.0)))
        return now + expected < self._began + WARM_UP_SHARE * (self.until - self._began)

    def _warmed_up(self, arm: Arm, result: dict[str, Any]) -> Ready:
        """The arm built and warm, with the largest micro-batch that fits.

        Raises:
            CannotRunError: not here, or not even one row fits.
        """
        begin = self.clock.now()
        stepper = arm.build(self.cell)
        ready = Ready(arm, stepper, self._first_guess(stepper, result))
        share_s = WARM_UP_SHARE * (self.until - self._began) / len(self.job.arms)
        least = 2 if arm.compiles else 1  # the first step is the compiler's
        number = 0
        while number < self.warm_up and (number < least or self.clock.now() - begin < share_s):
            seconds = self._tried(stepper, number, ready.micro)
            if seconds is None:
                ready.micro = _halved(ready.micro)
                continue
            ready.step_s = seconds[0]
            self._note(result["warm_up"], number, *seconds)
            number += 1
        result["micro_rows"] = ready.micro
        summarise(result, self.rows * self.cell.pairs_per_row, self.speed)
        return ready

    def _first_guess(self, stepper: Any, result: dict[str, Any]) -> int:
        """Rows of a micro-batch to begin with, by what 2 and 4 of them take; the peak at 2 is noted."""
        peaks: dict[int, float] = {}
        for micro in (COMMON_ROWS, 2 * COMMON_ROWS):
            if micro > self.rows or self._tried(stepper, 0, micro, rows=min(2 * micro, self.rows)) is None:
                break
            if self.cell.device.type != "cuda":
                return self.rows
            peaks[micro] = torch.cuda.max_memory_allocated()
        if not peaks:
            result["common"] = f"out of memory at {COMMON_ROWS} rows"
            return 1
        result["common_gb"] = peaks[COMMON_ROWS] / 1e9
        if len(peaks) == 1:
            return COMMON_ROWS
        total = torch.cuda.get_device_properties(0).total_memory
        return rows_that_fit(self.rows, peaks, MEMORY_SHARE * total)

    def _tried(self, stepper: Any, number: int, micro: int, rows: int | None = None) -> tuple[float, float] | None:
        """A step that may find no memory: its seconds, or None."""
        try:
            return self._step(stepper, number, micro, rows)
        except torch.OutOfMemoryError:
            pass
        # Behind the handler: inside it the exception still holds the frames of the step, and with them all of its tensors.
        free(self.cell)
        return None

    def _step(self, stepper: Any, number: int, micro: int, rows: int | None = None) -> tuple[float, float]:
        """(seconds of a step, of them until the host was free)."""
        first = number * self.rows % len(self.cell.groups)
        with stepper.turn():
            wait(self.cell.device)
            if self.cell.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = self.clock.now()
            stepper.step(first, self.rows if rows is None else rows, micro)
            host = self.clock.now() - start
            wait(self.cell.device)
            return self.clock.now() - start, host

    # ---- timed steps ---------------------------------------------------------------------------------------------------------------

    def _best(self) -> list[str]:
        """The fastest of each side, by its last step."""
        sides = {ready.arm.side for ready in self.ready.values()}
        return [
            min((name for name, ready in self.ready.items() if ready.arm.side == side), key=lambda name: self.ready[name].step_s)
            for side in sorted(sides)
        ]

    def _turns(self) -> list[str]:
        """Who takes turns, round by round: all arms as often as fits, and without the slowest where that would be too seldom."""
        best = self._best()
        names = [*best, *sorted(set(self.ready) - set(best), key=lambda name: self.ready[name].step_s)]
        fewest = min(FEWEST_STEPS, self.num_timed)
        while True:
            round_s = sum(self.ready[name].step_s for name in names)
            count = int((self.until - self.clock.now()) / round_s) if round_s else self.num_timed
            if count >= fewest or len(names) <= len(best):
                return names * max(1, min(count, self.num_timed))
            names.pop()

    def _may_take_turn(self, name: str) -> bool:
        if name not in self.ready or self.clock.left_s <= 0:
            return False
        if self.job.is_goal and name in self._best() and not self.results[name]["timed"]:
            return True
        return self.clock.now() + self.ready[name].step_s <= self.until

    def _take_turn(self, ready: Ready) -> None:
        """One timed step. Where memory has become too small since it was tried, the next turn is with half the rows."""
        result = self.results[ready.arm.name]
        number = self.warm_up + len(result["timed"].get("seconds", ()))
        try:
            seconds = self._tried(ready.stepper, number, ready.micro)
            if seconds is None:
                ready.micro = result["micro_rows"] = _halved(ready.micro)
                return
        except Exception as error:  # one arm that fails must not cost the others
            result["failed"] = f"{type(error).__name__}: {error}"[:300]
            result.pop("pairs_per_s", None)
            del self.ready[ready.arm.name]
            self.cell.optimizer.zero_grad(set_to_none=True)
        else:
            self._note(result["timed"], number, *seconds)
            ready.step_s = seconds[0]
            if self.cell.device.type == "cuda":
                result["peak_gb"] = max(result.get("peak_gb", 0), torch.cuda.max_memory_allocated() / 1e9)
        summarise(result, self.rows * self.cell.pairs_per_row, self.speed)

    def _note(self, steps: dict[str, list[float]], number: int, seconds: float, host: float) -> None:
        first = number * self.rows % len(self.cell.groups)
        groups = self.cell.groups[first : first + self.rows]
        values = {"seconds": seconds, "host_seconds": host, "tokens": sum(group.num_tokens for group in groups)}
        for name, value in {**values, "flops": flops_of(self.cell, groups)}.items():
            steps.setdefault(name, []).append(value)


def _halved(micro: int) -> int:
    if micro == 1:
        raise CannotRunError("out of memory at one row")
    return micro // 2


def rows_that_fit(rows: int, peaks: dict[int, float], limit: float) -> int:
    """The largest micro-batch, by halving a step's rows, that two measured ones say fits; bytes."""
    (few, low), (more, high) = sorted(peaks.items())
    slope = (high - low) / (more - few)
    micro = rows
    while micro > more and low + slope * (micro - few) > limit:
        micro //= 2
    return max(micro, 1)


def summarise(result: dict[str, Any], pairs: int, speed: float) -> None:
    """Rates from the timed steps; from the last step of the warm-up where there is none yet."""
    steps = result["timed"] or {name: values[-1:] for name, values in result["warm_up"].items()}
    if not steps or "failed" in result:
        return
    total = sum(steps["seconds"])
    result["is_estimate"] = not result["timed"]
    result["pairs_per_s"] = pairs * len(steps["seconds"]) / total
    result["tokens_per_s"] = sum(steps["tokens"]) / total
    result["share_of_matmul"] = sum(steps["flops"]) / total / speed
    result["mfu_of_989"] = sum(steps["flops"]) / total / 989e12
    result["host_share"] = sum(steps["host_seconds"]) / total


def free(cell: Cell) -> None:
    """Give back what a step that failed, or an arm's start, has left; not between timed steps, which would ask for it anew."""
    cell.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # trainers go in circles
    if cell.device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
