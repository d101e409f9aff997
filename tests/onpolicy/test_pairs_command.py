"""`orpo pairs` as a user types it: rows of many kinds in, pairs out that `orpo train` reads, and every way to go on."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from faults.disks import small_disk
from judgeserver import Break, Dribble, Say, Status, judge_server
from orpo.cli import main
from orpo.data.formats import load_preferences

CHECKS = """
def passed(prompt, answer):
    return len(answer) % 2 == 0

def vowels(prompt, answer):
    return sum(letter in "aeiou" for letter in answer)

def fails(prompt, answer):
    raise ValueError("no")

def sometimes(prompt, answer):
    if len(answer) % 3 == 0:
        raise ValueError("no")
    return len(answer)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("onpolicy")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "checks.py").write_text(CHECKS)
    rows = [{"prompt": f"How many apples are {n} and {n + 1}?", "answer": str(2 * n + 1)} for n in range(12)]
    write(folder / "prompts.jsonl", rows)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(base: Path, out: Path, prompts: Path | None = None, **options: Any) -> list[str]:
    own = {
        "model": base / "base",
        "out": out,
        "max_new_tokens": 8,
        "device": "cpu",
        "cut": "keep",
        "verify": f"{base / 'checks.py'}:vowels",
    }
    given = {**own, **options}
    flags = [
        word for key, value in given.items() if value is not None for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]
    return ["pairs", str(prompts or base / "prompts.jsonl"), *flags]


