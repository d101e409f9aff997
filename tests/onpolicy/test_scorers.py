"""Scorers against what they are defined as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from judgeserver import Say, Status, judge_server
from orpo.data.types import Where
from orpo.errors import UserError
from orpo.evaluate.cache import Cache
from orpo.evaluate.judging.endpoint import EndpointJudge, JudgeUnavailable
from orpo.onpolicy.answering import AskedGroup, Attempt
from orpo.onpolicy.asked import Asked
from orpo.onpolicy.scorers import IFEvalScorer, JudgeScorer, MatchScorer, RewardScorer, last_number


def group(*texts: str, prompt: Any = "How many?", **row: Any) -> AskedGroup:
    return AskedGroup(Asked(prompt, Where("rows.jsonl", 0), row), [Attempt(text, "model") for text in texts])


def quiet(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 7.", 7), ("7 and 5 is 12", 12), ("1,234.5 apples", 1234.5), ("-3", -3), ("about 1e3", 1000), ("none", None), ("", None),
        (r"So \boxed{42}, not 7", 42), ("steps: 3\n#### 18 (of 20)", 18), (".5", 0.5), ("12.", 12), ("x = 3.0 m2", 2),
    ],
)  # fmt: skip
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_references(tmp_path: Path) -> None:
    groups = [group("It is 12.", "12 or 13", "twelve", answer="12"), group("a  b\n", "A b", answer="a b")]
    assert MatchScorer("numeric", "answer", is_numeric=True).marks(groups[:1], Cache(), quiet) == [[1.0, 0.0, 0.0]]
    assert MatchScorer("exact", "answer", is_numeric=False).marks(groups[1:], Cache(), quiet) == [[1.0, 0.0]]
    nested = [group("4", reward_model={"ground_truth": 4})]
    assert MatchScorer("numeric", "reward_model.ground_truth", is_numeric=True).marks(nested, Cache(), quiet) == [[1.0]]
    with pytest.raises(UserError, match="1 of 2 prompts have no 'answer'"):
        MatchScorer("numeric", "answer", is_numeric=True).check([groups[0].asked, groups[1].asked])


def judged(behave: Callable[[str, str], str], groups: list[AskedGroup], path: Path) -> tuple[list[list[Any]], int]:
    def reply(number: int, body: dict[str, Any]) -> Say:
        text = body["messages"][-1]["content"]
        first, second = (text.split(f"--- Answer {name} ---\n")[1].split("\n--- End")[0] for name in "AB")
        return Say(behave(first, second))

    with judge_server(reply) as server:
        marks = JudgeScorer("judge", lambda: EndpointJudge(server.url, "judge")).marks(groups, Cache(path), quiet)
        return marks, len(server.requests)


def test_a_judge_reads_each_two_in_both_orders(tmp_path: Path) -> None:
    groups = [group("a", "bbb", "cc", "bbb"), group("x", "yy")]
    path = tmp_path / "cache.jsonl"
    longer = lambda first, second: f"Hm. [[{'A' if len(first) > len(second) else 'B'}]]"  # noqa: E731
    marks, num_asked = judged(longer, groups, path)
    assert marks == [[0.0, 1.0, 0.5, "no verdict that could be read"], [0.0, 1.0]]
    assert num_asked == 2 * (3 + 1)
    assert judged(longer, groups, path) == (marks, 0)
    assert judged(lambda first, second: "[[A]]", groups[1:], tmp_path / "other.jsonl")[0] == [[0.5, 0.5]], "the first place is no merit"
    assert judged(lambda first, second: "[[A]] [[B]]", groups[1:], tmp_path / "no.jsonl")[0] == [["no verdict that could be read"] * 2]
    many = [group(*("x" * n for n in range(1, 9)))]
    marks, num_asked = judged(longer, many, tmp_path / "many.jsonl")
    assert marks[0][0] == 0.0
    assert marks[0][-1] == 1.0
    assert num_asked == 2 * 8 * 3


def test_a_judge_that_goes_away_keeps_what_it_said(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    groups = [group(f"a{n}", f"b{n}") for n in range(8)]
    with judge_server(lambda number, body: Say("[[A]]") if number < 6 else Status(500)) as server:
        judge = EndpointJudge(server.url, "judge", num_workers=1, num_retries=0)
        with pytest.raises(JudgeUnavailable):
            JudgeScorer("judge", lambda: judge).marks(groups, Cache(path), quiet)
    assert len(path.read_text().splitlines()) == 6


def test_a_reward_model(tmp_path: Path, tiny_tokenizer_factory: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / "reward")
    tiny_tokenizer_factory().save_pretrained(tmp_path / "reward")
    scorer = RewardScorer("reward", str(tmp_path / "reward"), "cpu")
    scorer.check([])
    path = tmp_path / "cache.jsonl"
    marks = scorer.marks([group("a", "a longer one"), group("b")], Cache(path), quiet)
    assert [len(one) for one in marks] == [2, 1]
    assert [float(json.loads(line)["value"]) for line in path.read_text().splitlines()] == [mark for one in marks for mark in one]
    assert scorer.marks([group("a", "a longer one"), group("b")], Cache(path), quiet) == marks


@pytest.mark.slow
def test_ifeval() -> None:
    pytest.importorskip("lm_eval")
    row = {"instruction_id_list": ["punctuation:no_comma", "keywords:existence"], "kwargs": [{}, {"keywords": ["apple"]}]}
    scorer = IFEvalScorer()
    groups = [group("An apple.", "One, two", "An apple, red", **row)]
    try:
        scorer.check([groups[0].asked])
    except UserError as error:
        pytest.skip(str(error))
    assert scorer.marks(groups, Cache(), quiet) == [[1.0, 0.0, 0.5]]
    with pytest.raises(UserError, match="not a row with instructions"):
        scorer.check([group("a").asked])
