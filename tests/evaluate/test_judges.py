"""Judges that fail in every way, and what must not be lost, guessed or told."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from judgeserver import Break, Dribble, Say, Status, judge_server
from orpo.errors import UserError
from orpo.evaluate.cache import Cache
from orpo.evaluate.judging.endpoint import EndpointJudge, JudgeUnavailable
from orpo.evaluate.judging.judges import Reply, ask_all, fill
from orpo.evaluate.judging.verdicts import read_choice, read_model_name, read_rating
from orpo.models.fingerprint import content_key


def quick_judge(url: str, **options) -> EndpointJudge:
    """An endpoint judge that does not wait long."""
    return EndpointJudge(url, "the-model", **{"first_wait_s": 0.01, "longest_wait_s": 0.05, "timeout_s": 5.0, "num_retries": 3, **options})


def questions(count: int) -> list[tuple[dict[str, str], ...]]:
    return [({"role": "user", "content": f"question {number}"},) for number in range(count)]


def number_of(body: dict) -> int:
    return int(body["messages"][-1]["content"].split()[-1])


# ---- verdicts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("Good. [[8.5]] As I said: [[8.5]]", 8.5),
        ("[[ 10 ]]", 10.0),
        ("[[1]]", 1.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[[5]] or rather [[6]]", None),
        ("Rating: [5]", None),
        ("Rating: 5", None),
        ("[[five]]", None),
        ("[[rating]]", None),
        ("[[5/10]]", None),
        ("", None),
    ],
)
def test_ratings_are_read_strictly(text, rating):
    assert read_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("so [[A]]", "A"),
        ("[[B]] … [[B]]", "B"),
        ("[[C]]", "C"),
        ("[[A]] … no, [[B]]", None),
        ("[[D]]", None),
        ("[[A]] [[D]]", None),
        ("A", None),
        ("[A]", None),
        ("[[a]]", None),
        ("", None),
    ],
)
def test_choices_are_read_strictly(text, choice):
    assert read_choice(text) == choice


@pytest.mark.parametrize(("text", "name"), [("m", "m"), (" M\n", "M"), ("mM", None), ("m is better", None), ("", None), ("n", None)])
def test_model_names_are_read_strictly(text, name):
    assert read_model_name(text) == name


@given(st.text(max_size=200))
def test_no_text_breaks_the_readers(text):
    rating = read_rating(text)
    assert rating is None or 1 <= rating <= 10
    assert read_choice(text) in ("A", "B", "C", None)


def test_templates_take_braces_as_text():
    template = "{question} {unknown} {} {0} {question.__class__} {{answer}}"
    filled = fill(template, {"question": "what is {answer}?", "answer": "42"})
    assert filled == "what is {answer}? {unknown} {} {0} {question.__class__} {42}"


# ---- cache -------------------------------------------------------------------------------------------------------------------------


def test_the_cache_survives_a_torn_line(tmp_path, caplog):
    path = tmp_path / "deep" / "cache.jsonl"
    first = Cache(path)
    first.put("a", {"text": "line\nbreak \u2028 \ud800"})
    first.put("b", 2)
    path.write_bytes(path.read_bytes() + b'{"key": "c", "val')
    second = Cache(path)
    assert "broken line" in caplog.text
    assert second.get("a") == {"text": "line\nbreak \u2028 \ud800"}
    assert "c" not in second
    second.put("d", 4)
    third = Cache(path)
    assert (third.get("b"), third.get("d"), len(third)) == (2, 4, 3)


def test_a_later_result_replaces_an_earlier_one(tmp_path):
    cache = Cache(tmp_path / "cache.jsonl")
    cache.put("a", 1)
    cache.put("a", 2)
    assert Cache(tmp_path / "cache.jsonl").get("a") == 2


def test_many_threads_write_whole_lines(tmp_path):
    cache = Cache(tmp_path / "cache.jsonl")
    threads = [threading.Thread(target=lambda start=start: [cache.put(f"{start}-{i}", "x" * 500) for i in range(50)]) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Cache(tmp_path / "cache.jsonl")) == 400


def test_a_cache_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        Cache(tmp_path / "file" / "cache.jsonl").put("a", 1)


def test_keys_depend_on_content_alone():
    assert content_key(a=1, b=[2]) == content_key(b=[2], a=1)
    assert len({content_key(a=1), content_key(a=2), content_key(b=1), content_key(a="1"), content_key(a=1.5)}) == 5


# ---- endpoint ----------------------------------------------------------------------------------------------------------------------


def test_a_question_is_asked_as_the_protocol_wants(tmp_path):
    with judge_server(lambda number, body: Say("[[A]]")) as server:
        judge = quick_judge(server.url, api_key="secret-key-of-mine", options={"max_tokens": None, "max_completion_tokens": 77})
        found = ask_all(judge, questions(1), Cache(tmp_path / "cache.jsonl"), max_tokens=9)
    assert found.replies == [Reply("[[A]]")]
    assert server.paths == ["/v1/chat/completions"]
    body = server.requests[0]
    assert body == {
        "model": "the-model",
        "messages": [{"role": "user", "content": "question 0"}],
        "temperature": 0.0,
        "max_completion_tokens": 77,
        "stream": False,
    }
    assert server.headers[0]["Authorization"] == "Bearer secret-key-of-mine"
    assert "secret-key-of-mine" not in (tmp_path / "cache.jsonl").read_text()
    assert "secret-key-of-mine" not in repr(judge)
    assert "secret-key-of-mine" not in json.dumps(judge.identity)


def test_replies_keep_their_order_and_repeated_questions_are_asked_once(tmp_path):
    with judge_server(lambda number, body: Say(f"reply {number_of(body)}", delay_s=0.02 * (3 - number_of(body) % 3))) as server:
        asked = questions(6) + questions(2)
        found = ask_all(quick_judge(server.url), asked, Cache(tmp_path / "cache.jsonl"))
    assert [reply.text for reply in found.replies] == [f"reply {number % 6}" for number in range(8)]
    assert len(server.requests) == 6


NUISANCES = [
    Break(),
    Break(in_body=True),
    Status(500, b"oops"),
    Status(502, b"<html>bad gateway</html>"),
    Status(429, b"slow down", {"Retry-After": "0.01"}),
    Status(200, b"<html>welcome</html>"),
    Status(200, b'{"choices": []}'),
    Status(200, b'{"choices": [{"message": {"content": 7}}]}'),
    Status(200, b"[1, 2"),
    Status(200, b""),
]


@pytest.mark.parametrize("nuisance", NUISANCES, ids=lambda nuisance: repr(nuisance)[:40])
def test_a_passing_failure_is_tried_again(tmp_path, nuisance):
    with judge_server(lambda number, body: nuisance if number < 2 else Say("[[B]]")) as server:
        found = ask_all(quick_judge(server.url, num_workers=1), questions(2), Cache(tmp_path / "cache.jsonl"))
    assert [reply.text for reply in found.replies] == ["[[B]]", "[[B]]"]
    assert len(server.requests) == 4


def test_the_server_says_how_long_to_wait(tmp_path):
    with judge_server(lambda number, body: Status(429, b"", {"Retry-After": "0.3"}) if number == 0 else Say("x")) as server:
        start_s = time.monotonic()
        ask_all(quick_judge(server.url, longest_wait_s=10.0), questions(1), Cache())
        assert time.monotonic() - start_s >= 0.3
        assert len(server.requests) == 2


def test_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: pauses.append(timeout) or self.is_set())
    with judge_server(lambda number, body: Status(503)) as server:
        judge = quick_judge(server.url, first_wait_s=1.0, longest_wait_s=5.0, num_retries=4)
        with pytest.raises(JudgeUnavailable, match="5 attempts"):
            judge.reply(questions(1)[0], 8)
    pauses = [pause for pause in pauses if pause and pause >= 0.5]
    assert len(pauses) == 4
    for pause, centre in zip(pauses, [1, 2, 4, 5], strict=True):
        assert 0.75 * centre <= pause <= min(1.25 * centre, 5.0)


@pytest.mark.parametrize("action", [Say("late", delay_s=2.0), Dribble()], ids=["silent", "dribbling"])
def test_a_slow_judge_is_given_up_in_time(action):
    with judge_server(lambda number, body: action if number == 0 else Say("in time")) as server:
        reply = quick_judge(server.url, timeout_s=1.0).reply(questions(1)[0], 8)
    assert reply.text == "in time", "the first reply is not waited for, however long it takes to come"


def test_a_judge_that_dies_half_way_loses_nothing(tmp_path):
    """Some replies, then every connection breaks; the next run asks only for the rest and ends like an undisturbed one."""
    path = tmp_path / "cache.jsonl"
    with judge_server(lambda number, body: Say(f"reply {number_of(body)}") if number < 7 else Break()) as server:
        judge = quick_judge(server.url, num_retries=1)
        with pytest.raises(JudgeUnavailable, match="same command again"):
            ask_all(judge, questions(20), Cache(path))
    assert len(Cache(path)) == 7
    with judge_server(lambda number, body: Say(f"reply {number_of(body)}")) as server:
        found = ask_all(quick_judge(server.url), questions(20), Cache(path))
    assert len(server.requests) == 13
    assert found.num_cached == 7
    assert [reply.text for reply in found.replies] == [f"reply {number}" for number in range(20)]
    nobody = ask_all(quick_judge("http://127.0.0.1:9/v1"), questions(20), Cache(path))
    assert nobody == ask_all(quick_judge("http://127.0.0.1:9/v1"), questions(20), Cache(path))
    assert nobody.num_cached == 20


def test_nobody_there_is_said_soon():
    with pytest.raises(JudgeUnavailable, match=r"127\.0\.0\.1:9"):
        ask_all(quick_judge("http://127.0.0.1:9/v1", num_retries=1), questions(1), Cache())


def test_one_question_that_kills_its_server_does_not_hold_up_the_others(tmp_path):
    with judge_server(lambda number, body: Break() if number_of(body) == 2 else Say("fine")) as server:
        found = ask_all(quick_judge(server.url, num_workers=1, num_retries=1), questions(6), Cache(tmp_path / "cache.jsonl"))
    assert [reply is None for reply in found.replies] == [False, False, True, False, False, False]
    assert len(Cache(tmp_path / "cache.jsonl")) == 5  # it is asked again the next time


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refused_question_is_left_out_and_counted(tmp_path, code):
    with judge_server(lambda number, body: Status(code, b"too long") if number_of(body) == 1 else Say("fine")) as server:
        found = ask_all(quick_judge(server.url, num_workers=1), questions(3), Cache(tmp_path / "cache.jsonl"))
    assert found.replies == [Reply("fine"), None, Reply("fine")]
    assert len(server.requests) == 3  # not tried again


@pytest.mark.parametrize(("code", "hint"), [(401, "key"), (403, "key"), (404, "judge_model")])
def test_a_wrong_key_or_model_stops_at_once(code, hint):
    with judge_server(lambda number, body: Status(code, b'{"error": "no"}')) as server:
        with pytest.raises(JudgeUnavailable, match=hint):
            ask_all(quick_judge(server.url, num_workers=1), questions(50), Cache())
        assert len(server.requests) == 1


def test_a_redirect_does_not_carry_the_key_away():
    with judge_server(lambda number, body: Say("never asked")) as other:
        moved = Status(307, b"", {"Location": other.url + "/chat/completions"})
        with judge_server(lambda number, body: moved) as server, pytest.raises(JudgeUnavailable, match="307"):
            quick_judge(server.url, api_key="secret-key-of-mine").reply(questions(1)[0], 8)
        assert other.requests == []


def test_a_judge_that_repeats_the_key_is_not_quoted(tmp_path):
    with judge_server(lambda number, body: Say("your key is secret-key-of-mine [[A]]")) as server:
        ask_all(quick_judge(server.url, api_key="secret-key-of-mine"), questions(1), Cache(tmp_path / "cache.jsonl"))
    assert "secret-key-of-mine" not in (tmp_path / "cache.jsonl").read_text()
    with judge_server(lambda number, body: Status(401, b"bad key secret-key-of-mine")) as server, pytest.raises(JudgeUnavailable) as caught:
        quick_judge(server.url, api_key="secret-key-of-mine").reply(questions(1)[0], 8)
    assert "secret-key-of-mine" not in str(caught.value)


def test_an_empty_reply_is_a_reply():
    with judge_server(lambda number, body: Say(None)) as server:
        assert quick_judge(server.url).reply(questions(1)[0], 8) == Reply("")
        assert len(server.requests) == 1


def test_log_probabilities_of_the_first_token_are_kept():
    logprobs = {
        "content": [{"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -2}]}]
    }
    with judge_server(lambda number, body: Say("m", extra={"logprobs": logprobs})) as server:
        reply = quick_judge(server.url, wants_logprobs=True).reply(questions(1)[0], 1)
    assert reply.first_logprobs == {"m": -0.1, "M": -2.0}
    assert server.requests[0]["top_logprobs"] == 5


@pytest.mark.parametrize("url", ["ftp://host/v1", "host/v1", "file:///etc/passwd", "http://"])
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(UserError, match="no address"):
        EndpointJudge(url, "m")


def test_a_key_in_the_clear_is_warned_of(caplog):
    caplog.set_level(logging.WARNING)
    EndpointJudge("http://judge.example/v1", "m", "key")
    assert "without encryption" in caplog.text


def test_stale_replies_are_asked_for_again(tmp_path):
    path = tmp_path / "cache.jsonl"
    with judge_server(lambda number, body: Say("nonsense" if number < 2 else "[[A]]")) as server:
        judge = quick_judge(server.url, num_workers=1)
        ask_all(judge, questions(2), Cache(path))
        again = ask_all(judge, questions(2), Cache(path))
        assert [reply.text for reply in again.replies] == ["nonsense"] * 2
        fresh = ask_all(judge, questions(2), Cache(path), is_stale=lambda reply: read_choice(reply.text) is None)
    assert [reply.text for reply in fresh.replies] == ["[[A]]"] * 2
    assert [reply.text for reply in ask_all(judge, questions(2), Cache(path)).replies] == ["[[A]]"] * 2


# ---- judges of one's own -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory, tiny_model_factory, tiny_tokenizer_factory):
    """A tiny chat model on disk."""
    folder = tmp_path_factory.mktemp("judge")
    tiny_model_factory(vocab_size=384).save_pretrained(folder)
    tiny_tokenizer_factory().save_pretrained(folder)
    return folder


def test_a_local_model_judges(tmp_path, judge_folder):
    from orpo.evaluate.judging.local import LocalJudge, is_reward_model

    assert not is_reward_model(str(judge_folder))
    judge = LocalJudge(str(judge_folder), device="cpu")
    cache = Cache(tmp_path / "cache.jsonl")
    long = ({"role": "user", "content": "word " * 600},)
    found = ask_all(judge, [*questions(3), long], cache, max_tokens=5)
    assert all(isinstance(reply, Reply) for reply in found.replies[:3])
    assert found.replies[3] is None  # longer than its context: no reply, not a cut question
    assert len(cache) == 3
    again = ask_all(LocalJudge(str(judge_folder), device="cpu"), questions(3), Cache(tmp_path / "cache.jsonl"), max_tokens=5)
    assert again.num_cached == 3
    assert again.replies == found.replies[:3]


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, tiny_tokenizer_factory):
    """A tiny random reward model on disk."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("reward")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer_factory().save_pretrained(folder)
    return folder


