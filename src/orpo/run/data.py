"""The rows of a run: read, judged, tokenised, and split, before any weights are loaded.

The one door to rows. Every command that looks at data (train, check, plan, audit, preview, eval, chat, compare) reads them by `read_rows`
and tokenises them with `make_encoder`, both under the settings of one configuration: what is checked, shown or evaluated is what is
trained on.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.data.settings import DataSettings
from orpo.data.stored.groups import StoredGroups
from orpo.data.stored.measures import measures_of, prompt_hash
from orpo.data.stored.windows import WindowedGroups
from orpo.data.types import Dropped, Preference, Text, TokenGroup, Where
from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig
    from orpo.data.dataset import DataReport
    from orpo.data.stored.tokenise import TokenisedRows
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
        train, train_report: what is trained on (in memory, in the token cache, or a stream), and what became of every row, of a stream's
            first window.
        held_out, held_out_report: what is evaluated on; None where nothing is.
        encoder, tokenizer: what made them.
        prompts: a few held-out prompts, spread over the rows, as text or messages: to show answers to.
    """

    train: Sequence[TokenGroup] | WindowedGroups
    train_report: DataReport
    held_out: Sequence[TokenGroup] | None
    held_out_report: DataReport | None
    encoder: TemplateEncoder
    tokenizer: Any
    prompts: tuple[Text, ...] = ()

    @property
    def known_rows(self) -> Sequence[TokenGroup]:
        """Rows to train on, to look at: all of them, or those of a stream's first window."""
        return self.train.first if isinstance(self.train, WindowedGroups) else self.train

    def facts(self) -> dict[str, Any]:
        """What run.json says of the rows."""
        from orpo.data.dataset import fingerprint

        return {
            "fingerprint": fingerprint(self.train),
            "train": self.train_report.to_dict(),
            "held_out": self.held_out_report.to_dict() if self.held_out_report else None,
            "held_out_fingerprint": None if self.held_out is None else fingerprint(self.held_out),
            "num_held_out": len(self.held_out) if self.held_out is not None else 0,
            "template": self.encoder.describe(),
        }

    def stream_lines(self) -> list[str]:
        """Of a stream: what became of the rows that were read."""
        if not isinstance(self.train, WindowedGroups):
            return []
        return [f"stream       {self.train_report.lines()[0]}, of what was read", *self.train_report.histogram()]


