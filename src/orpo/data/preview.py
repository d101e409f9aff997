"""What the model will see of a row, token by token: where each token comes from, and which terms of the loss it counts in.

The ids are those of training (`TemplateEncoder.encode`). What of them the chat template wrote is found by looking up the row's own texts in
the decoded ids, so it is right for templates whose headers are ordinary words, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orpo.data.rows.messages import as_messages
from orpo.data.types import NOTES, REASONS, Dropped, Preference, Text, TokenGroup

Role = Literal["template", "prompt", "chosen", "rejected", "eos"]
ROLES: dict[Role, str] = {
    "template": "written by the chat template",
    "prompt": "prompt",
    "chosen": "chosen answer",
    "rejected": "rejected answer",
    "eos": "end of the turn",
}


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_SHORTEST_PART = 8
"""Characters of a trimmed text that have to be found for them to count as a part of it."""


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token.

    Attributes:
        text: what it adds to the decoded text; empty where a character is spread over several tokens and not complete yet.
        counts_in_nll: it is predicted in the next-token loss.
        counts_in_odds: it is part of the mean log-probability that the odds ratio is made of.
    """

    id: int
    text: str
    role: Role
    counts_in_nll: bool
    counts_in_odds: bool


@dataclass(frozen=True, slots=True)
class ShownSegment:
    """The prompt, or one response.

    Attributes:
        name: "prompt", "chosen", "rejected", "chosen 2", … or "answer (SFT only)".
        is_cut: tokens are missing at its end (of an answer), or somewhere in it (of a prompt).
    """

    name: str
    tokens: tuple[TokenView, ...]
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class RowView:
    """A row as the model sees it, or why it does not.

    Attributes:
        place: file and line.
        segments: prompt first; empty for a dropped row.
        notes: what was done to it, in words.
        dropped: the reason in words, or None.
    """

    place: str
    segments: tuple[ShownSegment, ...] = ()
    notes: tuple[str, ...] = ()
    dropped: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt once and each response once."""
        return sum(len(segment.tokens) for segment in self.segments)


def view_row(item: Preference | Dropped, encoder: Any, *, nll_scope: str = "sequence") -> RowView:
    """One row as training would have it.

    Args:
        item: from `orpo.data.formats`.
        encoder: a `TemplateEncoder`.
        nll_scope: "sequence" (prompt and chosen answer count in the next-token loss) or "response" (the chosen answer alone).
    """
    if isinstance(item, Dropped):
        return _view_dropped(item)
    group = encoder.encode(item)
    if isinstance(group, Dropped):
        return _view_dropped(group)
    return _view_group(item, group, encoder.tokenizer, encoder.generation(), counts_prompt=nll_scope == "sequence")


def _view_dropped(dropped: Dropped) -> RowView:
    detail = f" ({dropped.detail})" if dropped.detail else ""
    return RowView(str(dropped.where), dropped=f"{dropped.reason}: {REASONS.get(dropped.reason, '')}{detail}")


def _note(code: str, generation: dict[str, Any] | None) -> str:
    """A note in words; that of the two prompts with both of them."""
    text = NOTES.get(code, code.replace("_", " "))
    if code != "other_generation_prompt" or generation is None:
        return text
    return f"{text}: it ends {generation['trained']!r} where that one ends {generation['generation']!r}"


def _view_group(
    preference: Preference, group: TokenGroup, tokenizer: Any, generation: dict[str, Any] | None, *, counts_prompt: bool
) -> RowView:
    notes = tuple(_note(note, generation) for note in group.notes)
    prompt_ids = group.prompt_ids.tolist()
    pieces = token_texts(tokenizer, prompt_ids)
    is_content = _content_mask(pieces, [message["content"] for message in as_messages(preference.prompt, "user")])
    prompt = tuple(
        TokenView(i, text, "prompt" if known else "template", counts_prompt and place > 0, False)
        for place, (i, text, known) in enumerate(zip(prompt_ids, pieces, is_content, strict=True))
    )
    segments = [ShownSegment("prompt", prompt, is_cut="prompt_trimmed" in group.notes)]
    winners = {i for i, _ in group.pairs}
    for index, ids in enumerate(group.response_ids):
        is_chosen = index in winners or not group.pairs
        segments.append(
            ShownSegment(
                _name(index, group, winners),
                _answer(tokenizer, prompt_ids, ids.tolist(), preference.responses, group.is_ended[index], is_chosen, bool(group.pairs)),
                is_cut=not group.is_ended[index],
            )
        )
    return RowView(str(group.where), tuple(segments), notes, columns=dict(group.columns))


def _name(index: int, group: TokenGroup, winners: set[int]) -> str:
    if not group.pairs:
        return "answer (next-token loss only)"
    if len(group.response_ids) == 2:
        return "chosen" if index in winners else "rejected"
    over = [str(j + 1) for i, j in group.pairs if i == index]
    under = [str(i + 1) for i, j in group.pairs if j == index]
    told = [*([f"chosen over {', '.join(over)}"] if over else []), *([f"rejected for {', '.join(under)}"] if under else [])]
    return f"answer {index + 1}: {'; '.join(told)}"


def _answer(
    tokenizer: Any, prompt_ids: list[int], ids: list[int], texts: Sequence[Text], is_ended: bool, is_chosen: bool, has_pairs: bool
) -> tuple[TokenView, ...]:
    pieces = token_texts(tokenizer, ids, before=prompt_ids[-8:])
    whole = "".join(pieces)
    contents = max(([m["content"] for m in as_messages(text, "assistant")] for text in texts), key=lambda c: _num_found(whole, c))
    mask = _content_mask(pieces, contents)
    role: Role = "chosen" if is_chosen else "rejected"
    roles: list[Role] = [role if known else "template" for known in mask]
    if is_ended and roles:
        roles[-1] = "eos"
    return tuple(TokenView(i, text, r, is_chosen, has_pairs) for i, text, r in zip(ids, pieces, roles, strict=True))


def token_texts(tokenizer: Any, ids: list[int], before: Sequence[int] = ()) -> list[str]:
    """What each token adds to the decoded text; the pieces joined are that text.

    Args:
        before: ids in front, decoded with the others where the tokenizer reads the first token of a text in another way.
    """

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead = list(before)
    start = len(decode(lead)) if lead else 0
    whole = decode(lead + ids)
    ends, end = [], start
    for number in range(1, len(ids) + 1):
        # The beginning of a character that is not complete decodes to U+FFFD, which is no prefix of the whole text.
        end = max(end, _common_length(decode(lead + ids[:number]), whole))
        ends.append(end)
    if ends:
        ends[-1] = len(whole)
    return [whole[a:b] for a, b in zip([start, *ends], ends, strict=False)]


def _common_length(first: str, second: str) -> int:
    """Characters that two texts have in common at their beginning."""
    most = min(len(first), len(second))
    return next((place for place in range(most) if first[place] != second[place]), most) if first[:most] != second[:most] else most


def _content_mask(pieces: Sequence[str], contents: Sequence[str]) -> list[bool]:
    """Which pieces hold text of the row.

    The contents are looked up from the last to the first: what a length policy takes away is taken from the beginning of a conversation,
    so the last ones are there.
    """
    whole = "".join(pieces)
    is_known = [False] * len(whole)
    limit = len(whole)
    for content in reversed(contents):
        start, end = _find(whole, content, limit)
        is_known[start:end] = [True] * (end - start)
        limit = start if end > start else limit
    mask: list[bool] = []
    place = 0
    for piece in pieces:
        mask.append(any(is_known[place : place + len(piece)]) if piece else bool(mask and mask[-1]))
        place += len(piece)
    return mask


def _find(whole: str, content: str, limit: int) -> tuple[int, int]:
    """Where a content stands last before `limit`: whole, without its outer white space, or, where it was trimmed, a long end or beginning
    of it. A place that is set off from its neighbours goes before one inside a word, so that "is" is not found in "assistant".
    """
    for text in filter(None, (content, content.strip())):
        start = inside = whole.rfind(text, 0, limit)
        while start >= 0 and not _is_set_off(whole, start, start + len(text)):
            start = whole.rfind(text, 0, start + len(text) - 1)
        start = start if start >= 0 else inside
        if start >= 0:
            return start, start + len(text)
    start, end = max(
        (_longest(whole, content.strip(), limit, from_end) for from_end in (True, False)), key=lambda found: found[1] - found[0]
    )
    return (start, end) if end - start >= min(_SHORTEST_PART, len(content)) else (limit, limit)


def _is_set_off(whole: str, start: int, end: int) -> bool:
    return not (whole[start - 1 : start].isalnum() and start > 0) and not whole[end : end + 1].isalnum()


def _longest(whole: str, content: str, limit: int, from_end: bool) -> tuple[int, int]:
    """The longest end (or beginning) of a content that stands in the text: if a long one does, every shorter one does."""
    low, high = 0, len(content)
    while low < high:
        middle = (low + high + 1) // 2
        part = content[-middle:] if from_end else content[:middle]
        low, high = (middle, high) if whole.find(part, 0, limit) >= 0 else (low, middle - 1)
    if low == 0:
        return limit, limit
    start = whole.rfind(content[-low:] if from_end else content[:low], 0, limit)
    return start, start + low


def _num_found(whole: str, contents: Sequence[str]) -> int:
    """Characters of the contents that stand in the text."""
    return sum(end - start for start, end in (_find(whole, content, len(whole)) for content in contents))


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens that are alike in all that is shown."""

    tokens: tuple[TokenView, ...]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def role(self) -> Role:
        return self.tokens[0].role

    @property
    def terms(self) -> str:
        """`NLL`, `OR`, `NLL+OR` or `not counted`."""
        first = self.tokens[0]
        names = [name for name, counts in (("NLL", first.counts_in_nll), ("OR", first.counts_in_odds)) if counts]
        return "+".join(names) or "not counted"