def test_a_reward_model_scores_answers_as_its_template_shows_them(tmp_path, reward_folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from orpo.evaluate.judging.local import RewardModel, is_reward_model

    assert is_reward_model(str(reward_folder))
    reward = RewardModel(str(reward_folder), device="cpu")
    pairs = [
        ("What is new?", "Nothing."),
        ("What is new?", "A lot, and more than you think."),
        (({"role": "user", "content": "Hi"},), "Hello"),
    ]
    found = reward.scores(pairs, Cache(tmp_path / "cache.jsonl"))
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    for (prompt, answer), score in zip(pairs, found, strict=True):
        said = prompt if isinstance(prompt, str) else prompt[0]["content"]
        text = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        with torch.no_grad():
            expected = model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0, 0]
        assert score == pytest.approx(float(expected), abs=1e-6)
    reward._inputs = None  # nothing is computed again
    assert reward.scores(pairs, Cache(tmp_path / "cache.jsonl")) == found


def test_a_classifier_is_no_reward_model(tmp_path, reward_folder):
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    from orpo.evaluate.judging.local import RewardModel

    LlamaForSequenceClassification(AutoConfig.from_pretrained(reward_folder, num_labels=3)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 outputs"):
        RewardModel(str(tmp_path), device="cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "nothing-here"), device="cpu")
