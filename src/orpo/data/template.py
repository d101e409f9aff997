"""Preferences to token groups: one prompt segment, the response segments after it, and proof on the tokens that they fit together.

What holds for every group that comes out:

- The ids of prompt + answer are those of `apply_chat_template(tokenize=True)` up to the turn terminator, which is there exactly once. What
  the template prints after it is left out. Rows with special-token text are the one exception, under `special_tokens_in_text: split`.
- The prompt ids are a proved prefix of every response's ids, the same for all responses, and those that `prompt_ids` gives to generate
  from. Where the tokenizer merges across the boundary, the prompt is the longest common prefix, and the group says `boundary_merge`.
- What does not fit the length contract (`orpo.data.chat.fit`) is dropped or trimmed by policy, with a reason or a note.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orpo.data.chat import fit
from orpo.data.chat.cuts import Cuts
from orpo.data.chat.dates import ASKS, read_date
from orpo.data.chat.fit import Joined, common_prefix, cut_answers, distinct, join, to_group
from orpo.data.chat.plain import PlainText, own_beginning
from orpo.data.chat.probe import TemplateFacts, added_token_texts, probe_template
from orpo.data.chat.render import ChatRenderer, TemplateFailed
from orpo.data.chat.selection import choose_template, missing_tokens, unwrap_tokenizer
from orpo.data.chat.special import ControlText, NotPlainError, is_unicode, strings_of
from orpo.data.chat.turns import ChatText, Marks, TurnDraft
from orpo.data.rows.variables import read_run_kwargs, unread_variables
from orpo.data.settings import DataSettings
from orpo.data.types import REASONS, Dropped, Message, Preference, Text, TokenGroup
from orpo.errors import DataError, OrpoError, UserError

NUM_VERIFIED = 32
"""Responses of an encoder's first rows that are compared with transformers' own `apply_chat_template(tokenize=True)`."""

_MOST_VARIANTS = 64
"""Sets of a row's own template variables that stay probed."""


