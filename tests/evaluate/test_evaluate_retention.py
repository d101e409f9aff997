"""Perplexity and the shape of answers, against arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orpo.errors import DataError, UserError
from orpo.evaluate import prompts as evaluate_prompts
from orpo.evaluate.tasks import retention
from orpo.inference.generate import Answer
from orpo.inference.scores import score_groups


def test_perplexity_equals_a_plain_forward(tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory(vocab_size=384)
    passages = ["The boat left the harbour.", "Open the settings, choose the account, then press reset." * 3, "x"]
    groups = retention.passage_groups(tiny_tokenizer, passages, max_tokens=20)
    found = retention.summarise_text(passages, groups, score_groups(model, groups))
    total, count = 0.0, 0
    for passage in passages:
        ids = tiny_tokenizer.encode(passage)
        for start in range(0, len(ids) - 1, 20):
            piece = torch.tensor([ids[start : start + 21]])
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(model(piece).logits[0, :-1].double(), piece[0, 1:], reduction="sum")
            total, count = total + float(loss), count + piece.shape[1] - 1
    assert found.num_tokens == count
    assert found.num_passages == 2  # one token says nothing
    assert found.nll.value == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-4)
    num_bytes = sum(len(passage.encode()) for passage in passages[:2])
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-4)
    assert found.nll.low <= found.nll.value <= found.nll.high


def make_result(passages, shift: float = 0.0) -> retention.TextResult:
    generator = np.random.default_rng(0)
    from orpo.data.types import TokenGroup, Where

    groups, scores = [], []
    for row in range(len(passages)):
        count = int(generator.integers(5, 40))
        ids = np.arange(count, dtype=np.int32)
        groups.append(TokenGroup(ids[:1], (ids,), (), (False,), Where("text", row)))
        scores.append(np.array([generator.normal(-3, 1) - shift - generator.normal(0, 0.01)]))
    return retention.summarise_text(passages, groups, scores)


def test_a_small_loss_of_language_is_seen():
    passages = [f"passage {number}" for number in range(40)]
    before, after = make_result(passages), make_result(passages, shift=0.05)
    change = retention.text_difference(before, after)
    assert change.value == pytest.approx(0.05, abs=0.02)
    assert change.excludes_zero
    assert not retention.text_difference(before, before).excludes_zero
    with pytest.raises(UserError, match="bits per byte"):
        retention.text_difference(before, make_result(passages[:20]))


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("three words only", 0.0), ("a b c d e f", 0.0), ("a b c d a b c d", 1 - 4 / 5), ("go " * 100, 1 - 1 / 97)],
)
def test_repetition_counts_runs_of_four_words(text, share):
    assert retention.repetition(text) == pytest.approx(share)


def test_the_shape_of_answers():
    answers = [
        Answer("a b c", 4, "stop"),
        Answer("go " * 50, 50, "length"),
        Answer("  ", 1, "stop"),
        Answer("one two three four five", 5, "stop"),
    ]
    found = retention.shape_of_answers(answers)
    assert found.mean_tokens.value == 15.0
    assert (found.cut.value, found.empty.value, found.loops.value) == (0.25, 0.25, 0.25)
    assert found.repetition.value == pytest.approx((1 - 1 / 47) / 4)
    assert retention.mean_change([1, 2], [2, 5]).value == 2.0


def test_the_text_that_ships_is_sound():
    passages = evaluate_prompts.read_passages()
    assert len(passages) == len(set(passages)) >= 30
    assert all(30 <= len(passage.split()) <= 120 for passage in passages)
    prompts = evaluate_prompts.read_passages(evaluate_prompts.NEUTRAL_PROMPTS)
    assert len(prompts) == len(set(prompts)) == 24


def test_any_text_file_is_taken(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\n\r\n  three  \n\n\n")
    assert evaluate_prompts.read_passages(path) == ["one two", "three"]
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="no text"):
        evaluate_prompts.read_passages(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="UTF-8"):
        evaluate_prompts.read_passages(path)
    with pytest.raises(UserError, match="cannot be read"):
        evaluate_prompts.read_passages(tmp_path / "none.txt")


# ---- what is said of it ----------------------------------------------------------------------------------------------------------------


def _result(loops: tuple[int, int], repetition: tuple[float, float] = (0.05, 0.05), empty: tuple[int, int] = (0, 0), num: int = 24) -> dict:
    """A result in which so many answers loop before and after, neutral text is predicted better, and the rest is as it was."""
    from orpo.evaluate.bootstrap import estimate_share, estimate_share_change

    def share(count: int) -> list[float]:
        return [1.0] * count + [0.0] * (num - count)

    def shape(which: int) -> dict:
        plain = {"value": 60.0, "low": 50.0, "high": 70.0}
        repeated = {"value": repetition[which], "low": repetition[which] - 0.01, "high": repetition[which] + 0.01}
        shares = {
            name: estimate_share(share(both[which])).to_dict() for name, both in (("loops", loops), ("empty", empty), ("cut", (0, 0)))
        }
        return {"num_answers": num, "mean_tokens": plain, "repetition": repeated, **shares}

    text = {"perplexity": {"value": 20.0, "low": 18.0, "high": 22.0}, "nll": {"value": 3.0, "low": 2.9, "high": 3.1}, "bits_per_byte": 1.0}
    moved = repetition[1] - repetition[0]
    return {
        "text": "neutral.txt",
        "max_new_tokens": 128,
        "against": {**text, "answers": shape(0)},
        "model": {**text, "answers": shape(1)},
        "change": {
            "nll": {"value": -0.1, "low": -0.15, "high": -0.05},
            "mean_tokens": {"value": 0.0, "low": -1.0, "high": 1.0},
            "repetition": {"value": moved, "low": moved - 0.02, "high": moved + 0.02},
            **{
                name: estimate_share_change(share(both[0]), share(both[1])).to_dict()
                for name, both in (("loops", loops), ("empty", empty), ("cut", (0, 0)))
            },
        },
        "shown": [],
    }


@pytest.mark.parametrize(
    ("kinds", "is_collapse"),
    [
        ({"loops": (1, 24)}, True),
        ({"loops": (1, 9)}, True),
        ({"loops": (1, 2)}, False),  # told from chance by nobody
        ({"loops": (10, 10)}, False),  # as before
        ({"loops": (20, 3)}, False),
        ({"loops": (1, 1), "repetition": (0.086, 0.89)}, True),
        ({"loops": (1, 1), "repetition": (0.05, 0.15)}, False),
        ({"loops": (0, 0), "empty": (0, 20)}, True),
    ],
)
def test_a_collapse_goes_before_every_praise(kinds, is_collapse):
    shown = retention.RetentionTask().show(_result(**kinds))
    tones = [one.tone for one in shown.statements]
    assert tones == (["warn", ""] if is_collapse and len(tones) == 2 else ["warn", "warn", ""] if is_collapse else ["good"])
    if is_collapse:
        assert shown.statements[0].text.startswith("The answers have collapsed: ")
        assert "where it was" in shown.statements[0].text


def test_without_a_model_before_only_what_most_answers_do_is_a_collapse():
    for count, is_collapse in ((11, False), (13, True)):
        result = _result((0, count))
        del result["against"], result["change"]
        assert [one.tone for one in retention.RetentionTask().show(result).statements] == (["warn"] if is_collapse else [])


def test_the_lines_say_what_so_many_answers_would_have_shown():
    lines = list(retention.RetentionTask().lines(_result((1, 2))))
    assert any("24 answers would have shown a change of the looping answers of" in line and "80 % power" in line for line in lines)
