"""A grid of rows over every chat template, and an oracle of transformers' own rendering that says what each must become.

The oracle shares no code with the encoder: it renders with `apply_chat_template`, looks for the row's own words in what comes out, and
follows the definition of an answer's end word by word.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orpo.data.template import TemplateEncoder
from orpo.data.types import Dropped, Message, Preference, Text, TokenGroup, Where

WHERE = Where("rows.jsonl", 0, 1)
FOLLOW_UP = "Followupquestionqv"
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of one city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    },
)
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "get_weather", "arguments": {"city": "Trondheim", "when": {"day": 7071}}},
}
TOLD = {"text_not_printed", "reasoning_not_printed", "tools_not_printed", "calls_not_printed", "name_not_printed"}
"""Notes that say that something of a row is not trained."""


@dataclass(frozen=True)
class Cell:
    """One row of the grid.

    Attributes:
        own: words of the answer itself; a row whose template does not print them may not be trained.
        others: further words, which must be printed or noted.
        kind: "messages", "prefill" (the prompt ends in the answer's beginning) or "rendered" (the prompt is text from the template).
    """

    name: str
    prompt: tuple[Message, ...]
    answer: Text
    own: tuple[str, ...]
    others: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    kind: str = "messages"
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """exact, refused (rightly), wrongly refused, wrong, or silent (something is left out and nobody is told)."""

    outcome: str
    detail: str = ""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def assistant(text: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": text, **fields}


ONE = (user("Which wind blows?"),)
SEVERAL = (*ONE, assistant("A gentle westerly."), user("And tomorrow?"))
WITH_SYSTEM = (system("Be very brief."), *SEVERAL)


def grid(special: list[str]) -> Iterator[Cell]:
    """The rows; `special` are the template's own tokens."""
    for name, prompt in (("one", ONE), ("several", SEVERAL), ("system", WITH_SYSTEM), ("empty_system", (system(""), *ONE))):
        others = tuple(m["content"] for m in prompt if m["content"])
        for label, text in (
            ("plain", "Yes, a breeze.\n\nIt is fine."),
            ("blank_front", "  Rather windy"),
            ("newline_front", "\n\nRather windy"),
            ("blank_end", "Rather windy  "),
            ("newline_end", "Rather windy\n\n"),
            ("one", "7"),
            ("emoji", "😀👩‍🚀 fine"),
            ("rtl", "שלום, مرحبا"),
            ("think_tags", "<think>\nBecause clouds moved.\n</think>\n\nWindy."),
        ):
            if name in ("one", "several") or label in ("plain", "think_tags"):
                is_think = label == "think_tags"
                own = ("Windy.",) if is_think else (text.strip(),)
                yield Cell(f"{name}/{label}", prompt, text, own, (*others, *(("Because clouds moved.",) if is_think else ())))
        reasoning = {"reasoning_content": "Because clouds moved."}
        yield Cell(f"{name}/reasoning", prompt, (assistant("Windy.", **reasoning),), ("Windy.",), (*others, "Because clouds moved."))
        call_words = ("get_weather", "Trondheim", "7071")
        tool_words = (*others, "Weather of one city", "Name of the city")
        yield Cell(f"{name}/tools", prompt, "No idea.", ("No idea.",), tool_words, TOOLS)
        yield Cell(f"{name}/call", prompt, (assistant("", tool_calls=[CALL]),), call_words, tool_words, TOOLS)
        yield Cell(
            f"{name}/call_text", prompt, (assistant("Let me look.", tool_calls=[CALL]),), ("Let me look.", *call_words), tool_words, TOOLS
        )
    yield Cell("one/thinking_key", ONE, (assistant("Windy.", thinking="Because clouds moved."),), ("Windy.",), ("Because clouds moved.",))
    yield Cell("one/think_only", ONE, "<think>\nBecause clouds moved.\n</think>", ("Because clouds moved.",))
    called = (
        *ONE,
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "Storm", "name": "get_weather", "tool_call_id": "call00001"},
    )
    yield Cell("after_call", called, "A storm comes.", ("A storm comes.",), ("Which wind blows?", "Trondheim", "7071", "Storm"), TOOLS)
    named = ({**ONE[0], "name": "Philippa"},)
    yield Cell("named", named, "Yes.", ("Yes.",), ("Which wind blows?", "Philippa"))
    reasoned = (*ONE, assistant("Westerly.", reasoning_content="Maps say so."), user("Sure?"))
    yield Cell("earlier_reasoning", reasoned, "Yes, quite.", ("Yes, quite.",), ("Westerly.", "Maps say so.", "Sure?"))
    for token in special[:6]:
        words: tuple[str, ...] = ("here",) if token == "</think>" else ("Say", "here")
        yield Cell(f"token_inside {token}", ONE, f"Say {token} here", words, ("Say",))
        yield Cell(f"token_asked {token}", (user(f"What is {token} for?"),), "A mark.", ("A mark.",))
    for variables in ({"enable_thinking": False}, {"enable_thinking": True}):
        label = f"thinking={variables['enable_thinking']}"
        yield Cell(f"{label}/plain", ONE, "Rather windy.", ("Rather windy.",), ("Which wind blows?",), variables=variables)
        answer = (assistant("Windy.", reasoning_content="Because clouds moved."),)
        yield Cell(f"{label}/reasoning", ONE, answer, ("Windy.",), ("Because clouds moved.",), variables=variables)
        yield Cell(f"rendered/{label}", ONE, "Rather windy.", ("Rather windy.",), kind="rendered", variables=variables)
    for name, prompt in (("one", ONE), ("several", SEVERAL), ("system", WITH_SYSTEM)):
        yield Cell(f"rendered/{name}", prompt, "Rather windy.", ("Rather windy.",), kind="rendered")
        yield Cell(f"rendered/{name}_newline", prompt, "\nRather windy.\n", ("Rather windy.",), kind="rendered")
        prefilled = (*prompt, assistant("The wind: "))
        yield Cell(f"prefill/{name}", prefilled, "Rather windy.", ("The wind:", "Rather windy."), kind="prefill")
    open_think = (*ONE, assistant("<think>\nClouds"))
    yield Cell("prefill/think", open_think, " moved.\n</think>\n\nWindy.", ("Windy.",), ("Clouds", "moved."), kind="prefill")


