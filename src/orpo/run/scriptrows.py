"""Rows that a script gives to the trainer, brought into groups: the same reading and tokenising as for a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.data.settings import DataSettings
from orpo.data.stored.groups import StoredGroups
from orpo.data.stored.windows import WindowedGroups
from orpo.data.types import Preference, TokenGroup
from orpo.run.data import open_stream, read_rows

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig
    from orpo.data.dataset import DataReport
    from orpo.data.template import TemplateEncoder

logger = logging.getLogger(__name__)


def as_training_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, model: Any
) -> tuple[Sequence[TokenGroup] | WindowedGroups, DataReport | None, TemplateEncoder | None]:
    """As `as_groups`, of rows to train on; a stream of them where that was asked for."""
    if isinstance(rows, WindowedGroups):
        return rows, None, None
    if not args.streaming or _is_groups(rows):
        return as_groups(rows, tokenizer, args, is_training=True, model=model)
    from orpo.data.template import make_encoder
    from orpo.models.newtokens import positions_of

    settings = DataSettings.of(vars(args))
    encoder = make_encoder(tokenizer, settings, num_positions=positions_of(getattr(model, "config", None)))
    stream = open_stream((rows, None), settings, encoder, args, None, lambda line: logger.info("%s", line))
    return stream, stream.report, encoder


def as_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, *, encoder: TemplateEncoder | None = None, is_training: bool = False, model: Any = None
) -> tuple[Sequence[TokenGroup], DataReport | None, TemplateEncoder | None]:
    """Token groups from whatever the rows are; (groups, report, encoder), the last two None where groups were given as such.

    Raises:
        UserError: nothing usable in the data, or less than one optimizer step of training rows where that was asked for.
    """
    if _is_groups(rows):
        return rows if isinstance(rows, StoredGroups) else list(rows), None, encoder
    from orpo.data.dataset import prepare_groups
    from orpo.data.stored.tokenise import Means, tokenise_source
    from orpo.data.template import make_encoder
    from orpo.models.newtokens import positions_of

    settings = DataSettings.of(vars(args))
    if encoder is None:
        encoder = make_encoder(tokenizer, settings, num_positions=positions_of(getattr(model, "config", None)))
    is_read = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and isinstance(rows[0], Preference)
    groups: Sequence[TokenGroup]
    if is_read:
        groups, report = prepare_groups(rows, encoder, strict=args.strict_data)
    else:
        means = Means(args.dataset_num_proc, args.token_cache)
        # Opened here, though the cache may have them: what is wrong with a source is told, and its shape, at every start alike.
        opened = [read_rows(settings, rows)] if isinstance(rows, (str, Path)) else []

        def open_rows() -> Iterator[Any]:
            return opened.pop() if opened else read_rows(settings, rows, is_again=isinstance(rows, (str, Path)))

        made = tokenise_source(open_rows, encoder, spec=rows, split=None, settings=settings, means=means)
        groups, report = made.groups, made.report
        if made.note:
            logger.info("%s", made.note)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    report.check(rows_per_step if is_training else 1)
    for line in report.lines():
        usual = logging.INFO if is_training else logging.DEBUG
        # Also for somebody who has set up no logging.
        logger.log(logging.WARNING if line.startswith("  dropped ") else usual, "%s", line)
    return groups, report, encoder


def as_eval_groups(
    rows: Any, tokenizer: Any, args: ORPOConfig, train_groups: Sequence[TokenGroup] | WindowedGroups, encoder: TemplateEncoder | None
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
        seen = train_groups.first if isinstance(train_groups, WindowedGroups) else train_groups
        find_overlap(seen, groups).check(allow=True)
    return groups, report


def _is_groups(rows: Any) -> bool:
    return isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and isinstance(rows[0], TokenGroup)
