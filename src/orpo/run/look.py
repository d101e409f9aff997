"""Looking at rows from Python as the model will see them: `orpo.preview`."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.data.preview import RowView, TokenView

_COLOURS = {"template": "#777", "prompt": "#1f5fbf", "chosen": "#1a7f37", "rejected": "#b42318", "eos": "#9a6700"}


@dataclass(frozen=True, repr=False)
class Preview:
    """Some rows token by token; a notebook shows them in colours, `print` line by line.

    Attributes:
        rows: one view per row, with the ids of training.
        encoder: how they were made: template, end of the answer, max_length.
    """

    rows: list[RowView]
    encoder: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """As `orpo preview` prints it into a file."""
        from orpo.data.preview import plain_lines

        template, end, length = (self.encoder[key] for key in ("template", "terminator", "max_length"))
        yield f"template {template}, answers end with {end!r}, max_length {length}"
        for row in self.rows:
            yield from plain_lines(row)

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(next(self.lines()))}; underlined: next-token loss, bold: odds ratio</p>"]
        for row in self.rows:
            parts.append(f"<p><b>{html.escape(row.place)}</b> {html.escape(row.dropped or f'{row.num_tokens} tokens')}</p>")
            parts += [f"<p><i>{html.escape(note)}</i></p>" for note in row.notes]
            for segment in row.segments:
                tokens = "".join(_span(token) for token in segment.tokens)
                parts.append(f"<div>{html.escape(segment.name)}: <code style='white-space:pre-wrap'>{tokens}</code></div>")
        return "".join(parts)


def _span(token: TokenView) -> str:
    from orpo.data.preview import visible

    style = (
        f"color:{_COLOURS[token.role]}" + ";text-decoration:underline" * token.counts_in_nll + ";font-weight:bold" * token.counts_in_odds
    )
    return f"<span style='{style}' title='id {token.id}'>{html.escape(visible(token.text))}</span>"


def preview(source: Any, model: str, *, num: int = 3, **keys: Any) -> Preview:
    """Show what the model will see of the first rows.

    Args:
        source: file, folder, hub id, `orpo-demo`, or rows.
        model: hub id, folder or GGUF file; only its tokenizer is loaded.
        num: how many rows.
        keys: keys of a run that decide how rows are read and tokenised: `chat_template`, `max_length`, `column_map`, `nll_scope`, …

    Returns:
        The rows, with the ids of training; `print` shows them line by line, a notebook in colours.

    Raises:
        UserError: the data or the tokenizer cannot be read, or an unknown key.

    Example:
        >>> from orpo import preview
        >>> shown = preview("pairs.jsonl", "model", num=1)
        >>> print(shown)
        template tokenizer's chat template, answers end with '<|im_end|>', max_length 1024
        ...
        >>> [token.text for token in shown.rows[0].segments[2].tokens][-1]  # of the rejected answer
        '<|im_end|>'
    """
    from orpo.data.formats import stream_preferences
    from orpo.data.preview import view_row
    from orpo.run.config import resolve
    from orpo.run.data import load_encoder

    words = [word for key, value in keys.items() if value is not None for word in (f"--{key}", str(value))]
    config = resolve(None, words, base={"dataset_name": source, "model_name_or_path": model}, name="preview")
    settings = config.data_settings()
    items = stream_preferences(
        source, split=config["dataset_train_split"], column_map=settings.column_map, pairs=settings.pairs, sft_rows=settings.sft_rows
    )
    encoder = load_encoder(config, strict_data=False)
    return Preview([view_row(item, encoder, nll_scope=config["nll_scope"]) for item in islice(items, num)], encoder.describe())