def test_pairs_are_made_read_back_and_found_again(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "pairs.jsonl"
    assert main(words(base, out, json=True)) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = read(out)
    assert facts["num_pairs"] == len(rows) > 0
    assert not facts["is_already_made"]
    preferences, dropped, _ = load_preferences(str(out))
    assert len(preferences) == len(rows)
    assert not dropped
    for row in rows:
        assert row["chosen_score"] > row["rejected_score"]
        assert row["margin"] == row["chosen_score"] - row["rejected_score"]
        assert row["chosen_parts"] == {"vowels": row["chosen_score"]}
        assert row["sampling"] == {"max_new_tokens": 8, "temperature": 0.8, "top_p": 1.0, "seed": 0, "num_samples": 4}
        assert row["chosen_by"] == str(base / "base")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert main(words(base, out, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["is_already_made"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_choice_samples_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    assert main(words(base, out)) == 0
    cache = (out.parent / "pairs.jsonl.work" / "cache" / "answers.jsonl").read_bytes()
    capsys.readouterr()
    assert main(words(base, out, choose="all", max_pairs=3)) == 0
    assert "all 48 answers were there" in capsys.readouterr().out
    assert main(words(base, out, num_samples=6)) == 0
    assert "24 answers" in capsys.readouterr().out
    assert (out.parent / "pairs.jsonl.work" / "cache" / "answers.jsonl").read_bytes().startswith(cache)


def test_all_shared_scorers_weigh_together(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    assert main(words(base, out, numeric="answer", exact="answer", logp=True, length=True, weights="logp=0.5,length=-2,vowels=3")) == 0
    for row in read(out):
        parts = row["chosen_parts"]
        assert set(parts) == {"vowels", "numeric", "exact", "logp", "length"}
        assert row["chosen_score"] == pytest.approx(
            3 * parts["vowels"] + parts["numeric"] + parts["exact"] + 0.5 * parts["logp"] - 2 * parts["length"]
        )
        assert parts["logp"] < 0


CONVERSATION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "look", "parameters": {"type": "object", "properties": {}}}}]
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "pair": ({"prompt": "A?", "chosen": "yes", "rejected": "no"}, "A?"),
    "tie": ({"prompt": "A?", "responses": ["yes", "no"], "scores": [1, 1]}, "A?"),
    "question": ({"question": "A?"}, "A?"),
    "instruction": ({"instruction": "A?", "input": "B"}, "A?\n\nB"),
    "messages": ({"messages": [*CONVERSATION, {"role": "user", "content": "And?"}]}, [*CONVERSATION, {"role": "user", "content": "And?"}]),
    "answered": ({"messages": CONVERSATION}, CONVERSATION[:-1]),
    "tools": ({"prompt": "A?", "tools": TOOLS}, [{"role": "user", "content": "A?"}]),
    "system": ({"system": "Be short.", "prompt": "A?"}, [{"role": "system", "content": "Be short."}, {"role": "user", "content": "A?"}]),
    "kto": ({"prompt": "A?", "completion": "yes", "label": True}, "A?"),
    "sft": ({"prompt": "A?", "response": "yes"}, "A?"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_every_kind(kind: str, tmp_path: Path) -> None:
    from orpo.onpolicy.asked import read_asked

    row, expected = KINDS[kind]
    rows = [row, {key: (f"{value} more" if isinstance(value, str) else value) for key, value in row.items()}]
    asked = read_asked(str(write(tmp_path / "rows.jsonl", rows)))
    prompt = asked.prompts[0].prompt
    assert prompt == (expected if isinstance(expected, str) else tuple(expected))
    assert (asked.prompts[0].tools is not None) == (kind == "tools")


def test_conversations_and_tools_come_out_as_messages(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [*CONVERSATION, {"role": "user", "content": f"And {n}?"}], "tools": TOOLS} for n in range(4)]
    out = tmp_path / "pairs.jsonl"
    assert main(words(base, out, write(tmp_path / "rows.jsonl", rows))) == 0
    preferences, dropped, _ = load_preferences(str(out))
    assert not dropped
    assert preferences[0].tools
    assert [message["role"] for message in preferences[0].prompt] == ["system", "user", "assistant", "user"]
    assert preferences[0].responses[0][0]["role"] == "assistant"


def test_own_answers_compete(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"A {n}?", "chosen": "aeiou" * 20, "rejected": "x"} for n in range(3)]
    out = tmp_path / "pairs.jsonl"
    assert main(words(base, out, write(tmp_path / "rows.jsonl", rows), keep_answers=True)) == 0
    assert {row["chosen_by"] for row in read(out)} == {"the data"}
    assert {row["chosen"] for row in read(out)} == {"aeiou" * 20}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": None}, "a scorer: verify"),
        ({"model": None}, "nobody is asked"),
        ({"num_samples": 1}, "two answers make a pair"),
        ({"temperature": 0.0}, "fewer than two different answers"),
        ({"judge_url": "http://127.0.0.1:9/v1"}, "the judge's model has no name"),
        ({"verify": "gone.py:f"}, "no such file"),
        ({"verify": None, "numeric": "gone"}, "have no 'gone'"),
        ({"verify": None, "length": True}, "length has no weight"),
        ({"weights": "vowel=1"}, "weight for vowel"),
        ({"weights": "vowels=nan"}, "weights: vowels"),
        ({"weights": "vowels=inf"}, "weights: vowels"),
        ({"verify_time_s": "inf"}, "verify_time_s"),
        *(
            ({"endpoint_url": "http://127.0.0.1:9/v1", "endpoint_model": "x", f"endpoint_{key}": value}, f"endpoint_{key}: found")
            for key, value in (("workers", 0), ("timeout", -1), ("timeout", "inf"), ("timeout", "nan"), ("retries", -1))
        ),
        ({"min_margin": -1.0}, "min_margin"),
        ({"verify": None, "numeric": "answer", "choose": "right_wrong"}, "prompts without a right answer"),
        ({"out": "pairs.json"}, "a file *.jsonl"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"verify": None, "length": True, "weights": "length=1", "verify_time_s": 9.0}, "verify_time_s: nothing reads it without verify"),
        ({"judge_model": "m"}, "judge_model: nothing reads it without judge_url"),
        ({"right_at": 0.5}, "right_at: nothing reads it without choose: right_wrong"),
        ({"endpoint_workers": 2}, "--endpoint_workers: it has no address"),
        ({"column_map": "[prompt]"}, "--column_map: found '[prompt]'"),
        ({"verify": None, "ifeval": True}, "instruction_id_list"),
    ],
)
def test_what_cannot_be_done_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert main(words(base, **{"out": tmp_path / "pairs.jsonl", **options})) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split()), said
    assert "Traceback" not in said


