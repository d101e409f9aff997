"""The rows of a run: read, judged, tokenised, and split, before any weights are loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo.config.options import ORPOConfig
from orpo.data.template import make_encoder
from orpo.data.types import Dropped, Preference, Text, TokenGroup, Where
from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig
    from orpo.data.dataset import DataReport
    from orpo.data.template import TemplateEncoder
    from orpo.run.config import RunConfig

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Receives each line for the user."""

NUM_PROMPTS = 3
"""Held-out prompts that are kept to show answers to."""


@dataclass(frozen=True)
class RunData:
    """Tokenised rows of a run.

    Attributes:
        train, train_report: what is trained on, and what became of every row.
        held_out, held_out_report: what is evaluated on; None where nothing is.
        encoder, tokenizer: what made them.
        prompts: a few held-out prompts, spread over the rows, as text or messages: to show answers to.
    """

    train: list[TokenGroup]
    train_report: DataReport
    held_out: list[TokenGroup] | None
    held_out_report: DataReport | None
    encoder: TemplateEncoder
    tokenizer: Any
    prompts: tuple[Text, ...] = ()


def prepare_data(config: RunConfig, args: ORPOConfig, tell: Tell) -> RunData:
    """Read, judge and tokenise all rows. The model's tokenizer is loaded, its weights are not.

    Raises:
        UserError: nothing usable, fewer rows than one optimizer step, or prompts in both training and held-out data.
    """
    from orpo.data.dataset import find_overlap
    from orpo.data.template import make_encoder
    from orpo.models.load import load_tokenizer
    from orpo.models.newtokens import positions_of
    from orpo.run.config import read_model_config

    # Sources are opened before the tokenizer is fetched: a missing column is told in the first second. Their rows pass through as a
    # stream, so that texts are never held together: what stays in memory is ids.
    prompts = _Prompts()
    train_rows = prompts.watch(_open_rows(config, args, config.train_source(), config["dataset_train_split"]))
    held_out_source = config.eval_source()
    held_out_rows = None if held_out_source is None else prompts.watch(_open_rows(config, args, *held_out_source))
    tokenizer = load_tokenizer(config["model_name_or_path"], revision=config["model_revision"], trust_remote_code=args.trust_remote_code)
    num_positions = None if args.max_length else positions_of(read_model_config(config))
    encoder = make_encoder(tokenizer, args, num_positions=num_positions)
    train, train_report = _tokenise(train_rows, encoder, args, "train rows", tell)
    held_out, held_out_report = None, None
    if held_out_rows is not None:
        held_out, held_out_report = _tokenise(held_out_rows, encoder, args, "held out", tell)
    elif config["eval_fraction"] is not None:
        train, held_out = split_by_prompt(train, config["eval_fraction"])
        tell(f"held out     {len(held_out)} rows ({config['eval_fraction']:.0%} of the prompts), {len(train)} to train on")
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_set_aside = train_report.num_groups - len(train)
    train_report.check(rows_per_step + num_set_aside, name="the training data")
    if held_out is not None:
        find_overlap(train, held_out).check(allow=args.allow_overlap)
    return RunData(train, train_report, held_out, held_out_report, encoder, tokenizer, prompts.of(held_out or []))


def agree_on_rows(train: Sequence[TokenGroup], held_out: Any) -> None:
    """Go on only if every process has the same rows, in the same order. All processes call it.

    Args:
        train: what is trained on.
        held_out: what is evaluated on: groups, a dict of them by name, or None.

    Raises:
        UserError: on process 0, naming what differs.
    """
    from orpo.data.dataset import fingerprint
    from orpo.system.group import agree
    from orpo.system.ranks import current_ranks

    if current_ranks().world_size == 1:  # a fingerprint reads every row
        return
    sets = {"training rows": train, **({} if held_out is None else held_out if isinstance(held_out, dict) else {"held-out rows": held_out})}
    agree({name: f"{len(groups)} rows, hash {fingerprint(groups)[:12]}" for name, groups in sets.items()})


