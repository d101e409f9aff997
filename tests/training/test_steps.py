"""Which rows an optimizer step holds, and how they are dealt out: each row once, every rank alike, nothing lost at the end."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo.data.types import TokenGroup
from orpo.engine.layout import num_nll_tokens
from orpo.engine.packing import pack
from orpo.objective import METRICS, ORPO, evaluate
from orpo.training.steps import StepBatch, StepDataset, StepPlan, StepSampler, only_item
from randomgroups import group, random_groups

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)
RANKS = st.integers(1, 4)


def sampler(groups: list[TokenGroup], **options: object) -> StepSampler:
    defaults: dict = {"rows_per_step": 8, "max_rows": 4, "max_tokens": 10_000, "seed": 3}
    return StepSampler(groups, **{**defaults, **options})


def plans(groups: list[TokenGroup], **options: object) -> list[StepPlan]:
    return [item for (item,) in sampler(groups, **options)]


def rows_of(plan: StepPlan) -> list[int]:
    return [row for rows in plan.microbatches for row in rows]


# --- packing ---------------------------------------------------------------------------------------------------------------------------


@given(sizes=SIZES, num_ranks=RANKS, max_rows=st.integers(1, 10), max_tokens=st.integers(1, 120))
def test_packing_loses_nothing_and_keeps_the_limits(sizes: list[int], num_ranks: int, max_rows: int, max_tokens: int) -> None:
    bins = pack(sizes, num_ranks=num_ranks, max_rows=max_rows, max_tokens=max_tokens)
    assert sorted(item for content in bins for item in content) == list(range(len(sizes)))
    assert len(bins) % num_ranks == 0
    for content in bins:
        assert len(content) <= max_rows
        assert len(content) <= 1 or sum(sizes[item] for item in content) <= max_tokens
    loads = [sum(sizes[item] for item in content) for content in bins]
    assert loads == sorted(loads, reverse=True)


@given(sizes=SIZES, num_ranks=RANKS, max_rows=st.integers(1, 10), max_tokens=st.integers(1, 120))
def test_packing_is_the_same_every_time(sizes: list[int], num_ranks: int, max_rows: int, max_tokens: int) -> None:
    """Ranks do not talk to each other about it."""
    limits = {"num_ranks": num_ranks, "max_rows": max_rows, "max_tokens": max_tokens}
    assert pack(sizes, **limits) == pack(list(sizes), **limits)


@given(sizes=SIZES, max_rows=st.integers(1, 10))
def test_packing_uses_no_more_bins_than_needed_where_tokens_do_not_bind(sizes: list[int], max_rows: int) -> None:
    assert len(pack(sizes, num_ranks=1, max_rows=max_rows, max_tokens=10_000)) == -(-len(sizes) // max_rows)


def test_packing_is_even() -> None:
    """Largest first: no bin holds more than a third above the mean here, where filling in order would put 400 beside 40."""
    sizes = [100, 100, 100, 100, 10, 10, 10, 10]
    loads = [sum(sizes[item] for item in content) for content in pack(sizes, num_ranks=2, max_rows=4, max_tokens=10_000)]
    assert loads == [220, 220]


def test_a_row_above_the_limit_has_a_micro_batch_of_its_own() -> None:
    bins = pack([50, 3, 3], num_ranks=1, max_rows=8, max_tokens=10)
    assert bins == [[0], [1, 2]]


def test_a_whole_evaluation_set_is_packed_in_no_time() -> None:
    """Looking at every bin for every row took 23 s for these."""
    sizes = np.minimum(np.random.default_rng(0).lognormal(5.5, 0.8, 5000).astype(int) + 20, 2048).tolist()
    start_s = time.process_time()
    pack(sizes, num_ranks=1, max_rows=8, max_tokens=1024)
    assert time.process_time() - start_s < 3


# --- steps -----------------------------------------------------------------------------------------------------------------------------


@given(number=st.integers(1, 30), rows_per_step=st.integers(1, 12), num_ranks=RANKS, max_rows=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch_over_all_ranks_holds_every_row_once(number: int, rows_per_step: int, num_ranks: int, max_rows: int, epoch: int) -> None:
    groups = random_groups(number)
    trained: Counter[int] = Counter()
    per_rank = []
    for rank in range(num_ranks):
        own = sampler(groups, rows_per_step=rows_per_step, max_rows=max_rows, rank=rank, world_size=num_ranks)
        own.set_epoch(epoch)
        steps = [plan for (plan,) in own]
        assert len(steps) == len(own) == -(-number // rows_per_step)
        trained.update(row for plan in steps for row in rows_of(plan))
        per_rank.append(steps)
    assert trained == Counter(range(number))
    for together in zip(*per_rank, strict=True):
        assert len({plan.rows for plan in together}) == 1
        assert len({len(plan.microbatches) for plan in together}) == 1
        assert len({(plan.num_nll_tokens, plan.num_pairs) for plan in together}) == 1
        assert sorted(row for plan in together for row in rows_of(plan)) == sorted(together[0].rows)


@given(number=st.integers(1, 40), num_ranks=RANKS)
def test_the_ragged_tail_is_a_smaller_step(number: int, num_ranks: int) -> None:
    sizes = [len(plan.rows) for plan in plans(random_groups(number), world_size=num_ranks)]
    assert sizes == [8] * (number // 8) + ([number % 8] if number % 8 else [])


@given(number=st.integers(1, 30), epoch=st.integers(0, 5))
def test_steps_hold_the_same_rows_however_they_are_cut(number: int, epoch: int) -> None:
    """8x1 = 4x2 = 1x8, on any number of ranks, with any token limit."""
    groups = random_groups(number)
    found = set()
    for options in (
        {"max_rows": 8},
        {"max_rows": 4},
        {"max_rows": 1},
        {"max_rows": 2, "world_size": 4},
        {"max_rows": 8, "max_tokens": 30},
    ):
        cut = sampler(groups, **options)
        cut.set_epoch(epoch)
        found.add(tuple((plan.rows, plan.num_nll_tokens, plan.num_pairs) for (plan,) in cut))
    assert len(found) == 1


def test_each_epoch_has_an_order_of_its_own_and_the_seed_decides_it() -> None:
    groups = random_groups(40)
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            item = sampler(groups, seed=seed)
            item.set_epoch(epoch)
            orders[seed, epoch] = tuple(item.order())
            assert np.array_equal(item.order(), item.order())
    assert len(set(orders.values())) == 4
    # A seed's second epoch is not another seed's first.
    assert tuple(sampler(groups, seed=1).order()) == orders[1, 0]


def test_without_a_seed_the_order_is_the_datas() -> None:
    assert [row for plan in plans(random_groups(10), seed=None) for row in plan.rows] == list(range(10))


@given(seed=st.integers(0, 2**63 - 1))
def test_any_seed_will_do(seed: int) -> None:
    assert sorted(sampler(random_groups(5), seed=seed).order()) == list(range(5))


def test_counts_are_those_of_the_rows() -> None:
    groups = random_groups(11, kinds=("pair", "four", "sft"))
    for plan in plans(groups, rows_per_step=4):
        assert plan.num_pairs == sum(len(groups[row].pairs) for row in plan.rows)
        assert plan.num_nll_tokens == sum(num_nll_tokens(groups[row], "sequence") for row in plan.rows)
    responses = plans(groups, rows_per_step=11, nll_scope="response")[0]
    assert responses.num_nll_tokens == sum(num_nll_tokens(item, "response") for item in groups)


@given(number=st.integers(1, 30), rows_per_step=st.integers(1, 40), num_ranks=RANKS)
def test_evaluation_in_pieces_is_one_mean(number: int, rows_per_step: int, num_ranks: int) -> None:
    """However large a piece: all rows are there, divided by the counts of all."""
    groups = random_groups(number, kinds=("pair", "sft"))
    options = {"rows_per_step": rows_per_step, "normalise_over_all": True, "seed": None, "world_size": num_ranks}
    pieces = plans(groups, **options)
    assert [row for piece in pieces for row in piece.rows] == list(range(number))
    totals = (sum(num_nll_tokens(item, "sequence") for item in groups), sum(len(item.pairs) for item in groups))
    assert {(piece.num_nll_tokens, piece.num_pairs) for piece in pieces} == {totals}


def test_a_rank_with_nothing_to_do_gets_a_filler() -> None:
    """One row left for three ranks: two of them run the shortest row of the step with weight zero."""
    groups = random_groups(9, prompt=(3, 9))
    tails = [plans(groups, rank=rank, world_size=3)[-1] for rank in range(3)]
    assert sorted(tail.microbatches for tail in tails) == [((),), ((),), ((tails[0].rows[0],),)]
    assert {tail.filler for tail in tails} == {tails[0].rows[0]}


# --- batches ---------------------------------------------------------------------------------------------------------------------------


def step_of(groups: list[TokenGroup], *, world_size: int = 1, **options: object) -> list[StepBatch]:
    """The first step as each rank gets it."""
    data = StepDataset(groups, world_size=world_size)
    return [data[plans(groups, rank=rank, world_size=world_size, **options)[0]] for rank in range(world_size)]


@given(number=st.integers(1, 20), num_ranks=RANKS, max_rows=st.integers(1, 6), max_tokens=st.integers(1, 100), seed=st.integers(0, 100))
def test_loss_and_sums_of_a_step_are_the_same_however_it_is_cut(
    number: int, num_ranks: int, max_rows: int, max_tokens: int, seed: int
) -> None:
    """With a model in which a token's log-probability depends on the token alone, so that the cut cannot matter."""
    groups = random_groups(number, seed=seed, kinds=("pair", "sft", "four"))
    table = -4 * torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def totals(batches: list[StepBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        found = [evaluate(ORPO(0.7), table[batch.target_N], batch.index) for step in batches for batch in step.microbatches]
        # A data-parallel wrapper takes the mean over ranks.
        return torch.stack([item.loss for item in found]).sum() / len(batches), torch.stack([item.sums for item in found]).sum(0)

    loss, sums = totals(step_of(groups, world_size=num_ranks, rows_per_step=20, max_rows=max_rows, max_tokens=max_tokens))
    expected_loss, expected_sums = totals(step_of(groups, rows_per_step=20, max_rows=20))
    torch.testing.assert_close(loss, expected_loss)
    squares = [METRICS.index("nll_grad_square"), METRICS.index("preference_grad_square")]
    sums[squares] /= num_ranks**2
    torch.testing.assert_close(sums, expected_sums)


def test_the_filler_runs_and_counts_for_nothing() -> None:
    batches = step_of(random_groups(1), world_size=2)
    assert [len(batch.microbatches) for batch in batches] == [1, 1]
    working, idle = batches[0].microbatches[0], batches[1].microbatches[0]
    assert idle.num_tokens == working.num_tokens
    assert (idle.index.num_nll_tokens, idle.index.num_pairs) == (working.index.num_nll_tokens, working.index.num_pairs)
    assert not idle.index.nll_weight_N.any()
    assert not len(idle.index.chosen_B)
    assert {batch.num_rows for batch in batches} == {1}


def test_a_loader_yields_one_step_at_a_time() -> None:
    groups = random_groups(10)
    loader = torch.utils.data.DataLoader(StepDataset(groups), batch_sampler=sampler(groups), collate_fn=only_item)
    steps = list(loader)
    assert len(loader) == 2
    assert [step.num_rows for step in steps] == [8, 2]
    assert sorted(item.where.row for step in steps for item in step.groups) == sorted(item.where.row for item in groups)


def test_worker_processes_give_the_same_steps() -> None:
    groups = random_groups(10)
    loader = torch.utils.data.DataLoader(StepDataset(groups), batch_sampler=sampler(groups), collate_fn=only_item, num_workers=1)
    expected = [StepDataset(groups)[plan] for plan in plans(groups)]
    for found, step in zip(loader, expected, strict=True):
        for batch, other in zip(found.microbatches, step.microbatches, strict=True):
            assert batch.input_ids_T.tolist() == other.input_ids_T.tolist()
            assert batch.layout.segments == other.layout.segments


@pytest.mark.parametrize("scope", ["sequence", "response"])
def test_the_scope_reaches_the_batches(scope: str) -> None:
    groups = [group([1, 2, 3], [4, 5], [6])]
    plan = plans(groups, nll_scope=scope)[0]
    batch = StepDataset(groups, nll_scope=scope)[plan].microbatches[0]
    assert plan.num_nll_tokens == batch.index.num_nll_tokens == batch.index.nll_weight_N.sum() == (4 if scope == "sequence" else 2)
