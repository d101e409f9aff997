"""The names that columns go by, and a sample of rows to look them up in."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orpo.data.rows.shapes import GOOD_LABELS, PromptReader
from orpo.data.rows.variables import TEMPLATE_KWARGS
from orpo.errors import DataError

PROMPTS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "input",
    "conversations",
    "conversation",
    "messages",
    "context",
    "history",
    "post",
    "user",
)
CHOSEN = (
    "chosen",
    "preferred",
    "preferred_output",
    "chosen_response",
    "response_chosen",
    "chosen_messages",
    "chosen_answer",
    "accepted",
    "positive",
)
REJECTED = (
    "rejected",
    "non_preferred",
    "dispreferred",
    "non_preferred_output",
    "rejected_response",
    "response_rejected",
    "rejected_messages",
    "rejected_answer",
    "negative",
)
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
LISTS = ("completions", "responses", "answers", "candidates", "outputs", "generations", "summaries")
RANKED = ("ranked_responses", "ranked_completions", "ranked_answers", "ranked_outputs")
"""Lists whose order is the verdict: the best response first."""

SCORES = ("scores", "ratings", "rewards", "score", "rating")
RANKS = ("ranks", "rank")
LABELS = (
    "winner",
    "label",
    "labels",
    "preference",
    "preferred",
    "choice",
    "better",
    "better_response_id",
    "better_response",
    "verdict",
    "chosen_index",
    "best",
    "best_response",
    "votes",
)
STRENGTHS = ("preference_strength", "overall_preference")
ANSWERS = ("completion", "response", "output", "answer", "target", "text", "messages", "conversations")
RATINGS = ("score", "rating", "reward", "overall_score", "helpfulness", "quality")
_NUMBERED = re.compile(r"(?P<stem>.*?)[_ ]?(?P<suffix>[0-9]{1,2}|[a-h])", re.IGNORECASE)
RESPONSE_STEMS = frozenset(
    {
        "response",
        "answer",
        "completion",
        "output",
        "prediction",
        "generation",
        "candidate",
        "assistant",
        "conversation",
        "human_ref",
        "reply",
    }
)
SCORE_STEMS = frozenset({"score", "rating", "reward", "rank", "votes", "num_votes", "upvotes"})
VOTER_STEMS = frozenset({"annotator", "vote", "rater", "judge", "labeler", "labeller", "annotation"})
PAIR_EXAMPLE = '{"prompt": …, "chosen": …, "rejected": …}'


class Sample:
    """The columns of some rows, found by our names whatever their case, spaces and hyphens."""

    def __init__(self, rows: Sequence[Any], where: str) -> None:
        self.rows = [row for row in rows if isinstance(row, Mapping)]
        self.where = where
        counts = Counter(key for row in self.rows for key in row if isinstance(key, str))
        self.columns = list(counts)
        self.filled = Counter(key for row in self.rows for key, value in row.items() if isinstance(key, str) and value is not None)
        self._by_name = {normal_name(key): key for key in reversed(self.columns)}

    def find(self, names: Sequence[str]) -> str | None:
        """The column with the first of these names that some row fills; else the first that is there at all."""
        present = [self._by_name[name] for name in names if name in self._by_name]
        return next((column for column in present if self.filled[column]), present[0] if present else None)

    def values(self, column: str | None) -> list[Any]:
        """The values of a column that are not null."""
        return [row[column] for row in self.rows if row.get(column) is not None] if column else []

    def share(self, column: str | None, test: Callable[[Any], bool]) -> float:
        """The share of a column's values that pass a test; 0 without values."""
        values = self.values(column)
        return sum(map(test, values)) / len(values) if values else 0.0

    def numbered(self, stems: frozenset[str]) -> dict[str, list[tuple[str, str]]]:
        """stem -> (suffix, column) for columns such as `response_1`, `answer a`, `prediction 3`, `responseB`, in order."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for column in self.columns:
            found = _NUMBERED.fullmatch(normal_name(column))
            if found and (stem := found["stem"].rstrip("_")) in stems:
                groups.setdefault(stem, []).append((found["suffix"], column))
        return {stem: sorted(items, key=lambda item: (len(item[0]), item[0])) for stem, items in groups.items()}

    def error(self, what: str, *, expected: str, mend: str) -> DataError:
        found = ", ".join(map(repr, self.columns[:20])) or "no columns"
        return DataError(f"{what} (found: {found})", where=self.where, expected=expected, mend=mend)


@functools.lru_cache(maxsize=4096)  # asked for every column of every row
def normal_name(column: str) -> str:
    """A column's name for comparing: lower case, words joined by underscores."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z0-9]*$)", "_", column.strip())
    return re.sub(r"[\s\-.]+", "_", words.lower())


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def prompt_reader(sample: Sample, *, taken: Sequence[str | None] = ()) -> PromptReader:
    """The columns of the prompt; none where it is implicit."""
    column = next((c for name in PROMPTS if (c := sample.find((name,))) and c not in taken and sample.filled[c]), None)
    extra = sample.find(("input",))
    columns: tuple[str, ...] = () if column is None else (column,)
    if column is not None and normal_name(column) == "instruction" and extra is not None and extra not in taken:
        columns = (column, extra)
    history = sample.find(("history",))
    history = history if history not in columns and sample.share(history, lambda v: isinstance(v, list)) > 0.5 else None
    return PromptReader(columns, sample.find(SYSTEMS), sample.find(TOOLS), history)


def columns_of(prompt: PromptReader) -> list[str]:
    return [*prompt.columns, *(column for column in (prompt.system, prompt.tools, prompt.history) if column)]


def prompt_line(prompt: PromptReader) -> str:
    if not prompt.columns:
        return "prompt = the common beginning"
    line = f"prompt = {' + '.join(map(repr, prompt.columns))}"
    return line + (f", system = {prompt.system!r}" if prompt.system else "") + (f", tools = {prompt.tools!r}" if prompt.tools else "")


def unused_line(sample: Sample, used: Sequence[str]) -> str:
    unused = [repr(column) for column in sample.columns if column not in used and column != TEMPLATE_KWARGS]
    return f"; not trained on: {', '.join(unused[:8])}{' …' if len(unused) > 8 else ''}" if unused else ""


def verdict_on_one_answer(sample: Sample) -> str | None:
    """The column of a KTO row that says whether its one answer is good."""
    label = sample.find(("label", "kto_tag", "is_desirable", "desirable", "thumbs_up"))
    is_verdict = sample.share(label, lambda v: isinstance(v, bool) or v in (0, 1, *GOOD_LABELS, "bad", "undesirable", "false", "0"))
    return label if is_verdict > 0.5 else None