class Oracle:
    """What one template makes of the cells, by transformers alone."""

    def __init__(self, encoder: TemplateEncoder) -> None:
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.is_parts = bool(encoder.facts and encoder.facts.wants_parts)
        added = self.tokenizer.added_tokens_decoder.values()
        self.special = re.compile("|".join(re.escape(str(t)) for t in sorted(added, key=lambda t: -len(str(t))) if str(t).strip()))
        self.is_special = {str(token): token.special for token in added}
        # Templates want calls with or without a content beside them, and arguments as an object or as JSON text.
        ask = Cell("call", ONE, "", ())
        for self.has_no_content, self.is_text in ((False, False), (True, False), (False, True), (True, True)):
            with contextlib.suppress(Exception):
                if "Trondheim" in self.render((*ONE, assistant("", tool_calls=[CALL])), ask):
                    return
        self.has_no_content = self.is_text = False

    def render(self, messages: tuple[Message, ...], cell: Cell, **options: Any) -> str:
        shown = [self._in_form(message) for message in messages]
        return str(
            self.tokenizer.apply_chat_template(
                shown, tools=list(cell.tools) if cell.tools else None, tokenize=False, **cell.variables, **options
            )
        )

    def _in_form(self, message: Message) -> Message:
        call = message.get("tool_calls")
        if call and self.has_no_content and not message["content"]:
            message = {**message, "content": None}
        if call and self.is_text:
            functions = [{**c["function"], "arguments": json.dumps(c["function"]["arguments"])} for c in call]
            message = {**message, "tool_calls": [{**c, "function": f} for c, f in zip(call, functions, strict=True)]}
        is_text = self.is_parts and isinstance(message.get("content"), str)
        return {**message, "content": [{"type": "text", "text": message["content"]}]} if is_text else message

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_up_to(self, text: str, end: int) -> list[int]:
        """The ids of a text up to a character."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [index for index, (_, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True) if stop <= end]

    def end_of_answer(self, messages: tuple[Message, ...], cell: Cell, text: str, last_word: str) -> tuple[int, bool]:
        """Where a whole rendering's answer ends (behind its terminator), and whether the template prints a terminator at all."""
        start = text.rfind(last_word) + len(last_word)
        tail = text[start:]
        is_call = bool(messages[-1].get("tool_calls"))
        follow: Message = (
            {"role": "tool", "content": FOLLOW_UP, "name": "get_weather", "tool_call_id": "call00001"} if is_call else user(FOLLOW_UP)
        )
        try:
            later = self.render((*messages, follow), cell)
        except Exception:
            later = ""
        inner = later.partition(FOLLOW_UP)[0]
        inner_tail = inner[inner.rfind(last_word) + len(last_word) :] if last_word in inner else ""
        matches = [
            m for m in self.special.finditer(tail) if m.group() != "</think>" and (not is_call or self.is_special.get(m.group(), True))
        ]
        shared = [match.end() for match in matches if inner_tail.startswith(tail[: match.end()])]
        ends = shared or [match.end() for match in matches]
        if ends:
            return start + ends[-1], True
        behind = self.render((*messages[:-1], assistant("Zzqotheranswer")), cell).partition("Zzqotheranswer")[2]
        return len(text) - len(behind) + len(behind.rstrip()), False


