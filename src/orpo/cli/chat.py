"""Talk to a run or a model in the terminal: orpo chat runs/my-run

/reset forgets the conversation, /quit ends it. With --prompt one answer is printed on stdout, and that is all.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from orpo.inference.generate import Answer
    from orpo.inference.ready import Ready

NAME = "chat"
HELP = "talk to a run or a model in the terminal"

_QUIT, _RESET = {"/quit", "/exit", "/q"}, {"/reset", "/new"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a run's folder, a model's folder, a GGUF file, a hub id, or smollm2-135m-instruct")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--system", help="system message of the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="most tokens of an answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that together reach this (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--chat_template", help="chatml, none, or a file; unset: the model's own")
    parser.add_argument("--model_revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object on a line of stdout")


def run(args: argparse.Namespace) -> int:
    """Answer one prompt, or prompts until the user has enough."""
    from orpo.inference.ready import make_ready
    from orpo.system.console import say, stderr_console
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    console = stderr_console()
    ready = make_ready(args.model, chat_template=args.chat_template, revision=args.model_revision)
    conversation = Conversation(ready, args)
    if args.prompt is not None:
        conversation.print_answer(args.prompt)
        return 0
    facts = ready.loaded.facts
    say(console, f"{facts.name}: {facts.num_parameters / 1e6:,.1f} M parameters, {facts.device}. /reset forgets, /quit ends.")
    return _loop(conversation, console)


class Conversation:
    """The turns so far. A model without a chat template sees the last prompt alone, as plain text."""

    def __init__(self, ready: Ready, args: argparse.Namespace) -> None:
        self.ready, self.args = ready, args
        self.is_plain = ready.encoder.template_name == "none"
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def print_answer(self, prompt: str) -> None:
        """The answer on stdout: as text that cannot steer the terminal, or as an object with how it ended."""
        from orpo.system.console import print_json, printable

        answer = self.answer(prompt)
        if self.args.json:
            print_json({"prompt": prompt, **answer.to_dict()})
        elif answer.finish == "prompt_too_long":
            print("(the conversation is longer than the model's context; /reset forgets it)", flush=True)
        else:
            print(printable(answer.text.strip() + (" …" if answer.finish == "length" else "")), flush=True)

    def answer(self, prompt: str) -> Answer:
        """The model's answer, which joins the conversation."""
        from orpo.inference.generate import generate

        self.messages.append({"role": "user", "content": prompt})
        (answer,) = generate(
            self.ready.loaded.model,
            self.ready.loaded.tokenizer,
            self.ready.encoder,
            [prompt if self.is_plain else tuple(self.messages)],
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            seed=self.args.seed,
            compute_dtype=self.ready.compute_dtype,
        )
        if answer.finish == "prompt_too_long":
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": answer.text})
        return answer


def _loop(conversation: Conversation, console: Console) -> int:
    from orpo.system.console import say

    while True:
        try:
            # input() would write its prompt to stdout, which is kept for answers where it is no terminal.
            print("> ", end="", file=sys.stderr, flush=True)
            prompt = input().strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        if prompt.lower() in _QUIT:
            return 0
        if prompt.lower() in _RESET:
            conversation.reset()
            say(console, "(forgotten)")
        elif prompt:
            conversation.print_answer(prompt)
