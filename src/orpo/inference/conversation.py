"""A conversation with a model, or with two at once: turns, other answers to the same turn, and which of them is better.

The terminal and the page in a browser show the same session.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.inference.generate import TOO_LONG, Answer, check_generation, generate
from orpo.models.adapters import is_adapted

if TYPE_CHECKING:
    from orpo.inference.ready import Ready

Message = dict[str, str]

STOPPED = "stopped"
"""How an answer ended that the user broke off."""

RETRY_TEMPERATURE = 0.8
"""Of another answer to the same turn, where the first was the likeliest one: it would be the same again."""


class BreakOff(Exception):
    """Raised by whoever hears an answer, to end it there: what Ctrl-C is in a terminal."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made; as in `orpo.inference.generate.generate`."""

    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Before a model is loaded for nothing.

        Raises:
            UserError: one is out of range.
        """
        check_generation(self.max_new_tokens, self.temperature, self.top_p)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the models that answer.

    Attributes:
        name: what people call it.
        ready: model, tokenizer and encoder.
        is_bare: without its adapter: the base, from the same weights in memory.
    """

    name: str
    ready: Ready
    is_bare: bool = False

    def answer(self, messages: list[Message], settings: Settings, *, seed: int, on_text: Callable[[str], None] | None = None) -> Answer:
        """An answer to the last message; its `finish` is "stopped" where the user broke it off.

        A template of `none` sees the last message alone, as plain text.

        Args:
            on_text: told the text so far, at every token that completes a character.
        """
        tokens: list[int] = []
        tokenizer, encoder = self.ready.loaded.tokenizer, self.ready.encoder

        def hear(token_id: int) -> None:
            tokens.append(token_id)
            text = "" if on_text is None else tokenizer.decode(tokens, skip_special_tokens=True)
            if on_text is not None and not text.endswith("�"):  # half a character
                on_text(text)

        model = self.ready.loaded.model
        prompt: Any = messages[-1]["content"] if encoder.template_name == "none" else tuple(messages)
        try:
            with model.disable_adapter() if self.is_bare else nullcontext():
                (answer,) = generate(
                    model,
                    tokenizer,
                    encoder,
                    [prompt],
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=seed,
                    compute_dtype=self.ready.compute_dtype,
                    on_token=hear,
                )
        except (KeyboardInterrupt, BreakOff):
            return Answer(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), STOPPED)
        return answer


def sides_of(ready: Ready, name: str, against: str | None) -> list[Side]:
    """The model, and what it is compared with: "base" (its adapter off, or the model that its run started from), or any other model.

    Raises:
        UserError: nobody knows what the base is, or there is no such model.
    """
    from orpo.inference.ready import Target, make_ready

    first = Side("tuned" if against == "base" else name, ready)
    if against in (None, "none"):
        return [first]
    if against != "base":
        return [first, Side(against, make_ready(against))]
    if is_adapted(ready.loaded.model):
        return [first, Side("base", ready, is_bare=True)]
    target = Target.find(name)
    if target.base is None or target.config is None:
        raise UserError(
            "neither an adapter nor a run: nothing says what its base is",
            where=name,
            mend="name the base: --against MODEL, or leave it away",
        )
    return [first, Side("base", make_ready(target.base, revision=target.config["model_revision"]))]


def default_base(ready: Ready, name: str) -> str | None:
    """`base` where something says what the model's base is: it has an adapter, or it is a run."""
    from orpo.inference.ready import Target

    return "base" if is_adapted(ready.loaded.model) or Target.find(name).base is not None else None


@dataclass(slots=True)
class Candidate:
    """One answer to the last turn; `number` is the one people give it."""

    number: int
    side: str
    text: str
    finish: str
    num_tokens: int


