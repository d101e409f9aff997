"""Prompts that somebody rendered with the template before: recognised, and taken as they are, to the character."""

from __future__ import annotations

import re

from orpo.data.chat.ends import End
from orpo.data.chat.probe import TemplateFacts, leading_blanks
from orpo.data.chat.special import common_start, without_bos

_THINKING = re.compile("think|thought|reason", re.IGNORECASE)


class RenderedPrompts:
    """Rendered prompts of one template.

    Args:
        facts: what probing showed about the template.
    """

    def __init__(self, facts: TemplateFacts) -> None:
        self.facts = facts

    def is_rendered(self, prompt: str) -> bool:
        """Whether a text begins as a rendered conversation does, and ends where a user's turn ends or inside an answer that has begun."""
        facts, bare = self.facts, prompt.strip()
        if not bare.startswith(facts.openers):
            return False
        if facts.user_end and bare.endswith(facts.user_end):
            return True
        if not facts.answer_header or facts.answer_header not in bare:
            return False
        before, _, answer = bare.rpartition(facts.answer_header)
        is_open = not (facts.end.text.strip() and facts.end.text.strip() in answer)
        return is_open and (before.rstrip().endswith(facts.user_end) or not facts.user_end)

    def begun(self, prompt: str) -> str | None:
        """What stands behind the last header of an answer; None where the prompt ends before it."""
        facts = self.facts
        if facts.user_end and prompt.rstrip().endswith(facts.user_end) and facts.answer_header:
            return None
        end = facts.answer_header or facts.user_end
        return prompt.rpartition(end)[2] if end in prompt else None

    def prompt_text(self, prompt: str) -> str:
        """The given characters, with the beginning-of-text token once; and with an answer's header where the template knows no
        generation prompt that would have brought it."""
        facts = self.facts
        text = prompt
        if facts.pure_bos:
            text = facts.pure_bos + without_bos(
                prompt if not prompt.lstrip().startswith(facts.pure_bos) else prompt.lstrip(), facts.pure_bos
            )
        if self.begun(prompt) is not None:
            return text
        gap = facts.turn_gap.removeprefix(text[len(text.rstrip()) :])
        return text + gap + facts.answer_header + self.header_gap

    def gap(self, prompt: str) -> str:
        """What the template prints between this prompt and an answer: nothing, where the prompt has begun one in its own way."""
        facts, begun, end = self.facts, self.begun(prompt), self.facts.answer_header or self.facts.user_end
        behind = facts.before.rpartition(end)[2] if end else facts.before
        if begun is None:
            return behind.lstrip()
        is_exact = facts.generation is not None and prompt.endswith(facts.generation) and facts.before.startswith(facts.generation)
        if is_exact and facts.generation is not None:
            behind = facts.before[len(facts.generation) :]
        elif begun:
            return ""
        if not _THINKING.search(behind):
            return behind
        # A think block is somebody's answer to how the conversation goes on: what was given is not changed by one.
        return "" if is_exact else leading_blanks(behind)

    @property
    def header_gap(self) -> str:
        """The white space behind the header of an answer."""
        return leading_blanks(self.facts.before.rpartition(self.facts.answer_header)[2])

    def is_otherwise(self, prompt: str) -> bool:
        """Whether the prompt ends otherwise than the template's generation prompt."""
        return self.facts.generation is not None and not prompt.rstrip().endswith(self.facts.generation.rstrip())

    def whole(self, prompt: str, answer: str, end: End) -> str:
        """Prompt and answer up to the answer's end."""
        gap = self.gap(prompt)
        if gap.strip() and len(common_start([gap.lstrip(), answer.lstrip()])) > 2:
            gap = ""  # the answer brings its own header ("<|channel|>analysis" where the template has "<|channel|>final")
        return self.prompt_text(prompt) + gap + answer.removeprefix(gap) + end.text
