"""The conversations of the page's visitors, and the one model that answers all of them in turn.

A conversation is the terminal's (`orpo.inference.conversation.Chat`); here it gets a name, a way to be broken off from another thread, and
a place to write what was preferred.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orpo.errors import UserError
from orpo.inference.conversation import BreakOff, Chat, Settings, Side, append_row, withdraw_row
from orpo.inference.generate import TOO_LONG

MOST_TALKS = 64
"""Conversations that are kept; the one that was quiet longest is forgotten first."""

_NUMBERS: dict[str, type] = {"temperature": float, "top_p": float, "seed": int, "max_new_tokens": int}


@dataclass
class Talk:
    """One conversation on one page.

    Attributes:
        chat: its turns and answers.
        is_stopped: set to break the answer off that is being written.
        is_busy: an answer is being written.
        row: what was preferred last, while it can be taken back, and how many rows the file had then.
    """

    chat: Chat
    is_stopped: threading.Event = field(default_factory=threading.Event)
    is_busy: bool = False
    row: tuple[dict[str, Any], int] | None = None

    def state(self) -> dict[str, Any]:
        """All that the page shows."""
        chat = self.chat
        answers = [
            {"number": one.number, "side": one.side, "text": one.text, "finish": one.finish, "num_tokens": one.num_tokens}
            for one in chat.candidates
        ]
        num_rows = self.row[1] if self.row and chat.picked is not None else None
        return {"messages": chat.messages, "answers": answers, "better": chat.picked, "rows": num_rows, "talk": chat.conversation()}


class Desk:
    """All conversations, and the thread that alone touches the models."""

    def __init__(self, sides: list[Side], settings: Settings, preferences: Path) -> None:
        self.sides, self.settings, self.preferences = sides, settings, preferences
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="orpo-model")
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._writing = threading.Lock()

    def talk(self, name: str) -> Talk:
        """The conversation of this name; a new one if there is none."""
        found = self._talks.setdefault(name, Talk(Chat(self.sides, self.settings)))
        self._talks.move_to_end(name)
        while len(self._talks) > MOST_TALKS and (idle := next((key for key, one in self._talks.items() if not one.is_busy), None)):
            del self._talks[idle]
        return found

    def answer(self, talk: Talk, wish: dict[str, Any], on_text: Callable[[int, str], None]) -> None:
        """Ask, ask again in other words, or ask once more; to be called in the thread of the models.

        Args:
            wish: `do` ("ask", "edit" or "retry"), `text` and `settings` as the page sent them.
            on_text: told the side's number and its text so far.

        Raises:
            UserError: something in the wish is out of range, or the conversation is longer than the model's context.
        """
        chat = talk.chat
        is_new = not any(message["role"] == "user" for message in chat.messages)
        before = chat.settings, list(chat.messages)
        chat.settings = settings_of(wish.get("settings"), chat.settings, is_new=is_new)
        if is_new:
            chat.reset()

        def hear(side: int, text: str) -> None:
            if talk.is_stopped.is_set():
                raise BreakOff
            on_text(side, text)

        try:
            found = chat.retry(hear) if wish["do"] == "retry" else getattr(chat, wish["do"])(text_of(wish.get("text")), hear)
        except BaseException:
            chat.settings, chat.messages = before
            raise
        talk.row = None
        if any(one.finish == TOO_LONG for one in found):
            raise UserError("the conversation would be longer than the model's context", expected="a shorter text, or a new conversation")

    def do(self, talk: Talk, wish: dict[str, Any]) -> None:
        """Forget the last turn or all of them, or say which answer is better.

        Raises:
            UserError: there is nothing to forget or to choose from, or the file cannot be written.
        """
        chat = talk.chat
        if wish["do"] == "reset":
            chat.settings = settings_of(wish.get("settings"), chat.settings, is_new=True)
            chat.reset()
        elif wish["do"] == "back":
            chat.back()
        elif wish["do"] == "better":
            self._prefer(talk, _number(wish.get("number")), _number(wish.get("over")))
            return
        elif wish["do"] == "undo":
            self._take_back(talk)
        talk.row = None

    def _prefer(self, talk: Talk, number: int | None, over: int | None) -> None:
        if number is None:
            raise UserError("which answer is better?", expected="its number")
        row = talk.chat.prefer(number, over)
        try:
            with self._writing:
                talk.row = row, append_row(self.preferences, row)
        except UserError:
            talk.chat.take_back()
            raise

    def _take_back(self, talk: Talk) -> None:
        if talk.row is None:
            raise UserError("there is no row to take back")
        with self._writing:
            is_gone = withdraw_row(self.preferences, talk.row[0])
        if not is_gone:
            raise UserError(f"{self.preferences} has other rows behind this one by now: it stays", expected="its last line, unchanged")
        talk.chat.take_back()

    def stop_all(self) -> None:
        """Break off whatever is being written."""
        for talk in self._talks.values():
            talk.is_stopped.set()


def settings_of(wanted: Any, before: Settings, *, is_new: bool) -> Settings:
    """The page's settings; a system message belongs to the start of a conversation and changes only there.

    Raises:
        UserError: one is no number, or out of range.
    """
    wanted = wanted if isinstance(wanted, dict) else {}
    changed: dict[str, Any] = {}
    for name, kind in _NUMBERS.items():
        if name in wanted:
            changed[name] = _as_number(name, wanted[name], kind)
    if is_new and "system" in wanted:
        changed["system"] = text_of(wanted["system"]).strip() if wanted["system"] else None
    return replace(before, **changed)  # ranges are checked where they are used, before anything is generated


def text_of(value: Any) -> str:
    """A text of the page; JSON can hold halves of a pair of surrogates, which no file and no tokenizer takes.

    Raises:
        UserError: it is none, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError("the text is empty", expected="a question")
    return value.encode("utf-8", "replace").decode("utf-8")


def _as_number(name: str, value: Any, kind: type) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and (kind is float or float(value).is_integer())
    if not is_number:
        raise UserError(f"{name} is {value!r}", where=name, expected="a whole number" if kind is int else "a number")
    return kind(value)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
