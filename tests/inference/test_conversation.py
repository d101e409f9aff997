"""Talking to a model and its base: turns, other answers, which is better, and what of it is written."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapted import make_adapter_folder
from orpo.errors import UserError
from orpo.inference.conversation import BreakOff, Chat, Settings, append_row, sides_of, withdraw_row
from orpo.inference.ready import make_ready


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose adapter changes its base's answers."""
    return make_adapter_folder(tmp_path_factory.mktemp("chat"))


def chat_with(adapter: Path, against: str | None = "base", **settings: Any) -> Chat:
    ready = make_ready(str(adapter), device="cpu")
    return Chat(sides_of(ready, str(adapter), against), Settings(max_new_tokens=6, **settings))


def test_both_answers_come_from_one_model_in_memory(adapter: Path) -> None:
    chat = chat_with(adapter)
    tuned, base = chat.ask("Hello")
    assert chat.sides[0].ready is chat.sides[1].ready
    alone = chat_with(adapter, None).ask("Hello")
    of_base = chat_with(adapter.parent / "base", None).ask("Hello")
    assert (tuned.text, base.text) == (alone[0].text, of_base[0].text)
    assert tuned.text != base.text
    assert chat.ask("Hello")[0].text != ""  # the adapter is on again


def test_the_same_seed_gives_both_the_same_draws(adapter: Path) -> None:
    base = adapter.parent / "base"
    chat = chat_with(base, str(base), temperature=1.0)
    first = chat.ask("Hello")
    again = chat.retry()
    assert first[0].text == first[1].text
    assert again[0].text == again[1].text != first[0].text
    assert [one.number for one in first + again] == [1, 2, 3, 4]


def test_what_is_streamed_is_the_answer(adapter: Path) -> None:
    num_heard = []
    for prompt in ("Hello", "And then?", "Why?"):  # random weights may end an answer with its first token
        heard: dict[int, list[str]] = {0: [], 1: []}
        answers = chat_with(adapter).ask(prompt, lambda side, text, heard=heard: heard[side].append(text))
        for side, answer in enumerate(answers):
            num_heard.append(len(heard[side]))
            assert answer.text.startswith(heard[side][-1].rstrip("\ufffd") if heard[side] else "")
            assert all(later.startswith(earlier) for earlier, later in zip(heard[side], heard[side][1:], strict=False))
    assert max(num_heard) > 1


def test_the_better_answer_goes_on_and_is_a_row_that_training_reads(adapter: Path, tmp_path: Path) -> None:
    from orpo.data.formats import load_preferences

    chat = chat_with(adapter, system="Be brief.")
    _, base = chat.ask("Hello")
    row = chat.prefer(2)
    assert chat.conversation()[-1]["content"] == base.text
    path = tmp_path / "new" / "pairs.jsonl"
    assert append_row(path, row) == 1
    chat.ask("And\u2028then?")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user"]
    assert append_row(path, chat.prefer(1)) == 2
    read, dropped, _ = load_preferences(str(path))
    assert len(read) == 2
    assert not dropped


def test_turns_are_edited_and_taken_back(adapter: Path) -> None:
    chat = chat_with(adapter)
    for step in (chat.retry, chat.back, lambda: chat.edit("x")):
        with pytest.raises(UserError, match="nothing was asked"):
            step()
    first = chat.ask("one")[0].text
    chat.ask("two")
    assert chat.edit("three")
    assert [message["content"] for message in chat.messages] == ["one", first, "three"]
    chat.back()
    assert [message["content"] for message in chat.conversation()] == ["one", first]
    chat.back()
    assert chat.conversation() == []


def test_what_cannot_be_preferred_is_told(adapter: Path) -> None:
    base = adapter.parent / "base"
    chat = chat_with(base, None)
    chat.ask("Hello")
    with pytest.raises(UserError, match="no two answers"):
        chat.prefer(1)
    same = chat_with(base, str(base))
    same.ask("Hello")
    with pytest.raises(UserError, match="the same"):
        same.prefer(1)
    both = chat_with(adapter)
    both.ask("Hello")
    both.retry()
    with pytest.raises(UserError, match="4 answers"):
        both.prefer(1)
    for pair in ((1, 1), (0, 2), (1, 5)):
        with pytest.raises(UserError, match="two different numbers"):
            both.prefer(*pair)
    assert both.prefer(4, 1)["rejected"][0]["content"] == both.candidates[0].text


def test_nothing_says_what_the_base_of_a_plain_model_is(adapter: Path) -> None:
    with pytest.raises(UserError, match="--against MODEL"):
        chat_with(adapter.parent / "base", "base")


