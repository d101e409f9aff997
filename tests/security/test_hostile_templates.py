"""A chat template is foreign code. It is sandboxed, stopped when it does not end, and cannot flood the run."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from chattemplates import CHATML, build_tokenizer
from orpo.data.chat import render
from orpo.data.template import TemplateEncoder
from orpo.data.types import Preference, TokenGroup, Where
from orpo.errors import EXIT_USER, DataError

ROW = Preference("Hello", ("Yes", "No"), ((0, 1),), Where("rows.jsonl", 0, 1))
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


REAL_LIMIT_S = render.RENDER_LIMIT_S


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "RENDER_LIMIT_S", 0.3)


@pytest.mark.parametrize(
    "hostile",
    [
        LOOP,
        "{{ (9 ** (9 ** 9)) > 0 }}",
        "{% macro again(n) %}{% for i in range(99999) %}{{ again(n + 1) if n < 5 }}{% endfor %}{% endmacro %}{{ again(0) }}",
    ],
    ids=["loops", "one long operation", "recursion"],
)
def test_a_template_that_does_not_end_is_stopped_and_named(hostile: str) -> None:
    started_s = time.process_time()
    with pytest.raises(DataError, match="chat template given as text ran longer than") as caught:
        TemplateEncoder(build_tokenizer(), chat_template=hostile + CHATML)
    assert time.process_time() - started_s < 20
    assert caught.value.exit_code == EXIT_USER
    assert "chat_template" in str(caught.value)


def test_a_template_that_waits_for_its_row_is_stopped_there() -> None:
    trap = "{% if 'password' in messages[0]['content'] %}" + LOOP + "{% endif %}"
    encoder = TemplateEncoder(build_tokenizer(), chat_template=trap + CHATML)
    assert isinstance(encoder.encode(ROW), TokenGroup)
    row = Preference("My password?", ("Yes", "No"), ((0, 1),), Where("rows.jsonl", 8, 9))
    with pytest.raises(DataError, match=r"rows\.jsonl:9: the chat template given as text ran longer than"):
        encoder.encode(row)


def test_outside_the_main_thread_too() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            TemplateEncoder(build_tokenizer(), chat_template=LOOP + CHATML)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert isinstance(caught[0], DataError)
    assert "ran longer than" in str(caught[0])


def test_rendering_in_a_thread_leaves_nothing_behind() -> None:
    """The interruption belongs to the rendering alone: afterwards neither the thread nor the main one is disturbed."""
    groups: list[object] = []
    thread = threading.Thread(target=lambda: groups.append(TemplateEncoder(build_tokenizer()).encode(ROW)))
    thread.start()
    thread.join(timeout=30)
    time.sleep(0.5)
    assert isinstance(groups[0], TokenGroup)


@pytest.mark.skipif(not hasattr(signal, "SIGVTALRM"), reason="no timer signals here")
def test_the_signal_handler_is_given_back() -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGVTALRM, lambda signum, frame: seen.append(signum))
    try:
        mine = signal.getsignal(signal.SIGVTALRM)
        TemplateEncoder(build_tokenizer()).encode(ROW)
        assert signal.getsignal(signal.SIGVTALRM) is mine
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    finally:
        signal.signal(signal.SIGVTALRM, previous)
    assert not seen


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{% set x = namespace() %}{{ x.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_the_sandbox_holds(hostile: str) -> None:
    with pytest.raises(DataError, match="cannot render one user and one assistant message"):
        TemplateEncoder(build_tokenizer(), chat_template=hostile + CHATML)


def test_a_flood_of_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the real limit of time: on a slow machine 30 MB take longer than the short one."""
    monkeypatch.setattr(render, "RENDER_LIMIT_S", REAL_LIMIT_S)
    with pytest.raises(DataError, match="printed 30000"):
        TemplateEncoder(build_tokenizer(), chat_template="{{ 'abc' * 10000000 }}" + CHATML)


def test_a_template_reads_no_files() -> None:
    with pytest.raises(DataError, match="cannot render"):
        TemplateEncoder(build_tokenizer(), chat_template="{% include '/etc/passwd' %}" + CHATML)