@dataclass
class Chat:
    """The turns so far and the answers to the last one.

    Attributes:
        messages: system message and turns, without an answer to the last one until the next turn is asked.
        candidates: the answers to the last turn, numbered from 1 for people; the first of the latest round goes on unless one is better.
    """

    sides: list[Side]
    settings: Settings
    messages: list[Message] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    _picked: int | None = None
    _num_rounds: int = 0
    _num_before: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        self._forget_answers()

    def ask(self, text: str, on_text: Callable[[int, str], None] | None = None) -> list[Candidate]:
        """The answers to the next turn, one of each side.

        Args:
            on_text: told the side's number and its text so far.
        """

        def change() -> None:
            self._settle()
            self.messages.append({"role": "user", "content": text})

        return self._turn(change, on_text)

    def retry(self, on_text: Callable[[int, str], None] | None = None) -> list[Candidate]:
        """More answers to the last turn, by another seed; the earlier ones can still be chosen.

        Raises:
            UserError: nothing was asked.
        """
        self._require_turn()
        return self._turn(lambda: None, on_text)

    def edit(self, text: str, on_text: Callable[[int, str], None] | None = None) -> list[Candidate]:
        """Answers to another wording of the last turn.

        Raises:
            UserError: nothing was asked.
        """
        self._require_turn()

        def change() -> None:
            self._forget_answers()
            self.messages = [*self.messages[:-1], {"role": "user", "content": text}]

        return self._turn(change, on_text)

    def back(self) -> None:
        """Forget the last turn with its answers.

        Raises:
            UserError: nothing was asked.
        """
        self._require_turn()
        self.messages.pop()
        self._forget_answers()
        if self.messages and self.messages[-1]["role"] == "assistant":  # the turn before is the last one again
            answer = self.messages.pop()
            self.candidates = [Candidate(1, self.sides[0].name, answer["content"], "stop", 0)]

    def prefer(self, number: int, over: int | None = None) -> dict[str, Any]:
        """The preference row that an answer is better than another; the conversation goes on with the better one.

        Args:
            number: of the better answer, from 1.
            over: of the worse one; with two answers, the other.

        Raises:
            UserError: there are no two answers, no such number, or the two are the same text.
        """
        count = len(self.candidates)
        if count < 2:
            raise UserError(
                "there are no two answers to choose from", mend="/retry asks for another one, --against base for a second model"
            )
        if over is None:
            if count > 2:
                raise UserError(f"there are {count} answers", expected="the better one and the worse one, as in /better 1 3")
            over = 3 - number
        if not (1 <= number <= count and 1 <= over <= count and number != over):
            raise UserError(f"{number} over {over}", expected=f"two different numbers from 1 to {count}")
        better, worse = self.candidates[number - 1], self.candidates[over - 1]
        if better.text.strip() == worse.text.strip() or not (better.text.strip() and worse.text.strip()):
            raise UserError("the two answers are the same, or one is empty: there is nothing to learn from them", mend="/retry")
        self._picked = number - 1
        return {
            "prompt": list(self.messages),
            "chosen": [{"role": "assistant", "content": better.text}],
            "rejected": [{"role": "assistant", "content": worse.text}],
        }

    def take_back(self) -> None:
        """No answer is the better one any more."""
        self._picked = None

    def conversation(self) -> list[Message]:
        """All turns, with the answer that would go on."""
        answer = self._going_on()
        return [*self.messages, *([{"role": "assistant", "content": answer.text}] if answer is not None else [])]

    def _going_on(self) -> Candidate | None:
        if not self.candidates:
            return None
        latest = [one for one in self.candidates if one.number > self._num_before]
        return self.candidates[self._picked] if self._picked is not None else latest[0]

    def _settle(self) -> None:
        self.messages = self.conversation()
        self._forget_answers()

    def _turn(self, change: Callable[[], None], on_text: Callable[[int, str], None] | None) -> list[Candidate]:
        """A turn that fails (a setting out of range, no memory, too long a text) was never asked: all is as it was before it.

        Two questions in a row would be no conversation.
        """
        before = list(self.messages), list(self.candidates), self._picked, self._num_rounds, self._num_before
        found: list[Candidate] = []
        try:
            change()
            found = self._answer(on_text)
        finally:
            if not found or any(one.finish == TOO_LONG for one in found):
                self.messages, self.candidates, self._picked, self._num_rounds, self._num_before = before
        return found

    @property
    def picked(self) -> int | None:
        """Number of the answer that was called the better one."""
        return None if self._picked is None else self.candidates[self._picked].number

    def _forget_answers(self) -> None:
        self.candidates, self._picked, self._num_rounds, self._num_before = [], None, 0, 0

    def _require_turn(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            raise UserError("nothing was asked yet", mend="type a question first")

    def _answer(self, on_text: Callable[[int, str], None] | None) -> list[Candidate]:
        seed, settings = self.settings.seed + self._num_rounds, self.settings
        if self._num_rounds and settings.temperature == 0:
            settings = replace(settings, temperature=RETRY_TEMPERATURE)
        self._num_rounds += 1
        found = []
        for number, side in enumerate(self.sides):
            heard = None if on_text is None else lambda text, number=number: on_text(number, text)
            answer = side.answer(self.messages, settings, seed=seed, on_text=heard)
            found.append(Candidate(len(self.candidates) + number + 1, side.name, answer.text, answer.finish, answer.num_tokens))
            if answer.finish in (STOPPED, TOO_LONG):
                break
        self._num_before = len(self.candidates)
        self.candidates += found
        self._picked = None
        return found


def withdraw_row(path: Path, row: dict[str, Any]) -> bool:
    """Take a row back that `append_row` has just added; False where it is no longer the file's last line, which then stays as it is.

    Raises:
        UserError: the file cannot be written.
    """
    line = _line_of(row)
    try:
        with open(path, "r+b") as file:
            content = file.read()
            if not content.endswith(line) or content[: -len(line)][-1:] not in (b"", b"\n"):
                return False
            file.truncate(len(content) - len(line))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    return True


def append_row(path: Path, row: dict[str, Any]) -> int:
    """Add a row to a file of JSON lines; how many rows it holds now.

    Raises:
        UserError: it cannot be written.
    """
    line = _line_of(row)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            file.seek(0)
            before = file.read()
            line = (b"" if before.endswith(b"\n") or not before else b"\n") + line  # its last line may be written by hand
            if file.write(line) != len(line):  # a full disk takes a part first
                file.truncate(len(before))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    return sum(1 for one in before.splitlines() if one.strip()) + 1


def _line_of(row: dict[str, Any]) -> bytes:
    line = json.dumps(row, ensure_ascii=False)
    line = line.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")  # readers that cut at them would tear the row
    return line.encode("utf-8", "replace") + b"\n"