class TemplateEncoder:
    """Tokenises preferences through the tokenizer's chat template, or as plain text.

    The tokenizer is changed in two cases, so that what is saved with the model is what was trained: a template given here becomes its
    `chat_template`, and tokens of the ChatML template that are new to it are added (`new_tokens`; the model's embeddings must then grow).

    Args:
        tokenizer: a transformers tokenizer, or a processor that holds one.
        chat_template: None for the tokenizer's own; "chatml"; "none" for plain text; the path of a Jinja file; the name of one of the
            tokenizer's templates; or Jinja text.
        max_length: most tokens of a prompt and one response together.
        max_prompt_length: most tokens of a prompt, or None.
        truncation: "drop", "keep_end" or "keep_start"; see `orpo.data.chat.fit`.
        special_tokens_in_text: "warn" trains rows with special-token text as they are, counted; "split" tokenises it as plain text.
        strict: raise at the first row that cannot be used.
        chat_template_kwargs: further variables for the template, such as `{"enable_thinking": False}`.
        date: the template's today, as ISO 8601; taken when the encoder is made, if not given.

    Attributes:
        new_tokens: tokens that were added to the tokenizer.
        terminator_id: the id that ends an answer in training.
        terminator_ids: the ids to stop a generation at, `terminator_id` first.

    Raises:
        UserError: an option has no such value.
        DataError: the template cannot be used, or runs too long; its message names the template and the option.

    Example:
        >>> from orpo.data.template import TemplateEncoder
        >>> encoder = TemplateEncoder(load_tokenizer("model"), max_length=1024)
        >>> encoded = encoder.encode(preference)
        >>> encoder.tokenizer.decode(encoded.response_ids[0])
        '4.<|im_end|>'
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | Path | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation: str = "drop",
        special_tokens_in_text: str = "warn",
        strict: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        fit.check_lengths(max_length, max_prompt_length, truncation)
        if special_tokens_in_text not in ("warn", "split"):
            raise UserError(f"found {special_tokens_in_text!r}", where="special_tokens_in_text", expected="warn, split")
        self.tokenizer = unwrap_tokenizer(tokenizer)
        self.max_length, self.max_prompt_length, self.truncation = max_length, max_prompt_length, truncation
        self.special_tokens_in_text, self.is_strict = special_tokens_in_text, strict
        self._is_fast = bool(getattr(self.tokenizer, "is_fast", False))
        self._num_to_verify = NUM_VERIFIED
        self._date = read_date(date)
        self._prefix_ids: list[int] = []
        self._cuts = Cuts(self.tokenizer, [], self._ids)
        self.template, self.template_name, self.new_tokens = choose_template(self.tokenizer, chat_template)
        self._most_text_chars = self._most_chars()
        most_chars = None if truncation == "drop" else self._most_text_chars
        self._options: dict[str, Any] = {"is_split": special_tokens_in_text == "split", "most_chars": most_chars}
        self.facts: TemplateFacts | None = None
        self._texts: ChatText | PlainText
        self._variables = read_run_kwargs(chat_template_kwargs)
        if self.template_name == "none":
            self._texts = self._plain_text(self._options)
        else:
            self._texts = self._chat_text(self._options, self._variables)
        self._variants: dict[str, ChatText] = {}
        self._control_ids = frozenset(self._control.ids.values())
        stops = (self.terminator_id, self.tokenizer.eos_token_id, self._call_terminator_id)
        self.terminator_ids: tuple[int, ...] = tuple(dict.fromkeys(int(i) for i in stops if i is not None))

    def encode(self, preference: Preference) -> TokenGroup | Dropped:
        """One preference as ids, or why it cannot be.

        Raises:
            DataError: with `strict`, the row cannot be used; in any case, messages without a template, or a template that does not end.
        """
        return self.encode_many([preference])[0]

    def encode_many(self, preferences: Sequence[Preference]) -> list[TokenGroup | Dropped]:
        """The same for many, their texts tokenised together (several times as fast); results in order."""
        results: list[TokenGroup | Dropped] = []
        drafts = [self._draft(preference) for preference in preferences]
        batch = iter(self._cuts.encode([draft.texts for draft in drafts if isinstance(draft, TurnDraft) and not draft.marks]))
        for draft in drafts:
            if isinstance(draft, Dropped):
                result: TokenGroup | Dropped = draft
            elif draft.marks:
                result = self._settle(draft, None)
            else:
                ids = [self._prefix_ids + ids for ids in next(batch)]
                self._verify(draft, ids[1:])  # not the first, the prompt: whole conversations are what transformers renders
                result = self._settle(draft, ids)
            if self.is_strict and isinstance(result, Dropped):
                raise unusable_row(result)
            results.append(result)
        return results

    def prompt_ids(
        self, prompt: Text, tools: Sequence[dict[str, Any]] | None = None, chat_template_kwargs: dict[str, Any] | None = None
    ) -> np.ndarray:
        """The ids to generate from: exactly those that training has as the prompt (untrimmed, and where nothing merges across its end).

        Args:
            prompt: text or messages, as in a `Preference`.
            tools: the tools' schemas, for templates that know them.
            chat_template_kwargs: the row's own variables for the template.

        Returns:
            int32, shape (P,).

        Raises:
            DataError: the template raised on these messages.
        """
        try:
            ids = self._prompt_ids(prompt, tools, chat_template_kwargs)
        except TemplateFailed as error:
            raise DataError(f"the {self.template_name} cannot render this prompt: {error}", where="chat_template") from error
        except NotPlainError as error:
            raise DataError(str(error), where="special_tokens_in_text") from error
        return np.asarray(ids, dtype=np.int32)

    def _prompt_ids(self, prompt: Text, tools: Sequence[dict[str, Any]] | None, variables: dict[str, Any] | None = None) -> list[int]:
        text, marks = self._texts_for(variables).prompt(prompt, tools)
        return self._prefix_ids + self._encode_texts([text], marks)[0]

    def remarks(self) -> list[str]:
        """What a user should know about tokenizer and template before any row is read, one sentence each."""
        unread = unread_variables(self._source, self._variables)
        found = [f"chat_template_kwargs: {', '.join(unread)} has no effect: the {self.template_name} does not read it"] if unread else []
        return found + ([] if self.facts is None else missing_tokens(self.tokenizer, self.facts.dialogue, self.template_name))

    def generation(self) -> dict[str, Any] | None:
        """How the prompt that the template gives for generation differs from the one that is trained; None where it does not.

        Returns:
            `trained` and `generation`: what stands behind the user's text in either. `agreeing`: template variables under which the two
            are the same, or None.
        """
        if self.facts is None or self.facts.is_generation_trained:
            return None
        agreeing = next((value for value in ({"enable_thinking": False}, {"enable_thinking": True}) if self._agrees(value)), None)
        return {"trained": self.facts.trained, "generation": self.facts.generation, "agreeing": agreeing}

    def _agrees(self, variables: dict[str, Any]) -> bool:
        try:
            texts = self._texts_for(variables)
        except DataError:
            return False
        return isinstance(texts, ChatText) and texts.facts.is_generation_trained

    def describe(self) -> dict[str, Any]:
        """Facts for run.json and the preview; plain JSON types."""
        facts: dict[str, Any] = {
            "template": self.template_name,
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "truncation": self.truncation,
            "special_tokens_in_text": self.special_tokens_in_text,
            "terminator": self.tokenizer.convert_ids_to_tokens(self.terminator_id),
            "terminator_id": self.terminator_id,
            "terminator_is_appended": self._is_eos_appended,
            "new_tokens": list(self.new_tokens),
        }
        if self.facts is not None:
            source = self._source or ""
            facts |= {
                "template_sha256": hashlib.sha256(source.encode()).hexdigest(),
                "chat_template_kwargs": self._texts.render.variables if isinstance(self._texts, ChatText) else {},
                "date": self._date.isoformat() if ASKS in source else None,
                "generation": self.generation(),
                **self.facts.to_dict(),
            }
        return facts

    @property
    def _source(self) -> str | None:
        return None if self.template_name == "none" else self.template or self.tokenizer.get_chat_template()

    def _chat_text(self, options: dict[str, Any], variables: dict[str, Any]) -> ChatText:
        texts = self._probed(options, variables)
        self.facts, self._control = texts.facts, texts.control
        self.terminator_id, self._is_eos_appended = self.facts.end.terminator_id, self.facts.end.is_appended
        self._call_terminator_id = self.facts.call_end.terminator_id
        return texts

    def _probed(self, options: dict[str, Any], variables: dict[str, Any]) -> ChatText:
        """The template under these variables, probed."""
        renderer = ChatRenderer(self.tokenizer, self.template, name=self.template_name, variables=variables, date=self._date)
        facts = probe_template(renderer, self._ids)
        control = ControlText(self.tokenizer, facts.control_tokens, facts.markers)
        if not self._cuts:  # what is true of tokens is true under all variables of a row
            self._cuts = Cuts(self.tokenizer, facts.printed_tokens, self._ids)
        return ChatText(renderer, facts, control, self._encode_texts, self._cuts, **options)

    def _texts_for(self, variables: dict[str, Any] | None) -> ChatText | PlainText:
        """The template under a row's own variables: they may change what it prints anywhere, so it is probed for each set of them."""
        if not variables or isinstance(self._texts, PlainText):
            return self._texts
        key = json.dumps(variables, sort_keys=True, default=repr)
        if key not in self._variants:
            if len(self._variants) >= _MOST_VARIANTS:  # a variable that differs in every row: none is asked for again
                self._variants.clear()
            self._variants[key] = self._probed(self._options, {**self._texts.render.variables, **variables})
        return self._variants[key]

    def _plain_text(self, options: dict[str, Any]) -> PlainText:
        self._prefix_ids = own_beginning(self.tokenizer, self._ids)
        self.terminator_id, self._is_eos_appended = int(self.tokenizer.eos_token_id), True
        self._call_terminator_id = self.terminator_id
        self._control = ControlText(self.tokenizer, list(added_token_texts(self.tokenizer, special_only=True)))
        bos = self.tokenizer.convert_ids_to_tokens(self._prefix_ids[-1]) if self._prefix_ids else None
        return PlainText(self.tokenizer, self._control, bos=bos, **options)

    def _most_chars(self) -> int:
        """Characters beyond which no text can fit `max_length`, with room to spare for normalisation that shortens."""
        return 4 * self.max_length * max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    # Texts to ids.

    def _draft(self, preference: Preference) -> TurnDraft | Dropped:
        """The preference as texts; texts too long for any token count are dropped or shortened before they are tokenised."""
        most = self._most_text_chars
        prompt_chars, *answer_chars = [fit.num_chars(text) for text in (preference.prompt, *preference.responses)]
        if self.truncation == "drop" and max(prompt_chars, *answer_chars) > most:
            reason = "prompt_too_long" if prompt_chars > most else "too_long"
            return Dropped(reason, preference.where, f"{max(prompt_chars, *answer_chars)} characters")
        # A lone surrogate comes in by a JSON escape and cannot be encoded; the tokenizer would raise for the whole batch.
        if not is_unicode(strings_of([preference.prompt, preference.responses, preference.tools])):
            return Dropped("invalid_text", preference.where, "a lone surrogate")
        texts = self._texts_for(preference.chat_template_kwargs)
        if prompt_chars <= most:
            return self._noted(texts.draft(preference))
        if texts.is_rendered(preference.prompt):
            return _untrimmable(preference)
        short = fit.shorten(preference.prompt, most, self.truncation)
        draft = texts.draft(replace(preference, prompt=short))
        if isinstance(draft, TurnDraft) and short != preference.prompt:
            draft.notes.append("prompt_trimmed")
        return self._noted(draft)

    def _noted(self, draft: TurnDraft | Dropped) -> TurnDraft | Dropped:
        """The draft, with a note where the row's own variables are not read by the template."""
        if isinstance(draft, TurnDraft) and draft.preference.chat_template_kwargs:
            draft.notes += ["variables_not_read"] * bool(unread_variables(self._source, draft.preference.chat_template_kwargs))
        return draft

    def _encode_texts(self, texts: Sequence[str], marks: Marks) -> list[list[int]]:
        if marks is None:
            return self._ids(list(texts))
        return [self._control.encode_marked(text, marks) for text in texts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids without added special tokens. The Rust tokenizer is called directly: half the time of the wrapper, the same ids."""
        if not texts:
            return []
        if not self._is_fast:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        backend = self.tokenizer.backend_tokenizer
        # What a tokenizer's file or a call before has set would go on to hold here: the backend is one object, shared with its wrapper.
        backend.encode_special_tokens = False
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _verify(self, draft: TurnDraft, full_ids: list[list[int]]) -> None:
        """Hold the first rows to transformers' own ids."""
        is_comparable = not draft.marks and not any(end.is_appended and end.after for end in draft.ends)
        texts = self._texts_for(draft.preference.chat_template_kwargs)
        if self._num_to_verify <= 0 or not is_comparable or not isinstance(texts, ChatText):
            return
        for conversation, ids in zip(draft.conversations, full_ids, strict=False):
            self._num_to_verify -= 1
            expected = texts.render.reference_ids(conversation, draft.preference.tools)
            if expected[: len(ids)] != ids:  # ours end at the terminator; a template may print more behind it
                raise OrpoError(f"{draft.preference.where}: ids differ from those of apply_chat_template(tokenize=True)")

    def _settle(self, draft: TurnDraft, ids: list[list[int]] | None) -> TokenGroup | Dropped:
        """A group of a draft; its ids are made here where they could not be made in a batch."""
        try:
            return self._fit(draft, self._draft_ids(draft) if ids is None else ids)
        except NotPlainError as error:
            return Dropped("special_tokens", draft.preference.where, str(error))
        except TemplateFailed as error:
            return Dropped("template_failed", draft.preference.where, f"the {self.template_name} says: {error}")

    def _draft_ids(self, draft: TurnDraft) -> list[list[int]]:
        return [self._prefix_ids + ids for ids in self._encode_texts(draft.texts, draft.marks)]

    def _fit(self, draft: TurnDraft, ids: list[list[int]]) -> TokenGroup | Dropped:
        joined = join(draft, ids, self._control_ids)
        if isinstance(joined, Dropped):
            return joined
        pairs = draft.preference.pairs
        if pairs and not distinct(pairs, joined.responses)[0]:
            return Dropped("identical_answers", draft.preference.where, "the answers have the same tokens")
        fitted = self._fit_lengths(draft, joined)
        return fitted if isinstance(fitted, Dropped) else to_group(draft.preference, fitted)

    def _fit_lengths(self, draft: TurnDraft, joined: Joined) -> Joined | Dropped:
        """The length contract, decided once for the group."""
        num_prompt, longest = len(joined.prompt_ids), max(map(len, joined.responses))
        # At exactly `max_length` no token of an answer would be left.
        is_long_prompt = num_prompt >= self.max_length or num_prompt > (self.max_prompt_length or num_prompt)
        if not is_long_prompt and num_prompt + longest <= self.max_length:
            return joined
        if self.truncation == "drop":
            detail = f"prompt {num_prompt} and longest answer {longest} tokens; max_length is {self.max_length}"
            return Dropped("prompt_too_long" if is_long_prompt else "too_long", draft.preference.where, detail)
        least = 1 + self._num_head_tokens(draft, joined)
        trimmed: Joined | Dropped = joined
        for budget in fit.prompt_budgets(num_prompt, longest, self.max_length, self.max_prompt_length, least):
            trimmed = self._trim(draft, joined, budget) if budget < num_prompt else joined
            if isinstance(trimmed, Joined):
                break
        if isinstance(trimmed, Dropped):
            return trimmed
        return cut_answers(trimmed, self.max_length - len(trimmed.prompt_ids), self.terminator_ids)

    def _num_head_tokens(self, draft: TurnDraft, joined: Joined) -> int:
        """Tokens of the template that stand between the prompt and what the answer says (an empty think block, say)."""
        before = self._texts_for(draft.preference.chat_template_kwargs).before_content(draft)
        if before is None:
            return 0
        ids = self._encode_texts([before], draft.marks)[0]
        return max(0, *(common_prefix([ids, joined.prompt_ids + response]) - len(joined.prompt_ids) for response in joined.responses))

    def _trim(self, draft: TurnDraft, joined: Joined, budget: int) -> Joined | Dropped:
        """The same group with a prompt of at most `budget` tokens."""
        preference = draft.preference
        texts = self._texts_for(preference.chat_template_kwargs)
        if isinstance(texts, PlainText):
            num_prefix = len(self._prefix_ids)
            num_kept, text_ids = budget - num_prefix, joined.prompt_ids[num_prefix:]
            if num_kept < 1:
                return Dropped("prompt_too_long", preference.where, "no room is left for the prompt")
            kept = text_ids[-num_kept:] if self.truncation == "keep_end" else text_ids[:num_kept]
            return replace(joined, prompt_ids=joined.prompt_ids[:num_prefix] + kept, notes=[*joined.notes, "prompt_trimmed"])
        if not draft.is_trimmable:
            return _untrimmable(preference)

        def measure(messages: Sequence[Message]) -> int:
            return len(self._prompt_ids(tuple(messages), preference.tools, preference.chat_template_kwargs))

        messages = fit.trim_messages(texts.as_messages(preference.prompt), budget, self.truncation, measure, self._spans)
        if messages is None:
            return Dropped("prompt_too_long", preference.where, f"its headers alone need more than the {budget} tokens left for it")
        shorter = texts.draft(replace(preference, prompt=tuple(messages)))
        if isinstance(shorter, Dropped):
            return shorter
        shorter.notes = [*draft.notes, "prompt_trimmed"]
        return join(shorter, self._draft_ids(shorter), self._control_ids)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans of a text's tokens; of its characters, where the tokenizer gives none."""
        if not self._is_fast:
            return [(i, i + 1) for i in range(len(text))]
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets)


