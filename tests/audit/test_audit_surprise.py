"""Candidates for flipped labels: ranked where the model can tell pairs apart, and not where it cannot."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo.audit import AuditOptions, as_it_stands, cross_fitted, run_audit
from orpo.audit.surprise import SUSPECT_SHARE, folds_by_prompt, measure
from orpo.data.types import TokenGroup, Where


def group(number: int, prompt: int | None = None, pairs: tuple[tuple[int, int], ...] = ((0, 1),)) -> TokenGroup:
    prompt_ids = np.asarray([1, number if prompt is None else prompt], dtype=np.int32)
    responses = tuple(np.asarray([number, i], dtype=np.int32) for i in range(max((max(pair) for pair in pairs), default=0) + 1))
    return TokenGroup(prompt_ids, responses, pairs, (True,) * len(responses), Where("rows.jsonl", number, number + 1))


def noisy_scores(num: int, flips: set[int], strength: float, seed: int = 0) -> list[np.ndarray]:
    """Scores of a model that sees the true label with some strength; for flipped rows it points the other way."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(strength, 1, num) * np.where([i in flips for i in range(num)], -1, 1)
    return [np.asarray([-2 + margin / 2, -2 - margin / 2]) for margin in margins]


def test_flips_are_ranked_first() -> None:
    flips = set(random.Random(0).sample(range(500), 100))
    groups = [group(i) for i in range(500)]
    result = as_it_stands(groups, lambda _: noisy_scores(500, flips, 2.0))
    assert result.can_tell
    top = [suspect.where.row for suspect in result.suspects]
    assert len(top) <= SUSPECT_SHARE * 500
    assert sum(row in flips for row in top) / len(top) > 0.8
    margins = [suspect.margin for suspect in result.suspects]
    assert margins == sorted(margins)
    assert all(margin < 0 for margin in margins)


@pytest.mark.parametrize("strength", [0.0, -0.3])
def test_a_model_that_cannot_tell_does_not_rank(strength: float) -> None:
    result = as_it_stands([group(i) for i in range(500)], lambda _: noisy_scores(500, set(), strength))
    assert not result.can_tell
    assert result.suspects == []
    assert "cannot tell the pairs of this set apart" in result.sentence()
    assert f"{result.accuracy:.3f}" in result.sentence()


def test_too_few_pairs_do_not_rank() -> None:
    result = as_it_stands([group(i) for i in range(20)], lambda _: noisy_scores(20, set(), 5.0))
    assert result.accuracy == 1
    assert not result.can_tell
    assert "too few" in result.sentence()


def test_accuracy_by_hand() -> None:
    groups = [group(0), group(1), group(2, pairs=((0, 1), (2, 1))), group(3, pairs=())]
    scores = [np.asarray([-1.0, -2.0]), np.asarray([-2.0, -1.0]), np.asarray([-1.0, -1.0, -3.0]), np.asarray([-1.0])]
    result = measure(groups, scores, "by hand")
    assert result.num_pairs == 4
    assert result.accuracy == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert result.margins.tolist() == [1.0, -1.0, 0.0, -2.0]


def test_cross_fitting_never_trains_on_a_prompt_it_judges() -> None:
    groups = [group(i, prompt=i % 40) for i in range(200)] + [group(999, pairs=())]
    judged: list[int] = []

    def fit_and_score(train: Sequence[TokenGroup], held_out: Sequence[TokenGroup]) -> list[np.ndarray]:
        seen = {item.prompt_ids.tobytes() for item in train}
        assert not seen & {item.prompt_ids.tobytes() for item in held_out}
        assert all(item.pairs for item in train)
        judged.extend(item.where.row for item in held_out)
        return [np.asarray([-1.0 - item.where.row / 1000, -2.0]) for item in held_out]

    result = cross_fitted(groups, fit_and_score, num_folds=4)
    assert sorted(judged) == list(range(200))
    assert result.margins.tolist() == pytest.approx([1 - i / 1000 for i in range(200)])  # each score came back to its own group
    assert result.method == "cross-fitted, 4 folds"
    with pytest.raises(ValueError, match="at least two"):
        cross_fitted(groups, fit_and_score, num_folds=1)


def test_folds_are_even_and_seeded() -> None:
    groups = [group(i) for i in range(103)]
    folds = folds_by_prompt(groups, 5)
    assert np.bincount(folds).min() >= 20
    assert folds.tolist() == folds_by_prompt(groups, 5).tolist()
    assert folds.tolist() != folds_by_prompt(groups, 5, seed=1).tolist()


def test_the_audit_reports_what_the_model_says(tiny_tokenizer: Any) -> None:
    from orpo.data.template import TemplateEncoder

    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(100)]
    flips = set(random.Random(1).sample(range(100), 20))

    def score(groups: Sequence[TokenGroup]) -> list[np.ndarray]:
        return noisy_scores(len(groups), flips, 3.0)

    encoder = TemplateEncoder(tiny_tokenizer, max_length=200)
    audit = run_audit(rows, AuditOptions(encoder=encoder, score=score))
    found = next(finding for finding in audit.findings if finding.code == "possible_flips")
    assert found.num_rows == len(audit.surprises[0].suspects)
    assert "margin -" in found.places[0]
    facts = json.loads(json.dumps(audit.to_dict()))
    assert facts["model"][0]["can_tell"] is True
    audit = run_audit(rows, AuditOptions(encoder=encoder, score=lambda groups: noisy_scores(len(groups), set(), -1.0)))
    assert not [finding for finding in audit.findings if finding.code == "possible_flips"]
    assert "cannot tell" in "\n".join(audit.lines())


def flipped_polite(shared_data: Path, num_rows: int, seed: int) -> tuple[list[dict[str, str]], set[int]]:
    """The first rows of rasbt_polite that are usable, a fifth of them with their labels exchanged."""
    rows = json.loads((shared_data / "rasbt_polite" / "instruction-data-with-preference.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["chosen"].strip() != row["rejected"].strip()][:num_rows]
    flips = set(random.Random(seed).sample(range(len(rows)), len(rows) // 5))
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in flips else row for i, row in enumerate(rows)], flips


def share_found(audit: Any, flips: set[int], num_rows: int) -> float:
    """Share of flips among the fifth of the pairs with the most surprise."""
    result = audit.surprises[0]
    order = np.argsort(result.margins)[: num_rows // 5]
    return float(np.mean([int(i) in flips for i in order]))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flipped_labels_are_found_by_cross_fitting(shared_data: Path, smollm2_folder: Path, seed: int) -> None:
    """With 20 % of the labels of rasbt_polite exchanged, the top fifth by surprise holds at least twice as many as chance would."""
    from orpo.data.template import TemplateEncoder
    from orpo.evaluate.crossfit import fit_and_score_with
    from orpo.models.load import load_tokenizer

    num_rows = 600
    rows, flips = flipped_polite(shared_data, num_rows, seed)
    encoder = TemplateEncoder(load_tokenizer(str(smollm2_folder)), max_length=512)
    fit = fit_and_score_with(str(smollm2_folder), None, encoder, seed=seed)
    audit = run_audit(rows, AuditOptions(encoder=encoder, fit_and_score=fit, num_folds=3))
    assert audit.surprises[0].num_pairs == num_rows
    found = share_found(audit, flips, num_rows)
    accuracy = audit.surprises[0].accuracy
    print(f"\nseed {seed}: {found:.1%} of the top fifth are flips, {found / 0.2:.2f} times chance; held-out accuracy {accuracy:.3f}")
    assert found >= 2 * 0.2
