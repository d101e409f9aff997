"""MT-Bench, AlpacaEval and pairwise judging, with judges whose verdicts are known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest

from orpo.errors import DataError, UserError
from orpo.evaluate.cache import Cache
from orpo.evaluate.judging.judges import Conversation, Done, Reply
from orpo.evaluate.tasks import alpacaeval, custom, mtbench


class ScriptedJudge:
    """Replies what a function of the conversation says; None is no reply."""

    def __init__(self, say: Callable[[Conversation], str | Reply | None]) -> None:
        self.say = say
        self.identity = {"kind": "scripted"}
        self.seen: list[Conversation] = []

    def ask(self, conversations: Sequence[Conversation], max_tokens: int, done: Done) -> None:
        for number, conversation in enumerate(conversations):
            self.seen.append(conversation)
            said = self.say(conversation)
            done(number, Reply(said) if isinstance(said, str) else said)


# ---- MT-Bench ----------------------------------------------------------------------------------------------------------------------


def write_bench(folder, *, has_references: bool = True):
    """Four questions in the published form, with prompts that show every value."""
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["write", "rewrite {answer}"]},
        {"question_id": 82, "category": "writing", "turns": ["letter", "shorter"]},
        {"question_id": 101, "category": "math", "turns": ["1+1?", "2+2?"]},
        {"question_id": 111, "category": "stem", "turns": ["why?", "how?"]},
    ]
    prompts = [
        {"name": "single-v1", "system_prompt": "S1", "prompt_template": "Q={question} A={answer}"},
        {"name": "single-math-v1", "system_prompt": "M1", "prompt_template": "Q={question} R={ref_answer_1} A={answer}"},
        {"name": "single-v1-multi-turn", "system_prompt": "S2", "prompt_template": "{question_1}|{answer_1}|{question_2}|{answer_2}"},
        {
            "name": "single-math-v1-multi-turn",
            "system_prompt": "M2",
            "prompt_template": "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}",
        },
    ]
    (folder / "mt_bench" / "reference_answer").mkdir(parents=True)
    write_lines(folder / "mt_bench" / "question.jsonl", questions)
    write_lines(folder / "judge_prompts.jsonl", prompts)
    if has_references:
        reference = {"question_id": 101, "choices": [{"index": 0, "turns": ["two", "four"]}]}
        write_lines(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [reference])
    return folder


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


ANSWERS = {81: ("a {question}", "b"), 82: ("c", "d"), 101: ("e", "f"), 111: ("g", "h")}


def test_the_judge_is_shown_what_is_published(tmp_path):
    bench = mtbench.read_bench(write_bench(tmp_path))
    judge = ScriptedJudge(lambda conversation: "Rating: [[5]]")
    mtbench.grade(bench, ANSWERS, judge, Cache())
    assert [(messages[0]["content"], messages[1]["content"]) for messages in judge.seen] == [
        ("S1", "Q=write A=a {question}"),
        ("S2", "write|a {question}|rewrite {answer}|b"),
        ("S1", "Q=letter A=c"),
        ("S2", "letter|c|shorter|d"),
        ("M1", "Q=1+1? R=two A=e"),
        ("M2", "two|four|1+1?|e|2+2?|f"),
        ("S1", "Q=why? A=g"),
        ("S2", "why?|g|how?|h"),
    ]


def test_scores_are_means_over_readable_ratings(tmp_path):
    bench = mtbench.read_bench(write_bench(tmp_path))
    said = iter(["[[8]]", "[[6]]", "[[4]]", "no idea", "[[10]]", None, "[[2]] [[3]]", "[[1]]"])
    found = mtbench.grade(bench, ANSWERS, ScriptedJudge(lambda conversation: next(said)), Cache())
    assert found.ratings == {81: (8.0, 6.0), 82: (4.0, None), 101: (10.0, None), 111: (None, 1.0)}
    assert found.score.value == pytest.approx((8 + 6 + 4 + 10 + 1) / 5)
    assert [turn.value for turn in found.by_turn] == [pytest.approx(22 / 3), pytest.approx(7 / 2)]
    assert {name: estimate.value for name, estimate in found.by_category.items()} == {"writing": 6.0, "math": 10.0, "stem": 1.0}
    assert (found.num_judged, found.num_malformed, found.num_unanswered) == (5, 2, 1)


def test_malformed_verdicts_are_asked_again_only_where_wanted(tmp_path):
    bench, cache = mtbench.read_bench(write_bench(tmp_path), limit=1), Cache(tmp_path / "cache.jsonl")
    judge = ScriptedJudge(lambda conversation: "[[7]]" if len(judge.seen) > 2 else "hm")
    with pytest.raises(UserError, match="2 malformed"):
        mtbench.grade(bench, ANSWERS, judge, cache)
    with pytest.raises(UserError, match="2 malformed"):
        mtbench.grade(bench, ANSWERS, judge, cache)
    assert len(judge.seen) == 2
    assert mtbench.grade(bench, ANSWERS, judge, cache, retry_malformed=True).score.value == 7.0


def test_a_limit_takes_from_all_categories(tmp_path):
    folder = write_bench(tmp_path)
    picked = [[question.number for question in mtbench.read_bench(folder, limit=limit).questions] for limit in (1, 2, 3, 4, 9)]
    assert picked == [[81], [81, 101], [81, 101, 111], [81, 82, 101, 111], [81, 82, 101, 111]]


def test_second_turns_follow_the_models_own_first_answers(tmp_path):
    bench = mtbench.read_bench(write_bench(tmp_path))
    calls = []

    def answer(conversations, temperature):
        calls.append((temperature, [[message["content"] for message in conversation] for conversation in conversations]))
        return [f" to {conversation[-1]['content']} " for conversation in conversations]

    found = mtbench.answer_turns(bench, answer)
    assert found[81] == ("to write", "to rewrite {answer}")
    assert calls == [
        (0.0, [["1+1?"]]),
        (0.1, [["why?"]]),
        (0.7, [["write"], ["letter"]]),
        (0.0, [["1+1?", "to 1+1?", "2+2?"]]),
        (0.1, [["why?", "to why?", "how?"]]),
        (0.7, [["write", "to write", "rewrite {answer}"], ["letter", "to letter", "shorter"]]),
    ]
    calls.clear()
    mtbench.answer_turns(bench, answer, temperature=0.0)
    assert [temperature for temperature, _ in calls] == [0.0, 0.0]


def test_what_is_missing_of_the_bench_is_named(tmp_path):
    with pytest.raises(UserError, match=r"question\.jsonl"):
        mtbench.read_bench(tmp_path / "nowhere")
    folder = write_bench(tmp_path, has_references=False)
    with pytest.raises(UserError, match="reference_answer"):
        mtbench.read_bench(folder)
    assert len(mtbench.read_bench(folder, limit=1).questions) == 1  # which needs no reference
    with pytest.raises(DataError, match="111"):
        mtbench.grade(mtbench.read_bench(write_bench(tmp_path / "whole")), {**ANSWERS, 111: ("only one",)}, ScriptedJudge(str), Cache())
    (folder / "judge_prompts.jsonl").write_text('{"name": "single-v1", "system_prompt": "", "prompt_template": ""}\n')
    with pytest.raises(DataError, match="single-v1-multi-turn"):
        mtbench.read_bench(folder, limit=1)
    (folder / "mt_bench" / "question.jsonl").write_text('{"question_id": 1\n')
    with pytest.raises(DataError, match=r"question\.jsonl:1"):
        mtbench.read_bench(folder)


def test_published_answers_are_graded(shared_data):
    """The authors' own outputs: every question has both turns, references go to their categories, and the mean is the judge's."""
    bench = mtbench.read_bench(shared_data / "mtbench")
    path = shared_data / "paper_outputs" / "mtbench_Mistral-ORPO-beta.jsonl"
    answers = mtbench.read_answers(path)
    assert mtbench.name_of_answers(path) == "Mistral-ORPO-beta (7B)"

    def say(conversation: Conversation) -> str:
        return f"[[{1 + len(conversation[1]['content']) % 10}]]"

    judge = ScriptedJudge(say)
    found = mtbench.grade(bench, answers, judge, Cache())
    assert (found.num_questions, found.num_judged, found.num_malformed) == (80, 160, 0)
    assert len(found.by_category) == 8
    with_reference = [messages for messages in judge.seen if "The Start of Reference Answer" in messages[1]["content"]]
    assert len(with_reference) == 60
    assert not any(
        "{" + name in messages[1]["content"] for messages in judge.seen for name in ("question_1}", "ref_answer_1}", "answer_2}")
    )
    expected = [1 + len(messages[1]["content"]) % 10 for messages in judge.seen]
    assert found.score.value == pytest.approx(sum(expected) / 160)


# ---- AlpacaEval --------------------------------------------------------------------------------------------------------------------


def make_outputs(generator: str, count: int = 40) -> list[alpacaeval.Output]:
    return [alpacaeval.Output(f"do {number}", f"{generator} {number}", generator) for number in range(count)]


def shown_first(conversation: Conversation) -> str:
    """Which generator's output stands first in the judge's question."""
    text = conversation[-1]["content"]
    return "good" if text.index("good ") < text.index("base ") else "base"


def test_the_better_output_wins_wherever_it_stands():
    judge = ScriptedJudge(lambda conversation: "m" if shown_first(conversation) == "good" else "M")
    found = alpacaeval.judge_outputs(make_outputs("base"), make_outputs("good"), judge, Cache(), tables="/nowhere")
    assert found.win_rate.value == 1.0
    assert (found.num_wins, found.num_ties, found.num_losses) == (40, 0, 0)
    firsts = [shown_first(conversation) for conversation in judge.seen]
    assert 10 < firsts.count("good") < 30  # about half of them, by the instructions' text
    lost = alpacaeval.judge_outputs(make_outputs("good"), make_outputs("base"), judge, Cache(), tables="/nowhere")
    assert lost.win_rate.value == 0.0


def test_a_judge_that_looks_at_the_place_alone_gives_about_half():
    outputs = make_outputs("base", 400), make_outputs("good", 400)
    found = alpacaeval.judge_outputs(*outputs, ScriptedJudge(lambda conversation: "M"), Cache(), tables="/nowhere")
    assert 0.42 < found.win_rate.value < 0.58
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high


def test_malformed_and_missing_judgements_count_for_nothing():
    said = iter([None, "both", "m or M", ""] * 10)
    scripted = ScriptedJudge(lambda conversation: next(said) if shown_first(conversation) == "base" else "m")
    found = alpacaeval.judge_outputs(make_outputs("base"), make_outputs("good"), scripted, Cache(), tables="/nowhere")
    num_base_first = sum(shown_first(conversation) == "base" for conversation in scripted.seen)
    assert found.num_judged == 40 - num_base_first
    assert found.num_malformed + found.num_unanswered == num_base_first
    assert found.win_rate.value == 1.0
    with pytest.raises(UserError, match="could be judged"):
        alpacaeval.judge_outputs(make_outputs("base"), make_outputs("good"), ScriptedJudge(lambda _: "?"), Cache(), tables="/nowhere")


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        (Reply("m", {"m": math.log(0.6), "M": math.log(0.2), "x": math.log(0.1)}), 0.25),
        (Reply("m", {"M": -0.5}), 1.0),
        (Reply("m", {"x": -0.5}), None),
        (Reply(" M "), 1.0),
        (Reply("m"), 0.0),
        (Reply("M."), None),
    ],
)
def test_preferences_are_read_from_log_probabilities_where_they_are(reply, share):
    found = alpacaeval.read_preference(reply)
    assert found is None if share is None else found == pytest.approx(share)


def test_outputs_are_matched_by_instruction():
    reference = make_outputs("base", 3)
    shuffled = make_outputs("good", 5)[::-1]
    assert [one.output for one in alpacaeval.match_outputs(reference, shuffled)] == ["good 0", "good 1", "good 2"]
    with pytest.raises(DataError, match="1 of 3"):
        alpacaeval.match_outputs(reference, shuffled[:-1])


def test_the_papers_outputs_are_replayed(shared_data):
    paths = [shared_data / "paper_outputs" / f"Mistral-ORPO-{name}.json" for name in ("alpha", "beta")]
    reference, outputs = (alpacaeval.read_outputs(path) for path in paths)
    outputs = alpacaeval.match_outputs(reference, outputs)
    _, messages = alpacaeval.judge_prompt()
    assert all("{output_1}" not in message["content"] or message["role"] == "user" for message in messages)

    def longer(conversation: Conversation) -> str:
        """Prefer the longer output, found again in the question."""
        text = conversation[-1]["content"]
        one, other = by_instruction[next(key for key in sorted(by_instruction, key=len, reverse=True) if key in text)]
        first_is_one = text.index(one.output) < text.index(other.output)
        wants_one = len(one.output) >= len(other.output)
        return "m" if first_is_one == wants_one else "M"

    sample = [(one, other) for one, other in zip(reference, outputs, strict=True) if one.output not in other.output][:60]
    by_instruction = {one.instruction: (one, other) for one, other in sample}
    found = alpacaeval.judge_outputs([one for one, _ in sample], [other for _, other in sample], ScriptedJudge(longer), Cache(), tables="/")
    expected = sum(len(other.output) > len(one.output) for one, other in sample)
    assert found.num_wins == expected
    assert (found.generator, found.reference) == ("Mistral-ORPO-beta (7B)", "Mistral-ORPO-alpha (7B)")


def test_without_tables_the_raw_rate_stands_and_what_is_missing_is_said(tmp_path):
    pytest.importorskip("alpaca_eval", reason="the extra alpaca is not installed")
    judge = ScriptedJudge(lambda conversation: "m")
    found = alpacaeval.judge_outputs(make_outputs("base"), make_outputs("good"), judge, Cache(), tables=tmp_path)
    assert found.length_controlled is None
    assert "df_gamed.csv" in found.missing
    assert found.to_dict()["win_rate"]["value"] == found.win_rate.value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:pkg_resources")
def test_the_length_controlled_rate_is_the_packages_own(tmp_path, shared_data, monkeypatch):
    """Called straight, with its download replaced, on the same judgements; and length really is taken out."""
    pytest.importorskip("alpaca_eval", reason="the extra alpaca is not installed")
    import numpy as np
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    paths = [shared_data / "paper_outputs" / f"Mistral-ORPO-{name}.json" for name in ("alpha", "beta")]
    reference = alpacaeval.read_outputs(paths[0])
    outputs = alpacaeval.match_outputs(reference, alpacaeval.read_outputs(paths[1]))
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=len(reference))
    gamed = pd.DataFrame(
        [
            {
                "index": number,
                "model": name,
                "instruction_difficulty": difficulty[number],
                "preference": generator.uniform(),
                "std_delta_len": generator.normal(),
                "not_gamed_baseline": False,
            }
            for name in ("verbose", "concise")
            for number in range(len(reference))
        ]
    )
    gamed.to_csv(tmp_path / "df_gamed.csv", index=False)
    lengths = np.array([len(other.output) - len(one.output) for one, other in zip(reference, outputs, strict=True)])
    preferences = (1 / (1 + np.exp(-2 * lengths / lengths.std()))).tolist()  # length is all that this judge sees
    rate, error = alpacaeval.length_controlled_win_rate(reference, outputs, preferences, tmp_path)
    frame = pd.DataFrame(
        {
            "output_1": [one.output for one in reference],
            "output_2": [one.output for one in outputs],
            "generator_1": "a",
            "generator_2": "b",
            "annotator": "c",
            "preference": [1 + preference for preference in preferences],
        }
    )
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **kwargs: str(tmp_path / kwargs["filename"]))
    expected = glm_winrate.get_length_controlled_winrate(frame, save_weights_dir=None)
    assert rate == pytest.approx(expected["length_controlled_winrate"] / 100, abs=1e-12)
    assert error == pytest.approx(expected["lc_standard_error"] / 100, abs=1e-12)
    raw = sum(preferences) / len(preferences)
    assert abs(rate - 0.5) < abs(raw - 0.5)


# ---- pairwise ----------------------------------------------------------------------------------------------------------------------


def choose_first_if(condition: Callable[[str, str], str]) -> ScriptedJudge:
    """A judge that sees the two answers in the order shown."""

    def say(conversation: Conversation) -> str:
        text = conversation[1]["content"]
        first = text.split("--- Answer A ---\n")[1].split("\n--- End")[0]
        second = text.split("--- Answer B ---\n")[1].split("\n--- End")[0]
        return f"I think [[{condition(first, second)}]]"

    return ScriptedJudge(say)


def test_both_orders_must_agree_for_a_win():
    prompts = ["one", "two", "three", "four"]
    first, second = ["good", "bad", "same", "good"], ["bad", "good", "same", "other"]

    def verdict(one: str, two: str) -> str:
        if {one, two} == {"good", "bad"}:
            return "A" if one == "good" else "B"
        return "C" if one == two else "A"  # for "four" it takes whatever comes first

    found = custom.compare_answers(prompts, first, second, choose_first_if(verdict), Cache())
    assert found.outcomes == ("win", "loss", "tie", "tie")
    assert found.win_rate.value == 0.5
    assert (found.wins.value, found.ties.value, found.losses.value) == (0.25, 0.5, 0.25)
    assert found.num_inconsistent == 1
    assert found.first_place == pytest.approx(4 / 6)


def test_a_judge_without_sense_of_order_is_unmasked():
    first, second = [f"x{n}" for n in range(20)], [f"y{n}" for n in range(20)]
    found = custom.compare_answers([str(n) for n in range(20)], first, second, choose_first_if(lambda one, two: "A"), Cache())
    assert found.first_place == 1.0
    assert found.num_inconsistent == 20
    assert found.win_rate.value == 0.5
    assert found.ties.value == 1.0


def test_a_prompt_with_an_unreadable_verdict_is_not_judged():
    judge = choose_first_if(lambda one, two: "X" if "odd" in (one, two) else "A" if one == "good" else "B")
    found = custom.compare_answers(["a", "b"], ["good", "odd"], ["bad", "bad"], judge, Cache())
    assert found.outcomes == ("win", None)
    assert (found.num_judged, found.num_malformed) == (1, 2)
    with pytest.raises(UserError, match="no prompt could be judged"):
        custom.compare_answers(["b"], ["odd"], ["bad"], judge, Cache())


def test_conversations_are_shown_with_their_roles():
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    shown = custom.question(talk, "{answer_b}", "two")[1]["content"]
    assert "[system]\nBe brief.\n\n[user]\nHi" in shown
    assert "--- Answer A ---\n{answer_b}\n" in shown


def test_a_reward_model_needs_no_order(monkeypatch):
    from orpo.evaluate.judging.local import RewardModel

    reward = RewardModel.__new__(RewardModel)
    monkeypatch.setattr(reward, "scores", lambda pairs, cache, progress=None: [float(len(answer)) for _, answer in pairs], raising=False)
    found = custom.compare_answers(["a", "b", "c"], ["long", "x", "same"], ["no", "longer", "same"], reward, Cache())
    assert found.outcomes == ("win", "loss", "tie")
    assert found.to_dict()["first_place"] is None
    alpaca = alpacaeval.judge_outputs(make_outputs("base"), make_outputs("better"), reward, Cache(), tables="/nowhere")
    assert (alpaca.win_rate.value, alpaca.prompt) == (1.0, "reward model")