class _Prompts:
    """Prompts as the rows have them, kept while rows pass by: of every row, or of every second, fourth, … where there are many."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._kept: list[dict[Where, Text]] = []

    def watch(self, rows: Iterable[Preference | Dropped]) -> Iterator[Preference | Dropped]:
        """The rows, unchanged."""
        kept: dict[Where, Text] = {}
        self._kept.append(kept)
        return self._watched(rows, kept)

    def _watched(self, rows: Iterable[Preference | Dropped], kept: dict[Where, Text]) -> Iterator[Preference | Dropped]:
        step = 1
        for number, row in enumerate(rows):
            if number % step == 0 and isinstance(row, Preference):
                kept[row.where] = row.prompt
                if len(kept) > self._most:
                    step *= 2
                    for where in list(kept)[1::2]:
                        del kept[where]
            yield row

    def of(self, groups: Sequence[TokenGroup]) -> tuple[Text, ...]:
        """Prompts of a few of the groups, from the middle of equal parts."""
        prompts = {where: prompt for kept in self._kept for where, prompt in kept.items()}
        known = [group.where for group in groups if group.where in prompts]
        count = min(NUM_PROMPTS, len(known))
        return tuple(prompts[known[len(known) * (2 * number + 1) // (2 * count)]] for number in range(count))


def _open_rows(config: RunConfig, args: ORPOConfig, source: Any, split: str | None) -> Iterator[Preference | Dropped]:
    from orpo.data.formats import stream_preferences

    column_map = args.column_map if isinstance(args.column_map, dict) else None
    return stream_preferences(  # which logs the shape it recognised
        source,
        split=split,
        column_map=column_map,
        pairs=args.pairs,
        sft_rows=args.sft_rows,
        strict=args.strict_data,
        streaming=config["dataset_streaming"],
    )


def _tokenise(
    rows: Iterable[Any], encoder: TemplateEncoder, args: ORPOConfig, name: str, tell: Tell
) -> tuple[list[TokenGroup], DataReport]:
    from orpo.data.dataset import prepare_groups

    groups, report = prepare_groups(rows, encoder, strict=args.strict_data)
    report.check(1, name=name)
    first, *rest = report.lines()
    tell(f"{name:<12} {first}")
    for line in rest:
        if not line.startswith("  warning: "):  # logged as warnings already
            tell(line)
    return groups, report


def split_by_prompt(groups: Sequence[TokenGroup], fraction: float, *, salt: bytes = b"") -> tuple[list[TokenGroup], list[TokenGroup]]:
    """Hold out a share of the prompts, all rows of a prompt on one side.

    Which ones depends on the prompts alone, so that adding rows or changing the order moves no prompt to the other side. Another `salt`
    holds out others: without one, what is left after a split would hold none of the prompts that a second split looks for.

    Raises:
        UserError: one side would be empty.
    """
    train: list[TokenGroup] = []
    held_out: list[TokenGroup] = []
    for group in groups:
        digest = hashlib.sha256(salt + group.prompt_ids.astype("<i4").tobytes()).digest()
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append(group)
    if not train or not held_out:
        side = "held out" if train else "left to train on"
        raise UserError(
            f"of {len(groups)} rows none is {side}", where="eval_fraction", expected="some rows on both sides", mend="change eval_fraction"
        )
    return train, held_out


def held_out_rows(config: RunConfig) -> tuple[list[Any], float | None]:
    """(rows, fraction): the run's evaluation rows; with `eval_fraction` all training rows, of which that share of the prompts counts.

    Raises:
        UserError: the run holds nothing out.
    """
    source = config.eval_source()
    fraction = config["eval_fraction"]
    if source is None and fraction is None:
        raise UserError("the run holds no rows out", where="pairs", mend="name rows it has not seen: --data FILE, folder or hub id")
    if source is None:
        source = config.train_source(), config["dataset_train_split"]
    return read_rows(source[0], source[1], config), fraction


def read_rows(source: Any, split: str | None, config: RunConfig | None) -> list[Any]:
    """Preferences and dropped rows of a source (the packaged demo data by its name), read as the run reads its own."""
    from orpo.data.formats import load_preferences
    from orpo.data.reading.sources import DEMO_DATA

    if source == DEMO_DATA and split is None:
        split = "test"
    options = {"column_map": config["column_map"], "pairs": config["pairs"]} if config is not None else {}
    preferences, dropped, _ = load_preferences(source, split=split, **{name: value for name, value in options.items() if value is not None})
    return [*preferences, *dropped]


def held_out_groups(rows: list[Any], fraction: float | None, encoder: TemplateEncoder) -> tuple[list[TokenGroup], Any]:
    """(groups with a pair, report)."""
    from orpo.data.dataset import prepare_groups

    groups, report = prepare_groups(rows, encoder)
    if fraction is not None:
        groups = split_by_prompt(groups, fraction)[1]
    groups = [group for group in groups if group.pairs]
    if not groups:
        report.check(1, name="the rows to evaluate on")
        raise UserError("no row has a pair", where="pairs", expected="rows with a chosen and a rejected answer")
    return groups, report


def as_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, *, encoder: TemplateEncoder | None = None, is_training: bool = False, model: Any = None
) -> tuple[list[TokenGroup], DataReport | None, TemplateEncoder | None]:
    """Token groups from whatever the rows are; (groups, report, encoder), the last two None where groups were given as such.

    Raises:
        UserError: nothing usable in the data, or less than one optimizer step of training rows where that was asked for.
    """
    if _is_groups(rows):
        return list(rows), None, encoder
    from orpo.data.dataset import prepare_groups
    from orpo.data.formats import load_preferences
    from orpo.models.newtokens import positions_of

    if encoder is None:
        encoder = make_encoder(tokenizer, args, num_positions=positions_of(getattr(model, "config", None)))
    if isinstance(rows, Sequence) and not isinstance(rows, str) and rows and isinstance(rows[0], Preference):
        items: list[Any] = list(rows)
    else:
        column_map = args.column_map if isinstance(args.column_map, dict) else None
        preferences, dropped, shape = load_preferences(
            rows, column_map=column_map, pairs=args.pairs, sft_rows=args.sft_rows, strict=args.strict_data
        )
        logger.info("%s", shape)
        items = [*preferences, *dropped]
    groups, report = prepare_groups(items, encoder, strict=args.strict_data)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    report.check(rows_per_step if is_training else 1)
    for line in report.lines():
        (logger.info if is_training else logger.debug)("%s", line)
    return groups, report, encoder


def as_eval_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, train_groups: Sequence[TokenGroup], encoder: TemplateEncoder | None
) -> tuple[Any, DataReport | None]:
    """(groups of the evaluation rows, report); for a dict of sets a dict of groups, and no report.

    Raises:
        UserError: nothing usable in them, or prompts that are trained on and not allowed to.
    """
    if rows is None:
        return None, None
    if isinstance(rows, dict):
        return {name: as_eval_groups(item, tokenizer, args, train_groups, encoder)[0] for name, item in rows.items()}, None
    groups, report, _ = as_groups(rows, tokenizer, args, encoder=encoder)
    if report is not None:
        from orpo.data.dataset import find_overlap

        find_overlap(train_groups, groups).check(allow=args.allow_overlap)
    return groups, report


def _is_groups(rows: Any) -> bool:
    return isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and isinstance(rows[0], TokenGroup)
