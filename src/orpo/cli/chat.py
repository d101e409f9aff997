"""Talk to a run or a model, in the terminal or in a page: orpo chat runs/my-run --against base

With --against both answer, side by side, and `/better 1` keeps the better answer as a preference row that `orpo train` reads.
/help lists the commands. With --prompt one turn is answered on stdout, and that is all. With --web it is a page in the browser, beside the
base where there is one, and the better answer is one click.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from orpo.inference.conversation import Candidate, Chat, Settings

NAME = "chat"
HELP = "talk to a run or a model, alone or beside its base, in the terminal or in a page"

COMMANDS = {
    "/retry": "answer the last turn again, by another seed",
    "/edit TEXT": "put the last turn in other words",
    "/back": "forget the last turn",
    "/better 1": "answer 1 is the better one: a row for training (/better 1 3: of more than two, 1 over 3)",
    "/save FILE": "write the conversation, as a row of messages",
    "/system TEXT": "another system message; forgets the conversation",
    "/reset": "forget the conversation",
    "/quit": "end (Ctrl-D too; Ctrl-C ends an answer, not the chat)",
}
_QUIT, _RESET = {"/quit", "/exit", "/q"}, {"/reset", "/new"}
_WIDE = 100
"""Columns from which two answers stand beside each other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a run's folder, a model's folder, a GGUF file, a hub id, or smollm2-135m-instruct")
    parser.add_argument("--against", help="a second model that answers too: base (a run's or an adapter's own), any model, or none")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--system", help="system message of the conversation")
    parser.add_argument("--preferences", type=Path, default=Path("preferences.jsonl"), help="where better answers go (preferences.jsonl)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="most tokens of an answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that together reach this (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, the same for both models (0)")
    parser.add_argument("--chat_template", help="chatml, none, or a file; unset: the model's own")
    parser.add_argument("--model_revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--web", action="store_true", help="a page in the browser, on this machine alone")
    parser.add_argument("--host", help="web: another address to listen at, such as 0.0.0.0; the page then asks for a token (127.0.0.1)")
    parser.add_argument("--port", type=int, help="web: the port, 0 for a free one (7860)")
    parser.add_argument("--guideline", type=Path, help="web: a text that says which answer is better, shown beside the answers")
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object on a line of stdout")


def run(args: argparse.Namespace) -> int:
    """Answer one prompt, or prompts until the user has enough."""
    from orpo.inference.conversation import Chat, Settings, sides_of
    from orpo.inference.ready import make_ready
    from orpo.system.console import say, stderr_console
    from orpo.system.process import quiet_libraries

    _check_flags(args)
    settings = Settings(args.system, args.max_new_tokens, args.temperature, args.top_p, args.seed)
    settings.check()
    if args.web:
        return _serve(args, settings)
    quiet_libraries()
    console = stderr_console()
    ready = make_ready(args.model, chat_template=args.chat_template, revision=args.model_revision)
    chat = Chat(sides_of(ready, args.model, args.against), settings)
    terminal = Terminal(chat, console, args.preferences, is_json=args.json)
    if args.prompt is not None:
        terminal.show(lambda on_text: chat.ask(args.prompt, on_text))
        return 0
    facts = ready.loaded.facts
    beside = f", beside {chat.sides[1].name}" if len(chat.sides) > 1 else ""
    say(console, f"{facts.name}: {facts.num_parameters / 1e6:,.1f} M parameters, {facts.device}{beside}. /help lists the commands.")
    return terminal.loop()


def _check_flags(args: argparse.Namespace) -> None:
    given = {"--host": args.host, "--port": args.port, "--guideline": args.guideline}
    for flag, value in given.items():
        if value is not None and not args.web:
            raise UserError(f"{flag} is for the page in the browser", where="orpo chat", mend=f"add --web, or leave {flag} away")
    for flag, value in {"--prompt": args.prompt, "--json": args.json or None}.items():
        if value is not None and args.web:
            raise UserError(f"{flag} is for the terminal", where="--web", mend=f"leave {flag} or --web away")


def _serve(args: argparse.Namespace, settings: Settings) -> int:
    """The page, until Ctrl-C. Address, guideline and packages are looked at before a model is loaded for nothing."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        from orpo.system.installing import pip_line

        raise UserError(f"the page needs {' and '.join(missing)}", where="--web", mend=pip_line("web"))
    from orpo.inference.conversation import default_base, sides_of
    from orpo.inference.ready import make_ready
    from orpo.playground.server import facts_of, open_socket, read_guideline, serve
    from orpo.playground.talks import Desk
    from orpo.system.console import say, stderr_console
    from orpo.system.process import quiet_libraries

    guideline = read_guideline(args.guideline)
    host = args.host or "127.0.0.1"
    place = open_socket(host, 7860 if args.port is None else args.port)
    quiet_libraries()
    console = stderr_console()
    say(console, f"loading {args.model}")
    ready = make_ready(args.model, chat_template=args.chat_template, revision=args.model_revision)
    sides = sides_of(ready, args.model, args.against or default_base(ready, args.model))
    desk = Desk(sides, settings, args.preferences)
    facts = ready.loaded.facts
    beside = f", beside {sides[1].name}" if len(sides) > 1 else ""
    title = f"{facts.name}: {facts.num_parameters / 1e6:,.1f} M parameters, {facts.device}{beside}"
    server, address = serve(desk, facts_of(desk, title, guideline), place, host)
    say(console, title)
    print(address, flush=True)
    say(console, "Open this address in a browser; Ctrl-C ends the chat.")
    server.run(sockets=[place])
    return 0


class Terminal:
    """Lines typed and answers shown. Answers go to stdout, everything else to stderr."""

    def __init__(self, chat: Chat, console: Console, preferences: Path, *, is_json: bool = False) -> None:
        self.chat, self.console, self.preferences, self.is_json = chat, console, preferences, is_json

    def loop(self) -> int:
        """Until the user has enough."""
        while True:
            try:
                # input() would write its prompt to stdout, which is kept for answers where it is no terminal.
                print("> ", end="", file=sys.stderr, flush=True)
                line = input().strip()
            except EOFError:
                print(file=sys.stderr)
                return 0
            if line.lower() in _QUIT:
                return 0
            try:
                self._take(line)
            except UserError as error:
                self._say(str(error))

    def _take(self, line: str) -> None:
        """One line: a command, or the next turn (a second slash lets a turn begin with one)."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line:
            return
        if not line.startswith("/") or line.startswith("//"):
            self.show(lambda on_text: self.chat.ask(line.removeprefix("/") if line.startswith("//") else line, on_text))
        elif name.lower() in _RESET:
            self.chat.reset()
            self._say("(forgotten)")
        elif name == "/system":
            self._set_system(rest)
        elif name == "/retry":
            self.show(self.chat.retry)
        elif name == "/edit" and rest:
            self.show(lambda on_text: self.chat.edit(rest, on_text))
        elif name == "/back":
            self.chat.back()
            self._say(f"(forgotten; {sum(message['role'] == 'user' for message in self.chat.messages)} turns left)")
        elif name == "/better":
            self._prefer(rest)
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        else:
            self._help(line)

    def _help(self, line: str) -> None:
        if line.lower() not in ("/help", "/h", "/?"):
            self._say(f"{line.split()[0]} is no command, or lacks its text; // begins a turn with a slash")
        for name, meaning in COMMANDS.items():
            self._say(f"  {name:<13} {meaning}")

    def _set_system(self, text: str) -> None:
        from dataclasses import replace

        self.chat.settings = replace(self.chat.settings, system=text or None)
        self.chat.reset()
        self._say("(a new conversation)")

    def _prefer(self, numbers: str) -> None:
        from orpo.inference.conversation import append_row

        try:
            picked = [int(number) for number in numbers.replace(",", " ").split()]
        except ValueError:
            picked = []
        if not 1 <= len(picked) <= 2:
            raise UserError(f"/better {numbers}", expected="the number of the better answer, as in /better 1")
        count = append_row(self.preferences, self.chat.prefer(*picked))
        self._say(f"({self.preferences}: {count} rows; orpo train … --dataset_name {self.preferences})")

    def _save(self, path: Path) -> None:
        from orpo.inference.conversation import append_row

        messages = self.chat.conversation()
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("there is no conversation yet", mend="type a question first")
        count = append_row(path, {"messages": messages})
        self._say(f"({path}: {count} conversations)")

    def show(self, make: Callable[[Any], list[Candidate]]) -> None:
        """Answers as they come: beside each other in a wide terminal, below each other otherwise."""
        is_terminal = sys.stdout.isatty()
        if self.is_json:
            self._show_json(make)
        elif is_terminal and len(self.chat.sides) > 1 and self.console.width >= _WIDE:
            self._show_columns(make)
        else:
            self._show_lines(make, is_streaming=is_terminal)

    def _show_json(self, make: Callable[[Any], list[Candidate]]) -> None:
        from orpo.system.console import print_json

        for answer in make(None):
            facts: dict[str, Any] = {"prompt": self.chat.messages[-1]["content"] if self.chat.messages else None, "text": answer.text}
            facts |= {"num_tokens": answer.num_tokens, "finish": answer.finish}
            print_json(facts | ({"model": answer.side, "number": answer.number} if len(self.chat.sides) > 1 else {}))

    def _show_lines(self, make: Callable[[Any], list[Candidate]], *, is_streaming: bool) -> None:
        from orpo.inference.conversation import STOPPED
        from orpo.system.console import printable

        shown: dict[int, str] = {}

        def on_text(side: int, text: str) -> None:
            text = printable(text).lstrip()
            if side not in shown:
                self._heading(side, len(self.chat.candidates) + side + 1)
                shown[side] = ""
            if text.startswith(shown[side]):  # a tokenizer may clean what it has decoded: then the rest comes at the end
                print(text[len(shown[side]) :], end="", flush=True)
                shown[side] = text

        for side, answer in enumerate(make(on_text if is_streaming else None)):
            text = printable(answer.text).strip()
            if side not in shown:
                self._heading(side, answer.number)
                print(text, end="")
            elif text.startswith(shown[side]):
                print(text[len(shown[side]) :], end="")
            print(_ending(answer.finish), flush=True)
            if answer.finish == STOPPED:
                self._say("(stopped; the chat goes on)")

    def _heading(self, side: int, number: int) -> None:
        """Numbers where there is something to choose from."""
        if len(self.chat.sides) > 1 or number > 1:
            print(("\n" if side else "") + f"[{number}] {self.chat.sides[side].name}", flush=True)

    def _show_columns(self, make: Callable[[Any], list[Candidate]]) -> None:
        from rich.console import Console
        from rich.live import Live

        from orpo.system.console import printable

        texts = ["" for _ in self.chat.sides]
        out = Console(highlight=False)

        def titles(first: int) -> list[str]:
            return [f"[{first + number}] {side.name}" for number, side in enumerate(self.chat.sides)]

        with Live(console=out, transient=True, auto_refresh=False) as live:  # a picture of its last lines; whole once it is there

            def on_text(side: int, text: str) -> None:
                texts[side] = printable(text).strip()
                live.update(_columns(titles(len(self.chat.candidates) + 1), texts), refresh=True)

            answers = make(on_text)
        for number, answer in enumerate(answers):
            texts[number] = printable(answer.text).strip() + _ending(answer.finish)
        out.print(_columns(titles(answers[0].number), texts))

    def _say(self, text: str) -> None:
        from orpo.system.console import say

        say(self.console, text)


def _columns(titles: list[str], texts: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for title in titles:
        table.add_column(Text(title), ratio=1)
    table.add_row(*[Text(text) for text in texts])
    return table


def _ending(finish: str) -> str:
    return {
        "length": " …",
        "stopped": " …",
        "prompt_too_long": "(the conversation is longer than the model's context; /reset forgets it)",
    }.get(finish, "")
