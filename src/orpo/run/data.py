"""The rows of a run: read, judged, tokenised, and split, before any weights are loaded.

The one door to rows. Every command that looks at data (train, check, plan, audit, preview, eval, chat, compare) reads them by `read_rows`
and tokenises them with `make_encoder`, both under the settings of one configuration: what is checked, shown or evaluated is what is
trained on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orpo.data.settings import DataSettings
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


def read_rows(settings: DataSettings, source: Any, split: str | None = None) -> Iterator[Preference | Dropped]:
    """The rows of any source, judged: preferences, and in their places the rows that make none. They pass by as a stream.

    Raises:
        DataError: the source is missing, damaged, or holds no preferences (at once); or what is wrong further on in it.
    """
    from orpo.data.formats import stream_preferences

    return stream_preferences(  # which logs the shape it recognised
        source,
        split=split,
        column_map=settings.column_map,
        pairs=settings.pairs,
        sft_rows=settings.sft_rows,
        strict=settings.strict_data,
        streaming=settings.dataset_streaming,
    )


@dataclass(frozen=True)
class RunRows:
    """The rows that a configuration names, both sources opened and found to be usable, neither read to its end.

    Attributes:
        train: to train on; those of `eval_fraction` among them.
        held_out: of a source of their own, else None.
    """

    train: Iterator[Preference | Dropped]
    held_out: Iterator[Preference | Dropped] | None


def open_run_rows(config: RunConfig, settings: DataSettings | None = None) -> RunRows:
    """Open what a configuration names to train and to evaluate on, so that a split or a column that is not there is told at once.

    Args:
        settings: None for those of the configuration.
    """
    settings = config.data_settings() if settings is None else settings
    train = read_rows(settings, config.train_source(), config["dataset_train_split"])
    evaluation = config.eval_source()
    return RunRows(train, None if evaluation is None else read_rows(settings, *evaluation))


def load_encoder(
    config: RunConfig, *, model: str | None = None, tokenizer: str | None = None, date: str | None = None, **replaced: Any
) -> TemplateEncoder:
    """The encoder of a configuration. Tokenizer and model configuration are loaded, no weights.

    Args:
        model: another model than the configuration's, such as the run's own folder.
        tokenizer: the name of a tokenizer to take in place of the model's.
        date: what a template that asks for today gets; that of the run's first start, if not given, else now.
        replaced: settings that go before the configuration's.

    Raises:
        UserError: there is no such tokenizer, or it cannot be used with the template.
    """
    from orpo.data.template import make_encoder
    from orpo.models.load import load_tokenizer
    from orpo.models.newtokens import positions_of
    from orpo.run.config import read_model_config

    settings = replace(config.data_settings(), **replaced)
    model = model or config["model_name_or_path"]
    loaded = load_tokenizer(tokenizer or str(model), revision=config["model_revision"], trust_remote_code=bool(config["trust_remote_code"]))
    num_positions = None if settings.max_length or model is None else positions_of(read_model_config(config, model))
    return make_encoder(loaded, settings, num_positions=num_positions, date=date or kept_date(config))


def kept_date(config: RunConfig) -> str | None:
    """What a template's today was when the run of this configuration first started, as ISO 8601; None where it has not, or prints none."""
    from orpo.run.folder import RunFolder

    return RunFolder(config["output_dir"]).template_date() if config["output_dir"] else None


def prepare_data(config: RunConfig, args: ORPOConfig, tell: Tell, *, rows_per_step: int | None = None, date: str | None = None) -> RunData:
    """Read, judge and tokenise all rows. The model's tokenizer is loaded, its weights are not.

    Args:
        config, args: the run's.
        tell: receives lines for the user.
        rows_per_step: of a run that goes on, whatever the number of processes is now.

    Raises:
        UserError: nothing usable, fewer rows than one optimizer step, or prompts in both training and held-out data.
    """
    from orpo.data.dataset import find_overlap

    # Sources are opened before the tokenizer is fetched: a missing column is told in the first second. Their rows pass through as a
    # stream, so that texts are never held together: what stays in memory is ids.
    prompts = _Prompts()
    rows = open_run_rows(config)
    train_rows, held_out_rows = prompts.watch(rows.train), None if rows.held_out is None else prompts.watch(rows.held_out)
    encoder = load_encoder(config, date=date)
    if date := date or kept_date(config):
        tell(f"date         the chat template's today is {date[:10]}, as at the run's first start")
    train, train_report = _tokenise(train_rows, encoder, "train rows", tell)
    held_out, held_out_report = None, None
    if held_out_rows is not None:
        held_out, held_out_report = _tokenise(held_out_rows, encoder, "held out", tell)
    elif config["eval_fraction"] is not None:
        train, held_out = split_by_prompt(train, config["eval_fraction"])
        tell(f"held out     {len(held_out)} rows ({config['eval_fraction']:.0%} of the prompts), {len(train)} to train on")
    rows_per_step = rows_per_step or args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_set_aside = train_report.num_groups - len(train)
    train_report.check(rows_per_step + num_set_aside, name="the training data")
    if held_out is not None:
        find_overlap(train, held_out).check(allow=args.allow_overlap)
    return RunData(train, train_report, held_out, held_out_report, encoder, encoder.tokenizer, prompts.of(held_out or []))


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


