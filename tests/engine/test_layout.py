"""The packed row, by pure index arithmetic: what each row sees, what it predicts, and how the parts make up the whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo.data.types import TokenGroup
from orpo.engine.layout import PreferenceBatch, collate, num_nll_tokens
from orpo.objective import ResponseIndex
from randomgroups import SIX_PAIRS, group

SCOPES = st.sampled_from(["sequence", "response"])


@st.composite
def token_groups(draw: st.DrawFn) -> TokenGroup:
    ids = st.lists(st.integers(0, 999), min_size=1, max_size=6)
    responses = draw(st.lists(ids, min_size=1, max_size=4))
    possible = [(a, b) for a in range(len(responses)) for b in range(len(responses)) if a != b]
    pairs = tuple(draw(st.lists(st.sampled_from(possible), unique=True, min_size=1))) if possible else ()
    return group(draw(ids), *responses, pairs=pairs)


BATCHES = st.lists(token_groups(), min_size=1, max_size=5)


def predicted_tokens(item: TokenGroup, scope: str) -> int:
    """All but a group's first token: of the prompt only where it counts."""
    return sum(map(len, item.response_ids)) + (len(item.prompt_ids) - 1 if scope == "sequence" else 0)


def visible_rows(batch: PreferenceBatch) -> list[list[int]]:
    """For every packed row the rows it may look at, in order of position, from the segments alone."""
    found: list[list[int]] = [[] for _ in range(batch.num_tokens)]
    for segment in batch.layout.segments:
        for row in range(segment.start, segment.end):
            found[row] = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, row + 1)]
    return found


@given(BATCHES, SCOPES)
def test_every_token_is_predicted_from_exactly_what_stands_before_it(groups: list[TokenGroup], scope: str) -> None:
    """The property that makes packing exact: through its source row a token sees prompt and earlier answer tokens, at their positions."""
    batch = collate(groups, scope)
    visible, ids, positions = visible_rows(batch), batch.input_ids_T.tolist(), batch.position_ids_T.tolist()
    predictions = iter(zip(batch.source_N.tolist(), batch.target_N.tolist(), batch.index.response_N.tolist(), strict=True))
    response = 0
    for item in groups:
        prompt = item.prompt_ids.tolist()
        contexts = [(prompt[:end], prompt[end], -1) for end in range(1, len(prompt))] if scope == "sequence" else []
        for answer in item.response_ids:
            contexts += [([*prompt, *answer.tolist()[:end]], int(answer[end]), response) for end in range(len(answer))]
            response += 1
        for context, expected_target, expected_response in contexts:
            source, target, owner = next(predictions)
            assert [ids[row] for row in visible[source]] == context
            assert [positions[row] for row in visible[source]] == list(range(len(context)))
            assert (target, owner) == (expected_target, expected_response)
    assert next(predictions, None) is None


@given(BATCHES)
def test_segments_tile_the_row_and_hold_each_token_once(groups: list[TokenGroup]) -> None:
    batch = collate(groups)
    ends = [0, *(segment.end for segment in batch.layout.segments)]
    assert [segment.start for segment in batch.layout.segments] == ends[:-1]
    assert ends[-1] == batch.num_tokens == sum(item.num_tokens for item in groups)
    assert batch.input_ids_T.tolist() == [int(token) for item in groups for ids in (item.prompt_ids, *item.response_ids) for token in ids]
    for segment in batch.layout.segments:
        assert 0 <= segment.prefix_start <= segment.prefix_end <= segment.start < segment.end


@given(BATCHES, SCOPES)
def test_counts_foretell_what_a_batch_holds(groups: list[TokenGroup], scope: str) -> None:
    batch = collate(groups, scope)
    assert batch.index.num_nll_tokens == batch.index.nll_weight_N.sum() == sum(num_nll_tokens(item, scope) for item in groups)
    assert len(batch.source_N) == sum(predicted_tokens(item, scope) for item in groups)
    assert batch.index.num_pairs == sum(len(item.pairs) for item in groups)
    assert batch.index.num_tokens_R.tolist() == [len(ids) for item in groups for ids in item.response_ids]


@given(BATCHES, SCOPES)
def test_the_weight_of_a_token_is_how_often_its_answer_wins(groups: list[TokenGroup], scope: str) -> None:
    batch = collate(groups, scope)
    winners = batch.index.chosen_B.tolist()
    first = 0
    for item, span in zip(groups, batch.spans, strict=True):
        assert span.r == (first, first + len(item.response_ids))
        total = len(item.pairs) or len(item.response_ids)
        for number in range(*span.n):
            response = int(batch.index.response_N[number])
            expected = total if response < 0 else (winners.count(response) if item.pairs else 1)
            assert batch.index.nll_weight_N[number] == expected
        first = span.r[1]