def test_a_file_of_others_is_not_overwritten(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text("mine\n")
    assert main(words(base, tmp_path / "pairs.jsonl")) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("change", ["one line more", "no line left"])
def test_pairs_that_somebody_has_changed_are_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    out = tmp_path / "pairs.jsonl"
    assert main(words(base, out)) == 0
    made = out.read_text()
    out.write_text(made + "\n" if change == "one line more" else "")
    for options in ({}, {"choose": "all"}):
        capsys.readouterr()
        assert main(words(base, out, **options)) == 2
        assert "was changed since it was made" in " ".join(capsys.readouterr().err.split())
    assert out.read_text() == (made + "\n" if change == "one line more" else "")
    out.unlink()
    assert main(words(base, out)) == 0
    assert out.read_text() == made


@pytest.mark.parametrize("place", ["file/pairs.jsonl", "file/deeper/pairs.jsonl", "folder.jsonl"])
def test_places_that_cannot_be(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    assert main(words(base, tmp_path / place)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a file" in said or "is a folder" in said


def test_a_full_disk_is_told_and_the_same_command_goes_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full in every phase: while answers, scores, candidates or pairs are written."""
    options = {"dtype": "float32", "no_audit": True}
    whole = tmp_path / "whole.jsonl"
    assert main(words(base, whole, **options)) == 0
    codes = []
    with small_disk(tmp_path / "disk", "tmpfs", 1 << 20) as folder:
        ballast = folder / "ballast"
        for room_kib in (0, 8, 16, 24, 32, 48, 1024):
            ballast.unlink(missing_ok=True)
            free = shutil.disk_usage(folder).free
            ballast.write_bytes(b"x" * max(0, free - room_kib * 1024))
            capsys.readouterr()
            codes.append(main(words(base, folder / "pairs.jsonl", **options)))
            said = capsys.readouterr().err
            assert codes[-1] == 0 or "No space left" in said, said
        assert set(codes[:2]) == {2}
        assert codes[-1] == 0
        assert read(folder / "pairs.jsonl") == read(whole)
        keys = [line["key"] for line in answers_of(folder / "pairs.jsonl.work")]
        assert len(keys) == len(set(keys)) == 48


def test_a_folder_of_a_hub_set_is_read(base: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        write(tmp_path / "set" / "data" / f"{split}-00000-of-00001.jsonl", [{"prompt": f"{split} {n}?"} for n in range(count)])
    from orpo.onpolicy.asked import read_asked

    assert [one.prompt for one in read_asked(str(tmp_path / "set"), split="train").prompts] == [f"train {n}?" for n in range(3)]


def test_a_verifier_that_fails_ends_clearly_and_answers_are_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    assert main(words(base, out, verify=f"{base / 'checks.py'}:fails")) == 2
    said = capsys.readouterr().err
    assert "none of the first 20 calls gave a score; the first: ValueError: no at line" in said
    assert main(words(base, out, verify=f"{base / 'checks.py'}:sometimes")) == 0
    shown = capsys.readouterr().out
    assert "all 48 answers were there" in shown
    assert "sometimes gave no score to" in shown
    assert all(len(row["chosen"]) % 3 for row in read(out))


# ---- endpoints -------------------------------------------------------------------------------------------------------------------------


def endpoint_words(base: Path, out: Path, url: str, **options: Any) -> list[str]:
    more = {"endpoint_url": url, "endpoint_model": "served", "endpoint_retries": 0, "endpoint_timeout": 2, "num_samples": 3}
    return words(base, out, **{"model": None, **more, **options})


def test_an_endpoints_answers_beside_a_models(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    with judge_server(lambda number, body: Say("aeiou" * (1 + body["seed"] % 3))) as server:
        assert main(endpoint_words(base, out, server.url, model=base / "base")) == 0
        assert {row["chosen_by"] for row in read(out)} == {"served"}
        assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.requests} == {(0.8, 1.0, 8)}
        assert len(server.requests) == 36
        assert main(endpoint_words(base, out, server.url, model=base / "base", choose="all")) == 0
        assert len(server.requests) == 36, "what was answered is not asked again"


def test_what_a_server_has_cut_is_not_chosen(base: Path, tmp_path: Path) -> None:
    """The best answers are cut, says the server; they may be rejected only."""
    out = tmp_path / "pairs.jsonl"

    def behave(number: int, body: dict[str, Any]) -> Say:
        is_long = body["seed"] % 3 == 0
        return Say("aeiou" * (9 if is_long else body["seed"] % 3), extra={"finish_reason": "length" if is_long else "stop"})

    with judge_server(behave) as server:
        assert main(endpoint_words(base, out, server.url, cut="rejected")) == 0
    assert {(row["chosen"], row["rejected"]) for row in read(out)} == {("aeiou" * 2, "aeiou")}


NO_CHOICE, LIMITED = Status(200, b'{"choices": []}'), Status(429, b"slow down", {"Retry-After": "0.01"})


@pytest.mark.parametrize(
    "action", [Break(), Break(in_body=True), Dribble(), Status(500), Status(200, b"<html>"), Say(None), Status(400), NO_CHOICE, LIMITED]
)
def test_endpoints_that_hang_lie_or_break(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], action: Any) -> None:
    """What it has answered before is kept; afterwards the same command asks for the rest."""
    out = tmp_path / "pairs.jsonl"
    good = 20

    def behave(number: int, body: dict[str, Any]) -> Any:
        return Say("aeiou" * (1 + number % 7)) if number < good or is_well else action

    is_well = False
    with judge_server(behave) as server:
        options = {"endpoint_timeout": 0.5, "endpoint_workers": 1}
        code = main(endpoint_words(base, out, server.url, **options))
        said = capsys.readouterr()
        if isinstance(action, Say):  # an empty answer is an answer
            assert code == 0
            return
        assert "Traceback" not in said.err
        assert code == (0 if action == Status(400) else 2), said.err
        assert "endpoint" in said.err
        num_before, is_well = len(server.requests), True
        assert main(endpoint_words(base, out, server.url, **options)) == 0
        assert len(server.requests) - num_before == 36 - good
    assert read(out)


# ---- going on --------------------------------------------------------------------------------------------------------------------------


def started(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "orpo", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["loading", "answers", "scores", "result"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_nothing(base: Path, tmp_path: Path, phase: str, how: signal.Signals) -> None:
    """Killed or interrupted in a phase, the same command makes the very file that an unbroken one makes, and samples no answer again."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    options = {"batch_size": 4, "dtype": "float32"}
    assert main(words(base, whole, **options)) == 0
    work = tmp_path / "pairs.jsonl.work"
    watched = {"answers": work / "cache" / "answers.jsonl", "scores": work / "cache" / "scores.jsonl", "result": out, "loading": work}[
        phase
    ]
    process = started(words(base, out, **options), tmp_path)
    while process.poll() is None and not watched.exists():
        time.sleep(0.002)
    process.send_signal(how)
    said = process.communicate()[1].decode()
    assert process.returncode in ((0, 130) if how == signal.SIGINT else (0, -signal.SIGKILL)), said
    assert "Traceback" not in said
    kept = answers_of(work)
    assert main(words(base, out, **options)) == 0
    assert answers_of(work)[: len(kept)] == kept
    keys = [line["key"] for line in answers_of(work)]
    assert len(keys) == len(set(keys)) == 48
    assert read(out) == read(whole)


def answers_of(work: Path) -> list[dict[str, Any]]:
    path = work / "cache" / "answers.jsonl"
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # cut by the kill
            found.append(json.loads(line))
    return found