def read_rows(
    settings: DataSettings, source: Any, split: str | None = None, *, is_again: bool = False, is_endless: bool = False
) -> Iterator[Preference | Dropped]:
    """The rows of any source, judged: preferences, and in their places the rows that make none. They pass by as a stream.

    Args:
        is_again: the source was opened before, and its shape is not told once more.
        is_endless: it is never read to its end, and over the network as it is needed.

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
        streaming=settings.dataset_streaming or is_endless,
        is_again=is_again,
        is_endless=is_endless,
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
    train = read_rows(settings, config.train_source(), config["dataset_train_split"], is_endless=config["streaming"])
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
    # stream, so that texts are never held together.
    settings = config.data_settings()
    rows = open_run_rows(config, settings)
    encoder = load_encoder(config, date=date)
    if date := date or kept_date(config):
        tell(f"date         the chat template's today is {date[:10]}, as at the run's first start")
    named = config.train_source(), config["dataset_train_split"]
    held_out: Sequence[TokenGroup] | None = None
    held_out_report: DataReport | None = None
    if args.streaming:
        shown: tuple[Text, ...] = ()
        if rows.held_out is not None:
            made = _tokenise(rows.held_out, config.eval_source(), settings, encoder, args, "held out", tell)
            held_out, held_out_report, shown = made.groups, made.report, _shown_prompts(made.prompts, made.groups)
        stream = open_stream(named, settings, encoder, args, held_out, tell)
        return RunData(stream, stream.report, held_out, held_out_report, encoder, encoder.tokenizer, shown)
    made = _tokenise(rows.train, named, settings, encoder, args, "train rows", tell)
    train, train_report, prompts = made.groups, made.report, dict(made.prompts)
    if rows.held_out is not None:
        made = _tokenise(rows.held_out, config.eval_source(), settings, encoder, args, "held out", tell)
        held_out, held_out_report = made.groups, made.report
        prompts |= made.prompts
    elif config["eval_fraction"] is not None:
        train, held_out = split_by_prompt(train, config["eval_fraction"])
        tell(f"held out     {len(held_out)} rows ({config['eval_fraction']:.0%} of the prompts), {len(train)} to train on")
    rows_per_step = rows_per_step or args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_set_aside = train_report.num_groups - len(train)
    train_report.check(rows_per_step + num_set_aside, name="the training data")
    if held_out is not None:
        find_overlap(train, held_out).check(allow=args.allow_overlap)
    return RunData(train, train_report, held_out, held_out_report, encoder, encoder.tokenizer, _shown_prompts(prompts, held_out or []))


def open_stream(
    named: Any, settings: DataSettings, encoder: TemplateEncoder, args: ORPOConfig, held_out: Sequence[TokenGroup] | None, tell: Tell
) -> WindowedGroups:
    """The stream of a source, its first window read.

    Args:
        named: the source and its split.
        held_out: what is evaluated on; its prompts are not trained on, unless that is allowed.

    Raises:
        UserError: nothing usable in the first window, or a source that can be read once alone.
    """
    from orpo.data.dataset import log_warnings
    from orpo.data.reading.sources import as_sources
    from orpo.data.stored.tokenise import Means

    spec, split = named
    if isinstance(spec, Iterator):
        raise UserError("can be read once alone", where="train_dataset", expected="a path, or a data set that can be read again")
    sources = [asdict(replace(source, path=source.label)) for source in as_sources(spec, split=split, column_map=settings.column_map)]
    found = WindowedGroups(
        lambda: read_rows(settings, spec, split, is_again=True, is_endless=True),
        encoder,
        window_rows=args.stream_window,
        seed=args.seed if args.data_seed is None else args.data_seed,
        means=Means(args.dataset_num_proc),
        set_aside=frozenset() if held_out is None or args.allow_overlap else frozenset(measures_of(held_out).prompt_hash.tolist()),
        source={"sources": sources, "settings": asdict(settings)},
    )
    log_warnings(found.report)
    first, *rest = found.report.lines()
    tell(f"stream       {first}, in the first window; duplicates are looked for inside a window")
    for line in rest:
        if not line.startswith("  warning: "):
            tell(line)
    return found


def agree_on_rows(train: Sequence[TokenGroup] | WindowedGroups, held_out: Any) -> None:
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
    seen = train.first if isinstance(train, WindowedGroups) else train
    sets = {"training rows": seen, **({} if held_out is None else held_out if isinstance(held_out, dict) else {"held-out rows": held_out})}
    agree({name: f"{len(groups)} rows, hash {fingerprint(groups)[:12]}" for name, groups in sets.items()})


def _shown_prompts(prompts: Mapping[Where, Text], groups: Sequence[TokenGroup]) -> tuple[Text, ...]:
    """Prompts of a few of the groups, from the middle of equal parts."""
    known = [where for where in _places(groups) if where in prompts]
    count = min(NUM_PROMPTS, len(known))
    return tuple(prompts[known[len(known) * (2 * number + 1) // (2 * count)]] for number in range(count))


def _tokenise(
    rows: Iterator[Any], named: Any, settings: DataSettings, encoder: TemplateEncoder, args: ORPOConfig, name: str, tell: Tell
) -> TokenisedRows:
    """The groups of a source that is opened already, and lines about them.

    Args:
        named: the source and its split.
    """
    from orpo.data.stored.tokenise import Means, tokenise_source

    spec, split = named
    opened = [rows]

    def open_rows() -> Iterator[Preference | Dropped]:
        return opened.pop() if opened else read_rows(settings, spec, split, is_again=True)

    means = Means(args.dataset_num_proc, args.token_cache)
    made = tokenise_source(open_rows, encoder, spec=spec, split=split, settings=settings, means=means, tell=tell)
    made.report.check(1, name=name)
    first, *rest = made.report.lines()
    tell(f"{name:<12} {first}")
    for line in rest:
        if not line.startswith("  warning: "):  # logged as warnings already
            tell(line)
    if made.note:
        tell(f"             {made.note}")
    return made


def split_by_prompt(
    groups: Sequence[TokenGroup], fraction: float, *, salt: bytes = b""
) -> tuple[Sequence[TokenGroup], Sequence[TokenGroup]]:
    """Hold out a share of the prompts, all rows of a prompt on one side.

    Which ones depends on the prompts alone, so that adding rows or changing the order moves no prompt to the other side. Another `salt`
    holds out others: without one, what is left after a split would hold none of the prompts that a second split looks for.

    Raises:
        UserError: one side would be empty.
    """
    if salt:
        is_held_out = np.array([_is_held_out(group, fraction, salt) for group in groups], dtype=bool)
    else:
        is_held_out = measures_of(groups).prompt_hash < np.uint64(_limit(fraction))
    sides = [np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)]
    if not all(map(len, sides)):
        side, other = ("held out", min(0.5, max(0.2, 2 * fraction))) if len(sides[0]) else ("left to train on", fraction / 2)
        raise UserError(
            f"of {len(groups)} rows none is {side}",
            where="eval_fraction",
            expected="some rows on both sides",
            mend=f"eval_fraction: {other:g}, or more rows, or others to evaluate on: eval_dataset_name: FILE",
        )
    train, held_out = (groups.take(side) if isinstance(groups, StoredGroups) else [groups[int(row)] for row in side] for side in sides)
    return train, held_out


def _limit(fraction: float) -> int:
    """Below this a prompt's hash is held out: for whole numbers the same as below `fraction * 2**64`."""
    return math.ceil(fraction * 2**64)


def _is_held_out(group: TokenGroup, fraction: float, salt: bytes = b"") -> bool:
    return prompt_hash(group.prompt_ids, salt) < _limit(fraction)


def held_out_rows(config: RunConfig, load: Callable[[], TemplateEncoder]) -> list[Preference | Dropped]:
    """The rows that a run holds out, with their texts: of their own source, or those of the prompts that `eval_fraction` sets aside.

    Args:
        load: gives the encoder that the run trained with. Which prompts were set aside depends on its ids, whoever is asked about them.

    Raises:
        UserError: the run holds nothing out.
    """
    from orpo.data.stored.tokenise import Means, tokenise_source

    fraction, settings = config["eval_fraction"], config.data_settings()
    rows = open_run_rows(config, settings)
    if rows.held_out is not None:
        return list(rows.held_out)
    if fraction is None:
        raise UserError("the run holds no rows out", where="pairs", mend="name rows it has not seen: --data FILE, folder or hub id")
    spec, split = config.train_source(), config["dataset_train_split"]
    made = tokenise_source(
        lambda: read_rows(settings, spec, split, is_again=True),
        load(),
        spec=spec,
        split=split,
        settings=settings,
        means=Means(config["dataset_num_proc"], config["token_cache"]),
    )
    set_aside = measures_of(made.groups).prompt_hash < np.uint64(_limit(fraction))
    held_out = set(itertools.compress(_places(made.groups), set_aside))
    return [row for row in rows.train if row.where in held_out and isinstance(row, Preference)]


def _places(groups: Sequence[TokenGroup]) -> Iterator[Where]:
    return groups.places() if isinstance(groups, StoredGroups) else (group.where for group in groups)


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