@given(BATCHES)
def test_pairs_point_at_their_own_groups_responses(groups: list[TokenGroup]) -> None:
    batch = collate(groups)
    found = list(zip(batch.index.chosen_B.tolist(), batch.index.rejected_B.tolist(), strict=True))
    for item, span in zip(groups, batch.spans, strict=True):
        assert found[slice(*span.b)] == [(span.r[0] + chosen, span.r[0] + rejected) for chosen, rejected in item.pairs]
    assert len(found) == batch.spans[-1].b[1]


@given(BATCHES, SCOPES, st.data())
def test_a_part_of_a_batch_is_the_batch_of_its_groups(groups: list[TokenGroup], scope: str, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(groups) - 1))
    last = data.draw(st.integers(first + 1, len(groups)))
    referenced = [dataclasses.replace(item, reference_logp_sums=tuple(-float(len(ids)) for ids in item.response_ids)) for item in groups]
    batch = collate(referenced, scope)
    rows, index = batch.part(first, last)
    alone = collate(referenced[first:last], scope)
    assert batch.target_N[rows].tolist() == alone.target_N.tolist()
    assert (index.num_nll_tokens, index.num_pairs) == (batch.index.num_nll_tokens, batch.index.num_pairs)
    assert_same(index, dataclasses.replace(alone.index, num_nll_tokens=index.num_nll_tokens, num_pairs=index.num_pairs))


def assert_same(found: ResponseIndex, expected: ResponseIndex) -> None:
    for item in dataclasses.fields(ResponseIndex):
        one, other = getattr(found, item.name), getattr(expected, item.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, item.name
            assert one.tolist() == other.tolist(), item.name
        else:
            assert one == other, item.name


@given(BATCHES)
def test_groups_do_not_depend_on_their_neighbours(groups: list[TokenGroup]) -> None:
    """Packing in another order moves rows and changes nothing else."""
    forward, backward = collate(groups), collate(groups[::-1])
    for item, span, mirrored in zip(groups, forward.spans, backward.spans[::-1], strict=True):
        assert forward.target_N[slice(*span.n)].tolist() == backward.target_N[slice(*mirrored.n)].tolist()
        assert forward.index.nll_weight_N[slice(*span.n)].tolist() == backward.index.nll_weight_N[slice(*mirrored.n)].tolist()
        assert item.num_tokens == sum(len(ids) for ids in (item.prompt_ids, *item.response_ids))


def test_four_answers_cost_their_prompt_once() -> None:
    item = group(list(range(100)), [1, 2], [3, 4], [5, 6], [7, 8], pairs=SIX_PAIRS)
    batch = collate([item])
    assert batch.num_tokens == 108
    assert batch.index.num_pairs == 6


def test_the_first_token_of_a_sequence_is_predicted_by_nothing() -> None:
    assert num_nll_tokens(group([5], [6, 7]), "sequence") == 2
    assert collate([group([5], [6, 7])]).source_N.tolist() == [0, 1]
    # With a prompt of one token, each answer's first token still comes from it.
    assert collate([group([5], [6], [7])]).source_N.tolist() == [0, 0]


def test_references_are_taken_only_if_every_group_has_them() -> None:
    bare = group([1], [2], [3])
    referenced = dataclasses.replace(bare, reference_logp_sums=(-1.0, -2.0))
    assert collate([bare, referenced]).index.reference_logp_sum_R is None
    references = collate([referenced, referenced]).index.reference_logp_sum_R
    assert references is not None
    assert references.tolist() == [-1.0, -2.0, -1.0, -2.0]


def test_moving_a_batch_keeps_everything() -> None:
    batch = collate([dataclasses.replace(group([1, 2], [2], [3, 4]), reference_logp_sums=(-1.0, -2.0))])
    moved = batch.to("cpu")
    assert_same(moved.index, batch.index)
    for name in ("input_ids_T", "position_ids_T", "source_N", "target_N"):
        assert getattr(moved, name).tolist() == getattr(batch, name).tolist()


def test_ids_are_int64_whatever_they_were() -> None:
    item = dataclasses.replace(group([1], [2], [3]), prompt_ids=np.array([2**31 - 1], dtype=np.uint32))
    assert collate([item]).input_ids_T.tolist() == [2**31 - 1, 2, 3]
    assert collate([item]).input_ids_T.dtype == torch.int64


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        collate([])


@pytest.mark.parametrize("broken", [group([1, 2], [3], []), group([], [3], [4])], ids=["answer", "prompt"])
def test_an_empty_answer_or_prompt_cannot_reach_the_loss(broken: TokenGroup) -> None:
    """A mean over no tokens is 0/0, and an answer without a prompt would be predicted from the row before it."""
    with pytest.raises(ValueError, match="no token"):
        collate([group([1], [2], [3]), broken])