def is_in(word: str, text: str) -> bool:
    """Whether a text shows a word, white space and JSON's escapes aside."""
    bare = "".join(text.split())
    return any("".join(form.split()) in bare for form in (word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]))


def answer_message(cell: Cell) -> Message:
    prefill = cell.prompt[-1]["content"] if cell.kind == "prefill" else ""
    return assistant(prefill + cell.answer) if isinstance(cell.answer, str) else dict(cell.answer[0])


def judge(oracle: Oracle, cell: Cell) -> Verdict | None:
    """What became of a cell; None where transformers cannot make the row that it asks for."""
    messages = (*(cell.prompt[:-1] if cell.kind == "prefill" else cell.prompt), answer_message(cell))
    encoder = oracle.encoder
    try:
        text = oracle.render(messages, cell)
        generation = oracle.render(messages[:-1], cell, add_generation_prompt=True)
    except Exception:
        text = generation = ""
    if not text and cell.kind == "rendered":
        return None
    prompt: Text = generation if cell.kind == "rendered" else cell.prompt
    columns = {"chat_template_kwargs": cell.variables} if cell.variables else {}
    row = Preference(prompt, (cell.answer,), (), WHERE, cell.tools, **columns)
    result = encoder.encode(row)
    if not text:
        return Verdict("refused" if isinstance(result, Dropped) else "wrong", "transformers cannot render it")
    if cell.kind == "rendered":
        return _judge_rendered(oracle, cell, messages, prompt, text, result)
    own_region = text[len(_shared(oracle, messages, cell, text)) :]
    missing = [word for word in cell.own if not is_in(word, own_region)]
    if isinstance(result, Dropped):
        return Verdict("refused" if missing else "wrongly refused", f"{result.reason}: {result.detail}")
    if missing:
        return Verdict("silent", f"not printed: {missing}")
    return _judge_group(oracle, cell, messages, text, generation, result)


def _shared(oracle: Oracle, messages: tuple[Message, ...], cell: Cell, text: str) -> str:
    """What the rendering has in common with that of another answer: the prompt and its header."""
    other = oracle.render((*messages[:-1], assistant("Zzqotheranswer")), cell)
    size = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[:size]


