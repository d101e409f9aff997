"""The keys of a run's configuration that decide which rows are seen of its data, and as which tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How rows are read and tokenised, under the names that the keys have in a configuration (docs of each there).

    One value for every command, so that what is trained on is what is checked, planned, audited, shown and evaluated. There are no
    defaults here: the configuration has them.
    """

    column_map: Mapping[str, str] | None
    pairs: str
    sft_rows: bool
    strict_data: bool
    dataset_streaming: bool
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | str | None
    max_length: int | None
    max_prompt_length: int | None
    truncation: str
    special_tokens_in_text: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DataSettings:
        """Those of a configuration's values. Options given to the trainer from Python know of no streaming: their rows are here."""
        given: dict[str, Any] = {item.name: values.get(item.name) for item in fields(cls)}
        if isinstance(given["column_map"], str):  # JSON, as TrainingArguments takes its mappings
            given["column_map"] = json.loads(given["column_map"])
        given |= {"column_map": given["column_map"] or None, "dataset_streaming": bool(given["dataset_streaming"])}
        return cls(**given)
