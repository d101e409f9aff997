"""Two processes over gloo that hold the weights in parts: what goes wrong in one of them ends as it does where each has the whole model."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.forked import Exit, Finished, Zygote
from faults.test_distributed import Pair, assert_uneven_rows_count_once
from orpo.checkpoint import verify

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

SLOW = pytest.mark.slow
ZERO = [SLOW, pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")]


class ShardedPair(Pair):
    """A run of two ranks with FSDP2 or ZeRO."""

    kind = "fsdp2"

    def train(self, *, act: Callable[[list[int]], None] | None = None, **arguments: Any) -> list[Exit]:
        options = {**arguments.pop("options", {}), "parallelism": self.kind}
        return super().train(act=act, options=options, **arguments)


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(kind: str, forks: Zygote, tmp_path: Path) -> ShardedPair:
    pair = ShardedPair(forks, tmp_path)
    pair.kind = kind
    return pair


@pytest.fixture(scope="module")
def uninterrupted(kind: str, forks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    pair = ShardedPair(forks, tmp_path_factory.mktemp("reference"))
    pair.kind = kind
    assert [end.status for end in pair.train()] == [0, 0], pair.text()
    return Finished(pair.run)


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        ("saving", 1),
        pytest.param("step 5", 0, marks=SLOW),
        pytest.param("step 5", 1, marks=SLOW),
        pytest.param("saving", 0, marks=SLOW),
    ],
)
def test_a_killed_rank_takes_the_others_along_and_nothing_is_half_published(
    line: str, rank: int, pair: ShardedPair, uninterrupted: Finished
) -> None:
    ends = pair.train(act=pair.signal_at(line, rank, signal.SIGKILL), slow_save_s=0.05 if line == "saving" else 0.0)
    assert ends[rank].status == -signal.SIGKILL
    assert ends[1 - rank].status == 1, pair.text()
    assert "lost contact with another process" in pair.text(1 - rank)
    assert "Traceback" not in pair.text(1 - rank)
    assert pair.step() == (0 if line == "saving" else 3)
    for path in pair.run.glob("checkpoint-*"):
        verify(path)
    pair.finish(uninterrupted)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=SLOW)])
def test_an_exception_on_one_rank_is_told_once(rank: int, pair: ShardedPair) -> None:
    ends = pair.train(trouble="exception", trouble_rank=rank)
    assert [end.status for end in ends] == [1, 1], pair.text()
    assert pair.text(rank).count("Traceback") == 1
    assert f"stops because rank {rank} failed first: ArithmeticError: the trouble of this rank alone" in pair.text(1 - rank)
    assert pair.step() == 3


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=SLOW)])
def test_a_rank_that_cannot_save_stops_all_and_nothing_is_published(rank: int, pair: ShardedPair, uninterrupted: Finished) -> None:
    ends = pair.train(trouble="full disk", trouble_rank=rank)
    assert ends[rank].status == 2, pair.text()
    assert "no room for the checkpoint" in pair.text(rank)
    assert f"rank {rank} failed first" in pair.text(1 - rank)
    assert sorted(path.name for path in pair.run.iterdir() if "checkpoint" in path.name) == ["checkpoint-3"]
    pair.finish(uninterrupted)


def test_bad_numbers_on_one_rank_stop_both_before_the_step(pair: ShardedPair) -> None:
    """A weight that one rank alone holds is in everybody's forward pass; of ZeRO the gradient that one rank alone has is in the sum."""
    ends = pair.train(trouble="nan weight" if pair.kind == "fsdp2" else "inf gradient", trouble_rank=1)
    assert [end.status for end in ends] == [3, 3], pair.text()
    stops = [next(line for line in pair.text(rank).splitlines() if "GuardStop" in line) for rank in range(2)]
    assert stops[0] == stops[1]
    assert "GuardStop: step 5" in stops[0]
    assert pair.step() == 3


@SLOW
def test_uneven_rows_neither_hang_nor_count_twice(forks: Zygote, pair: ShardedPair, tmp_path: Path) -> None:
    assert_uneven_rows_count_once(forks, pair, tmp_path / "alone")


@SLOW
def test_rank_1_makes_no_name_final(pair: ShardedPair) -> None:
    assert [end.status for end in pair.train(trouble="cannot publish", trouble_rank=1, options={"max_steps": 3})] == [0, 0], pair.text()


@pytest.mark.parametrize(
    ("line", "rank", "options"),
    [
        ("evaluating", 1, {"slow_eval_s": 0.05}),
        pytest.param("step 4", 0, {}, marks=SLOW),
        pytest.param("step 4", 1, {}, marks=SLOW),
        pytest.param("saving", 0, {"slow_save_s": 0.02}, marks=SLOW),
    ],
)
def test_sigterm_on_one_rank_stops_all_at_one_step(
    line: str, rank: int, options: dict[str, Any], pair: ShardedPair, uninterrupted: Finished
) -> None:
    ends = pair.train(act=pair.signal_at(line, rank, signal.SIGTERM), **options)
    assert [end.status for end in ends] == [143, 143], pair.text()
    assert pair.last_step(0) == pair.last_step(1) == pair.step()
    pair.finish(uninterrupted)
