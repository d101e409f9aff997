"""Reason codes: every row that is dropped or altered is counted under one of these, and shown."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "missing_field": "a needed field is absent or null",
    "wrong_type": "a field has the wrong type (number, boolean, list)",
    "invalid_text": "a text is not valid Unicode (lone surrogates)",
    "empty_prompt": "the prompt is empty or blank",
    "empty_answer": "an answer is empty or blank",
    "identical_answers": "chosen and rejected are the same",
    "identical_after_truncation": "chosen and rejected are the same once truncated",
    "prompts_differ": "chosen and rejected do not share one prompt",
    "no_preference": "no answer is preferred over another (tie, no label, no votes)",
    "bad_messages": "the messages are not a conversation that ends with the assistant",
    "too_long": "longer than max_length",
    "prompt_too_long": "the prompt alone leaves no room for an answer",
    "row_too_large": "the row exceeds the size limit",
    "unpaired": "one answer with a label, but no counterpart",
    "template_failed": "the chat template raised on this row",
    "special_tokens": "special-token text that the tokenizer cannot read as plain text",
    "boundary": "the end of the prompt could not be proved on the tokens",
}

NOTES: dict[str, str] = {
    "prompt_trimmed": "tokens were taken from the prompt to fit max_length",
    "answer_cut": "an answer's tail was cut to fit max_length; it carries no end-of-turn token",
    "special_tokens_in_text": "the text of the row contains special-token text",
    "boundary_merge": "the tokenizer merges the last prompt character with the answer; the merged token counts as answer",
    "already_rendered": "the prompt was already rendered with the chat template; it was taken as it is",
    "text_not_printed": "the chat template leaves out some of the row's text (a system message, reasoning); it is not trained",
    "identical_pair_removed": "of several pairs, one or more had two identical answers and were left out",
}