def unusable_row(dropped: Dropped) -> DataError:
    """The error that `strict` stops with at a row that would otherwise be dropped."""
    text = REASONS.get(dropped.reason, dropped.reason)
    return DataError(
        f"{text} [{dropped.reason}]" + (f": {dropped.detail}" if dropped.detail else ""),
        where=str(dropped.where),
        mend="mend the row, or leave strict_data out (strict, in Python): such rows are then dropped and counted",
    )


def _untrimmable(preference: Preference) -> Dropped:
    return Dropped("prompt_too_long", preference.where, "the prompt was rendered before; cutting it would break its chat headers")


def make_encoder(tokenizer: Any, settings: DataSettings, *, num_positions: int | None = None, date: str | None = None) -> TemplateEncoder:
    """The encoder of a configuration. Without a `max_length` the smaller of the tokenizer's and the model's limit counts.

    Args:
        num_positions: the longest sequence that the model was made for; None where that is not known.
        date: what a template that asks for today gets; now, if not given.
    """
    return TemplateEncoder(
        tokenizer,
        chat_template=settings.chat_template,
        max_length=settings.max_length or _longest(tokenizer, num_positions),
        max_prompt_length=settings.max_prompt_length,
        truncation=settings.truncation,
        special_tokens_in_text=settings.special_tokens_in_text,
        strict=settings.strict_data,
        chat_template_kwargs=read_run_kwargs(settings.chat_template_kwargs),
        date=date,
    )


def _longest(tokenizer: Any, num_positions: int | None) -> int:
    """What tokenizer and model take, as far as they say it; tokenizers that do not know say 1e30."""
    limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
    limits = [limit if 0 < limit < 10**7 else 10**7, num_positions]
    return min(limit for limit in limits if limit is not None)