def _tokenise(rows: Iterable[Any], encoder: TemplateEncoder, name: str, tell: Tell) -> tuple[list[TokenGroup], DataReport]:
    from orpo.data.dataset import prepare_groups

    groups, report = prepare_groups(rows, encoder, strict=encoder.is_strict)
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
        (held_out if _is_held_out(group, fraction, salt) else train).append(group)
    if not train or not held_out:
        side, other = ("held out", min(0.5, max(0.2, 2 * fraction))) if train else ("left to train on", fraction / 2)
        raise UserError(
            f"of {len(groups)} rows none is {side}",
            where="eval_fraction",
            expected="some rows on both sides",
            mend=f"eval_fraction: {other:g}, or more rows, or others to evaluate on: eval_dataset_name: FILE",
        )
    return train, held_out


def _is_held_out(group: TokenGroup, fraction: float, salt: bytes = b"") -> bool:
    digest = hashlib.sha256(salt + group.prompt_ids.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def held_out_rows(config: RunConfig, load: Callable[[], TemplateEncoder]) -> list[Preference | Dropped]:
    """The rows that a run holds out, with their texts: of their own source, or those of the prompts that `eval_fraction` sets aside.

    Args:
        load: gives the encoder that the run trained with. Which prompts were set aside depends on its ids, whoever is asked about them.

    Raises:
        UserError: the run holds nothing out.
    """
    from orpo.data.dataset import encode_rows

    fraction = config["eval_fraction"]
    rows = open_run_rows(config)
    if rows.held_out is not None:
        return list(rows.held_out)
    if fraction is None:
        raise UserError("the run holds no rows out", where="pairs", mend="name rows it has not seen: --data FILE, folder or hub id")
    encoded = encode_rows(rows.train, load())
    return [row for row, result in encoded if isinstance(result, TokenGroup) and _is_held_out(result, fraction)]


def groups_with_pairs(rows: Iterable[Preference | Dropped], encoder: TemplateEncoder) -> tuple[list[TokenGroup], DataReport]:
    """(groups that have a pair, report of all rows): SFT-only rows say nothing of preferences.

    Raises:
        UserError: none is left.
    """
    from orpo.data.dataset import prepare_groups

    groups, report = prepare_groups(rows, encoder)
    report.check(1, name="the rows to evaluate on")
    groups = [group for group in groups if group.pairs]
    if not groups:
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
    from orpo.data.template import make_encoder
    from orpo.models.newtokens import positions_of

    settings = DataSettings.of(vars(args))
    if encoder is None:
        encoder = make_encoder(tokenizer, settings, num_positions=positions_of(getattr(model, "config", None)))
    is_read = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and isinstance(rows[0], Preference)
    groups, report = prepare_groups(rows if is_read else read_rows(settings, rows), encoder, strict=args.strict_data)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    report.check(rows_per_step if is_training else 1)
    for line in report.lines():
        usual = logging.INFO if is_training else logging.DEBUG
        # Also for somebody who has set up no logging.
        logger.log(logging.WARNING if line.startswith("  dropped ") else usual, "%s", line)
    return groups, report, encoder


def as_eval_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, train_groups: Sequence[TokenGroup], encoder: TemplateEncoder | None
) -> tuple[Any, DataReport | None]:
    """(groups of the evaluation rows, report); for a dict of sets a dict of groups, and no report.

    Raises:
        UserError: nothing usable in them.
    """
    if rows is None:
        return None, None
    if isinstance(rows, dict):
        return {name: as_eval_groups(item, tokenizer, args, train_groups, encoder)[0] for name, item in rows.items()}, None
    groups, report, _ = as_groups(rows, tokenizer, args, encoder=encoder)
    if report is not None:
        from orpo.data.dataset import find_overlap

        # A warning alone: a script has chosen its rows itself, and ran with TRL. Where a configuration names them, the run stops.
        find_overlap(train_groups, groups).check(allow=True)
    return groups, report


def _is_groups(rows: Any) -> bool:
    return isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and isinstance(rows[0], TokenGroup)