def runs(tokens: Sequence[TokenView]) -> Iterator[TokenRun]:
    """Tokens in runs of the same role and terms."""
    current: list[TokenView] = []
    for token in tokens:
        key = (token.role, token.counts_in_nll, token.counts_in_odds)
        if current and key != (current[0].role, current[0].counts_in_nll, current[0].counts_in_odds):
            yield TokenRun(tuple(current))
            current = []
        current.append(token)
    if current:
        yield TokenRun(tuple(current))


def visible(text: str) -> str:
    """What else would not show: line ends as ↵ and a line end, tabs as →, control characters (which could steer a terminal) as pictures."""
    shown = text.replace("\n", "↵\n").replace("\t", "→\t")
    return shown if shown.isprintable() else _CONTROL.sub(_picture, shown)


def _picture(match: re.Match[str]) -> str:
    """U+2400 and on: a picture of each of the 32 control characters, then of DEL; those of Latin-1 have none."""
    code = ord(match.group())
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "\N{REPLACEMENT CHARACTER}"


def ids_line(segment: ShownSegment) -> str:
    """The segment's ids, as `tokenizer.decode` takes them."""
    return f"ids [{', '.join(str(token.id) for token in segment.tokens)}]"


def plain_lines(view: RowView, *, with_ids: bool = False) -> Iterator[str]:
    """A row without colours: one line per run, its role and terms in front; below them the ids, where they are asked for."""
    yield f"{view.place}: {view.dropped or f'{view.num_tokens} tokens'}"
    for note in view.notes:
        yield f"  note: {note}"
    for segment in view.segments:
        cut = ", cut to fit max_length" if segment.is_cut else ""
        yield f"  {segment.name} ({len(segment.tokens)} tokens{cut})"
        for run in runs(segment.tokens):
            text = visible(run.text).replace("↵\n", "↵").replace("→\t", "→")
            yield f"    {run.role:<9}{run.terms:<12}{text}"
        if segment.is_cut and segment.name != "prompt":
            yield f"    {'✂':<9}the answer goes on"
        if with_ids:
            yield f"    {ids_line(segment)}"


def render_html(views: Sequence[RowView], facts: dict[str, Any], *, source: str, nll_scope: str) -> str:
    """The rows as one HTML page that opens offline; ids on hover."""
    from orpo.webpage import render

    return render(
        "orpo.data", "preview.html.j2", views=views, facts=facts, source=source, nll_scope=nll_scope, roles=ROLES, visible=visible
    )