def _judge_group(oracle: Oracle, cell: Cell, messages: tuple[Message, ...], text: str, generation: str, group: TokenGroup) -> Verdict:
    tokenizer = oracle.tokenizer
    prompt_ids, response = group.prompt_ids.tolist(), group.response_ids[0].tolist()
    said: tuple[str, ...] = (cell.answer, cell.answer.strip()) if isinstance(cell.answer, str) else ()
    last_word = max((word for word in (*said, *cell.own) if word in text), key=lambda word: text.rfind(word) + len(word), default="")
    end, is_printed = oracle.end_of_answer(messages, cell, text, last_word)
    expected = oracle.ids_up_to(text, end) if is_printed else [*oracle.ids(text[:end]), tokenizer.eos_token_id]
    if [*prompt_ids, *response] != expected:
        return Verdict("wrong", f"{tokenizer.decode(expected)[-90:]!r} expected, got {tokenizer.decode([*prompt_ids, *response])[-90:]!r}")
    masked = masked_end(oracle, cell, messages)
    if masked is not None and is_printed and masked[1] >= 0:
        # Of a call's end the mask may leave out the token with which the tool's turn begins, where a model stops.
        is_call = bool(messages[-1].get("tool_calls"))
        # The mask may go on behind the terminator, to what stands only at the end of a text; to nothing else.
        beyond = tokenizer.decode(masked[0][len(expected) : masked[1] + 1])
        if masked[1] < len(expected) - 1 - is_call or oracle.special.sub("", beyond).strip():
            return Verdict("wrong", f"the template's own mask ends {tokenizer.decode(masked[0][: masked[1] + 1])[-60:]!r}")
    told = set(group.notes) & TOLD
    whole = tokenizer.decode(expected)
    unseen = [word for word in cell.others if not is_in(word, whole)]
    if unseen and not told:
        return Verdict("silent", f"not printed: {unseen}")
    generation_ids, full_ids = oracle.ids(generation), oracle.ids(text)
    shown = tokenizer.decode(prompt_ids)
    if cell.kind == "prefill":
        is_right = unseen or (
            is_in(cell.prompt[-1]["content"], shown) and not is_in(cell.answer if isinstance(cell.answer, str) else "", shown)
        )
        return Verdict("exact") if is_right else Verdict("wrong", f"the prompt ends {shown[-60:]!r}")
    is_answer_inside = any(
        is_in(word, shown[shown.rfind(str(cell.prompt[-1]["content"])) + len(cell.prompt[-1]["content"]) :]) for word in cell.own
    )
    if is_answer_inside or not (unseen or is_in(cell.prompt[-1]["content"], shown)):
        return Verdict("wrong", f"the prompt ends {shown[-60:]!r}")
    is_supported = generation != oracle.render(messages[:-1], cell)
    if is_supported and full_ids[: len(generation_ids)] == generation_ids and prompt_ids != generation_ids and encoder_trains_it(oracle):
        return Verdict("wrong", f"the prompt ends {shown[-60:]!r}, not {generation[-60:]!r}")
    return Verdict("exact")


def masked_end(oracle: Oracle, cell: Cell, messages: tuple[Message, ...]) -> tuple[list[int], int] | None:
    """The ids of a whole conversation and where the last token stands that the template's own mask gives to its last answer; None where
    the template marks no answers."""
    if "endgeneration" not in str(oracle.tokenizer.chat_template):
        return None
    shown = [oracle._in_form(message) for message in messages]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, **cell.variables}
    found = oracle.tokenizer.apply_chat_template(shown, tools=list(cell.tools) if cell.tools else None, **options)
    mask = found["assistant_masks"]
    return list(found["input_ids"]), max((i for i, is_answer in enumerate(mask) if is_answer), default=-1)


def encoder_trains_it(oracle: Oracle) -> bool:
    """Whether the generation prompt can be trained at all: some answers' first characters merge with its last."""
    return bool(oracle.encoder.facts and oracle.encoder.facts.boundary == "generation_prompt")


def _judge_rendered(oracle: Oracle, cell: Cell, messages: tuple[Message, ...], prompt: Text, text: str, result: Any) -> Verdict:
    """The given characters, then the answer's, then the end that the template has for answers."""
    given, answer, word = str(prompt), str(cell.answer), cell.own[0]
    if isinstance(result, Dropped):
        return Verdict("wrongly refused", f"{result.reason}: {result.detail}")
    plain = (*messages[:-1], assistant(word))
    text = oracle.render(plain, cell)
    end, is_printed = oracle.end_of_answer(plain, cell, text, word)
    ending = text[text.rfind(word) + len(word) : end] if is_printed else ""
    # What the template itself prints between its generation prompt and an answer may stand there: a blank, a channel; no think block.
    before = text[: text.rfind(word)]
    gap = before[len(given) :] if text.startswith(given) else before.rpartition(given[-12:])[2] if given[-12:] in before else ""
    if re.search("think|thought", gap):
        gap = ""
    candidates = [given + between + answer + ending for between in {"", gap}]
    wanted = [[*oracle.ids(candidate), *([] if is_printed else [oracle.tokenizer.eos_token_id])] for candidate in candidates]
    ids = [*result.prompt_ids.tolist(), *result.response_ids[0].tolist()]
    if ids in wanted:
        return Verdict("exact")
    return Verdict("wrong", f"{candidates[0][-90:]!r} expected, got {oracle.tokenizer.decode(ids)[-90:]!r}")