@pytest.mark.parametrize("step", ["ask", "edit", "retry"])
def test_a_turn_that_fails_was_never_asked(adapter: Path, step: str) -> None:
    """Settings out of range, a conversation beyond the context, a failure in the middle: turns and answers are those of before."""
    chat = chat_with(adapter)
    chat.ask("one")
    chat.prefer(2)
    before = (chat.conversation(), list(chat.candidates), chat.picked)
    arguments = [] if step == "retry" else ["two"]

    def fail(side: int, text: str) -> None:
        raise MemoryError

    good, chat.settings = chat.settings, Settings(temperature=-1)
    with pytest.raises(UserError, match="temperature"):
        getattr(chat, step)(*arguments)
    assert (chat.conversation(), chat.candidates, chat.picked) == before
    chat.settings = good
    with pytest.raises(MemoryError):
        getattr(chat, step)(*arguments, fail)
    assert (chat.conversation(), chat.candidates, chat.picked) == before
    if arguments:
        assert getattr(chat, step)("long " * 1200)[0].finish == "prompt_too_long"
        assert (chat.conversation(), chat.candidates, chat.picked) == before
    getattr(chat, step)(*arguments)
    assert [message["role"] for message in chat.messages if message["role"] == "user"] == ["user"] * (2 if step == "ask" else 1)


def test_whoever_hears_an_answer_can_break_it_off(adapter: Path) -> None:
    chat = chat_with(adapter)

    def enough(side: int, text: str) -> None:
        raise BreakOff

    (answer,) = chat.ask("Hello", enough)
    assert answer.finish == "stopped"
    assert answer.num_tokens < 6


def test_a_row_is_taken_back_while_it_is_the_last_line(tmp_path: Path) -> None:
    path, first, second = tmp_path / "rows.jsonl", {"prompt": "é\u2028"}, {"prompt": "b"}
    path.write_bytes(b'{"prompt": "by hand"}')
    for row in (first, second):
        append_row(path, row)
    assert not withdraw_row(path, first)
    assert withdraw_row(path, second)
    assert withdraw_row(path, first)
    assert path.read_bytes() == b'{"prompt": "by hand"}\n'
    assert not withdraw_row(path, {"prompt": "by hand"} | {"x": 1})
    assert not withdraw_row(tmp_path / "none.jsonl", first)


def test_a_disk_that_is_full_tears_no_row(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: a part of the row is taken, as a full disk does."""
    path = tmp_path / "rows.jsonl"
    append_row(path, {"prompt": "a"})
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, limits[1]))
    try:
        with pytest.raises(UserError, match=r"rows.jsonl: cannot be written: No space"):
            append_row(path, {"prompt": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole


def run_chat(model: Path, *flags: str, lines: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orpo", "chat", str(model), "--max_new_tokens", "6", *flags]
    return subprocess.run(command, input=lines, capture_output=True, text=True, cwd=folder, check=False, timeout=200)


def test_a_chat_as_it_is_typed(adapter: Path, tmp_path: Path) -> None:
    """/help and mistyped commands are not sent to the model; rows and conversations are written; the rows train."""
    typed = "/help\n/hlep me\nHello\n/better 1\n//etc is a folder\n/better x\n/save talk.jsonl\n/quit\nnever\n"
    done = run_chat(adapter, "--against", "base", lines=typed, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "/retry" in done.stderr
    assert "/hlep is no command" in done.stderr
    assert done.stdout.count("] tuned") == done.stdout.count("] base") == 2
    (row,) = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert row["prompt"] == [{"role": "user", "content": "Hello"}]
    (talk,) = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant"] * 2
    assert talk["messages"][2]["content"] == "/etc is a folder"


def test_ctrl_c_ends_the_answer_and_not_the_chat(adapter: Path, tmp_path: Path) -> None:
    """In a terminal, as a person does it: a long answer is broken off, the next one comes."""
    assert any(breaks_off(adapter.parent / "base", tmp_path) for _ in range(5))


def breaks_off(model: Path, folder: Path) -> bool:
    """A chat whose answer is broken off; False where the answer had ended by itself before, and Ctrl-C ended the chat."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "orpo", "chat", str(model), "--max_new_tokens", "480", "--temperature", "3"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, start_new_session=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell takes from what it starts with "&"
    )  # fmt: skip
    os.close(slave)
    try:
        read_until(master, process, "> ")
        os.write(master, b"Hello\n")
        read_until(master, process, "Hello", more=40)  # what was typed, and some of the answer
        process.send_signal(signal.SIGINT)
        try:  # not until the prompt: random weights may say "> " themselves
            read_until(master, process, "stopped; the chat goes on", meanwhile=lambda: process.send_signal(signal.SIGINT))
        except AssertionError:
            assert process.wait() == 130
            return False
        os.write(master, b"/quit\n")
        assert process.wait() == 0
        return True
    finally:
        process.kill()
        os.close(master)


def read_until(
    master: int, process: subprocess.Popen[bytes], mark: str, *, more: int = 0, meanwhile: Callable[[], None] = lambda: None
) -> str:
    """What a terminal shows up to a mark and some characters beyond; no clock but the test's own limit.

    Args:
        meanwhile: done where nothing has come for a while: Python drops an interrupt that comes inside a finaliser.
    """
    text = ""
    while process.poll() is None:
        if select.select([master], [], [], 5)[0]:
            text += os.read(master, 4096).decode(errors="replace")
        else:
            meanwhile()
        if mark in text and len(text) - text.rindex(mark) - len(mark) >= more:
            return text
    raise AssertionError(text)
