"""What an audit can find: each kind of finding once, with why it hurts ORPO and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orpo.data.types import REASONS

Severity = Literal["error", "warning", "info"]
MOST_PLACES = 1000
"""Places of a finding that are listed; all of them are in the log of `--write-clean`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: `error` and `warning` fail `--strict`; `error` rows cannot be trained on or train the opposite of what was meant.
        leaves: whether `--write-clean` leaves such rows out.
    """

    title: str
    severity: Severity
    why: str
    mend: str
    leaves: bool = False


_ROW = "The row cannot be trained on, so it is dropped; the run is smaller than the file looks."
_REASON_HELP: dict[str, tuple[str, str]] = {
    "missing_field": (_ROW, "Fill the field, or name the right column with column_map."),
    "wrong_type": (
        "A number or boolean where text should be is a slip of the export (an answer such as 'True' read as a boolean). It is not made "
        "into text by guessing, so the row is dropped.",
        "Write the value as text, or remove the row.",
    ),
    "not_text": (
        "An answer about a picture is a guess to a model that is not shown it; trained without it, it teaches guessing.",
        "Remove the row, or, where the text stands by itself, the column.",
    ),
    "invalid_text": (_ROW, "Write the text again in UTF-8; a lone surrogate is half of a character."),
    "empty_prompt": ("Without a question there is nothing to prefer one answer for.", "Fill in the prompt or remove the row."),
    "empty_answer": (
        "An empty chosen answer would teach the model to stop at once; an empty rejected one has no token probabilities to push down.",
        "Remove the row or get the answer again.",
    ),
    "identical_answers": (
        "Both sides push the same tokens up and down at once: the odds ratio is 0 whatever the model does.",
        "Remove the row; if there are many, check how the pairs were made.",
    ),
    "identical_after_truncation": (
        "The answers differ only beyond max_length, so the model would see no difference.",
        "Raise max_length or shorten the prompt.",
    ),
    "prompts_differ": (
        "The odds ratio compares two answers to the same prompt; here they answer different ones.",
        "Give both sides the same conversation up to the last answer.",
    ),
    "no_preference": ("A tie or a missing verdict says nothing about which answer to prefer.", "Decide the tie or remove the row."),
    "bad_messages": (_ROW, "The conversation has to end with the assistant's answer, and every turn needs a known role."),
    "too_long": ("The row is longer than max_length and is dropped.", "Raise max_length, or choose truncation: keep_end or keep_start."),
    "prompt_too_long": (
        "The prompt alone leaves no room for an answer.",
        "Raise max_length, or choose truncation: keep_end or keep_start.",
    ),
    "row_too_large": (_ROW, "Split or remove the row; no model reads a text of many megabytes."),
    "unpaired": ("ORPO needs two answers to the same prompt.", "Add the counterpart, or train the good rows as SFT-only rows."),
    "template_failed": (
        "The chat template cannot render this conversation.",
        "Repair the order of the turns, or use another chat_template.",
    ),
    "special_tokens": (
        "With special_tokens_in_text: split the text has to become plain tokens, and this tokenizer cannot do that.",
        "Remove the text, or use the model's fast tokenizer.",
    ),
    "not_printed": (
        "Another answer would be trained than the one that was preferred.",
        "Use a chat_template that prints tool calls (and the text beside them), or write the call into the answer's text.",
    ),
    "boundary": (
        "Where the prompt ends could not be proved on the tokens, so it is unknown what would be scored.",
        "Use another chat_template, or report the row.",
    ),
}

KINDS: dict[str, Kind] = {
    code: Kind(REASONS[code], "error", *_REASON_HELP.get(code, (_ROW, "Repair or remove the row.")), leaves=True) for code in REASONS
} | {
    "duplicates": Kind(
        "rows that repeat an earlier row exactly",
        "warning",
        "A repeated pair counts double in every epoch; it is learned by heart sooner, and copies on both sides of a split make the "
        "held-out figures look better than they are.",
        "Keep one copy of each (`--write-clean` does).",
        leaves=True,
    ),
    "near_duplicates": Kind(
        "rows that nearly repeat an earlier row",
        "warning",
        "Small variations of one row weigh like exact copies, and leak between training and evaluation the same way.",
        "Keep one of each group (`--write-clean` does); vary the prompts where they came from a template.",
        leaves=True,
    ),
    "contradictions": Kind(
        "pairs that another row labels the other way round",
        "error",
        "The same two answers to the same prompt are preferred once this way, once that way: the two odds-ratio terms cancel and only "
        "noise stays.",
        "Decide each case again by the guideline; `--write-clean` leaves out all sides of a contradiction.",
        leaves=True,
    ),
    "repeated_prompts": Kind(
        "rows whose prompt also has other pairs",
        "info",
        "Several pairs to a prompt are fine as such, but a prompt with many of them weighs more than the others, and a random split puts "
        "it on both sides.",
        "Split by prompt (eval_fraction does), or put the answers into one row as a group.",
    ),
    "repeated_chosen": Kind(
        "rows whose chosen answer is word for word that of another prompt",
        "warning",
        "An answer that fits many prompts is a stock phrase; the next-token loss then teaches the phrase rather than the task.",
        "Look at the commonest ones; keep those that are really right for each prompt.",
    ),
    "evaluation_overlap": Kind(
        "rows whose prompt is in the evaluation data too",
        "error",
        "What is measured on prompts that were trained on is memory, not quality.",
        "Remove these rows from training (`--write-clean` does).",
        leaves=True,
    ),
    "benchmark_overlap": Kind(
        "rows that share a benchmark's prompt",
        "error",
        "The prompt equals a benchmark's, or has a run of 13 words in common with it: results on that benchmark will not count.",
        "Remove these rows (`--write-clean` does).",
        leaves=True,
    ),
    "replacement_character": Kind(
        "rows with the character U+FFFD",
        "warning",
        "U+FFFD stands where characters were lost in a wrong decoding; on the chosen side the model learns to write it.",
        "Get the text again from its source, or remove the row (`--write-clean` does).",
        leaves=True,
    ),
    "mojibake": Kind(
        "rows with mis-decoded text (such as â€™ for an apostrophe)",
        "warning",
        "UTF-8 was read in another encoding; on the chosen side the model learns to write the debris.",
        "Decode the source again as UTF-8, or remove the row (`--write-clean` does).",
        leaves=True,
    ),
    "control_characters": Kind(
        "rows with control characters",
        "info",
        "Characters such as NUL or escape codes are debris of terminals and databases, and rare tokens.",
        "Strip them where the text comes from.",
    ),
    "special_token_text": Kind(
        "rows whose text contains special-token text",
        "warning",
        "Text such as <|im_end|> inside a message becomes the real token: a user could open another role, an answer could end early.",
        "Remove the text, or train with special_tokens_in_text: split, which tokenises it as plain text.",
    ),
    "turn_in_answer": Kind(
        "rows with another speaker's turn inside an answer",
        "warning",
        "The answer runs on into 'Human:' or 'Assistant:'; trained on, the model talks to itself.",
        "Cut the answer before that turn, or remove the row.",
    ),
    "looks_cut": Kind(
        "rows whose chosen answer stops in the middle of a sentence",
        "info",
        "The end-of-turn token is trained right after it, so the model learns to stop in the middle.",
        "Get the answers again with a larger token limit, or cut them at the last full sentence.",
    ),
    "low_contrast": Kind(
        "pairs whose answers consist of nearly the same words",
        "info",
        "The fewer tokens differ, the more the odds ratio pushes the shared ones up and down at once; the signal rests on a word or two.",
        "Fine where that word is the point (an edit); otherwise choose answers that differ in substance.",
    ),
    "shortcut": Kind(
        "surface features predict the choice",
        "warning",
        "The model can raise the odds of the chosen answers by learning such a feature instead of what makes them better.",
        "Balance it: add pairs in which the preferred answer lacks it, or choose among answers that are alike in it.",
    ),
    "thin_scenarios": Kind(
        "scenarios with few pairs",
        "warning",
        "What a guideline means for a scenario is learned from its own pairs; a scenario with few of them is decided by the others.",
        "Collect more pairs there, or repeat none and weigh the sources.",
    ),
    "dominant_scenario": Kind(
        "one scenario holds most of the pairs",
        "warning",
        "Preferred and rejected responses should be represented across diverse scenarios; here most of the training is one of them.",
        "Collect pairs for the others, or mix the sources with weights.",
    ),
    "flat_chosen": Kind(
        "scenarios whose chosen answers hardly vary",
        "warning",
        "When the chosen answers of a scenario share most of their phrases, the next-token loss learns the phrases by heart.",
        "Let several people (or models) write them, and show annotators the openings that are used up.",
    ),
    "prompt_trimmed": Kind(
        "rows whose prompt is trimmed to fit max_length",
        "info",
        "The model does not see the part that is cut away, though the answer may refer to it.",
        "Raise max_length, or shorten the prompts.",
    ),
    "answer_cut": Kind(
        "rows with an answer cut at max_length",
        "warning",
        "A cut answer is trained without an end, which is right, but the part that made it better may be gone.",
        "Raise max_length, or drop these rows (truncation: drop).",
    ),
    "text_not_printed": Kind(
        "rows of which the chat template leaves out some of the prompt",
        "warning",
        "The model does not see a system message or a turn that the template does not print, and the answer may rest on it.",
        "Use a chat_template that prints it, or move the text into the user's turn.",
    ),
    "reasoning_not_printed": Kind(
        "rows whose reasoning the chat template leaves out",
        "warning",
        "Reasoning that the template does not print is not trained: the model learns to answer without it.",
        "Use a chat_template that prints it, or write it into the answer's text.",
    ),
    "tools_not_printed": Kind(
        "rows whose tools the chat template leaves out, or a part of them",
        "warning",
        "The model does not see which tools there are, and learns to call some by heart.",
        "Use a chat_template that prints tools, or describe them in the system message.",
    ),
    "calls_not_printed": Kind(
        "rows of which the chat template leaves out an earlier tool call",
        "warning",
        "The model sees a tool's result, but not what it was asked.",
        "Use a chat_template that prints tool calls.",
    ),
    "name_not_printed": Kind(
        "rows with a name in a message that the chat template leaves out",
        "info",
        "The model does not see who speaks.",
        "Write the name into the text, if it matters.",
    ),
    "variables_not_read": Kind(
        "rows with a variable in chat_template_kwargs that the chat template does not read",
        "warning",
        "The row is trained as if the variable were not there.",
        "Correct its name, use a chat_template that reads it, or leave it out.",
    ),
    "other_generation_prompt": Kind(
        "rows trained with another prompt than the chat template gives for generation",
        "warning",
        "A server that asks with the template's generation prompt begins the answer elsewhere than the training did.",
        "Set chat_template_kwargs so that both agree (orpo check shows both texts), or ask with the trained one, as orpo's commands do.",
    ),
    "rendered_otherwise": Kind(
        "rows rendered before, with another end than the chat template's generation prompt",
        "info",
        "They are trained as they stand; asked with the template's own prompt, the model begins elsewhere.",
        "Render them with the same chat_template_kwargs as the model will be asked with, or give the messages.",
    ),
    "already_rendered": Kind(
        "rows whose prompt was rendered with the chat template before",
        "info",
        "It is taken as it is; a change of the chat template will not reach these rows, and they cannot be trimmed.",
        "Give the messages instead of the rendered text.",
    ),
    "boundary_merge": Kind(
        "rows in which the prompt's last characters and the answer share a token",
        "info",
        "The shared token counts as part of the answer, so the prompt is a token shorter than it is when the model is asked.",
        "End the prompt with a line end, or use a chat template, whose headers keep the two apart.",
    ),
    "identical_pair_removed": Kind(
        "rows of which a pair was left out, its answers being the same",
        "info",
        "A pair of equal answers has nothing to say; the other pairs of the row stay.",
        "Nothing, unless there are many; then check how the responses were sampled.",
    ),
    "possible_flips": Kind(
        "pairs that look labelled the wrong way round",
        "info",
        "The model finds the rejected answer far likelier than the chosen one, more so than for the other pairs; each flipped label pulls "
        "against all the right ones.",
        "Read them from the top and decide again; they are candidates, not verdicts.",
    ),
}


@dataclass(slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: its kind, a key of KINDS.
        num_rows: how many rows show it.
        share: of all rows that were looked at for it.
        places: `file:line` of the first MOST_PLACES of them.
        examples: a few of them with the beginning of their prompt.
        numbers: further figures.
        note: one sentence on this data set.
    """

    code: str
    num_rows: int
    share: float
    places: list[str] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    severity: Severity = "info"

    @property
    def kind(self) -> Kind:
        """Its title, why it hurts and what to do."""
        return KINDS[self.code]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "code": self.code,
            "severity": self.severity,
            "title": self.kind.title,
            "num_rows": self.num_rows,
            "share": round(self.share, 6),
            "note": self.note,
            "why": self.kind.why,
            "mend": self.kind.mend,
            "numbers": self.numbers,
            "places": self.places,
        }


_ORDER: Sequence[Severity] = ("error", "warning", "info")


def by_weight(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest and most frequent first."""
    return sorted(findings, key=lambda finding: (_ORDER.index(finding.severity), -finding.num_rows, finding.code))
