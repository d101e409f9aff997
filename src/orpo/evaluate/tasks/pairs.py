"""The task `pairs`: held-out pairs before and after, in slices, and a few pairs token by token for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.errors import UserError
from orpo.evaluate.logprobs import means_of
from orpo.evaluate.pairs import paired_difference, slice_pairs, summarise
from orpo.evaluate.task import Record, Task, TaskOption, register
from orpo.evaluate.wording import interval
from orpo.report.sections import Cell, Row, Table, bars, estimate, power
from orpo.report.shown import Shown

if TYPE_CHECKING:
    from orpo.data.types import Dropped, Preference, TokenGroup
    from orpo.evaluate.session import Session
    from orpo.inference.ready import Subject
    from orpo.inference.scores import TokenScores

NUM_SHOWN = 8
"""Pairs that are kept token by token."""
_ROW_FACTS = ("num_rows", "num_sft_only", "dropped", "notes")
_ROWS = (
    ("accuracy", ".1%"),
    ("log_odds_accuracy", ".1%"),
    ("margin", "+.3f"),
    ("log_odds_ratio", "+.3f"),
    ("chosen_logp", "+.3f"),
    ("rejected_logp", "+.3f"),
)


@dataclass(frozen=True)
class _Measured:
    """What a model says of the pairs. Its tokenizer may stay when it goes: that one is small."""

    groups: list[TokenGroup]
    logps: TokenScores
    report: Any
    tokenizer: Any

    @property
    def scores(self) -> list[np.ndarray]:
        return means_of(self.logps)


@register
class PairsTask(Task):
    """Accuracy, margin and log-probabilities of the model, of the one to compare with, and the change."""

    name = "pairs"
    help = "held-out preference pairs: accuracy, margin, log-probabilities"
    generates = asks_judge = False
    options = (
        TaskOption("data", "rows with chosen and rejected answers (those that the run held out)"),
        TaskOption("split", "split of --data"),
        TaskOption(
            "slices", "length_difference or a column; repeatable", metavar="COLUMN", is_repeated=True, default=("length_difference",)
        ),
    )

    def __init__(self) -> None:
        self._rows: list[Preference | Dropped] = []
        self._measured: dict[str, _Measured] = {}

    def prepare(self, session: Session) -> tuple[str, ...]:
        self._rows = _rows(session)
        return session.sides

    def measure(self, session: Session, which: str, subject: Subject) -> None:
        from orpo.run.data import groups_with_pairs

        groups, report = groups_with_pairs(self._rows, subject.encoder)
        groups = groups[: session.options.limit]
        self._measured[which] = _Measured(groups, session.logps(groups, "pairs", which), report, subject.tokenizer)

    def run(self, session: Session) -> Record:
        from orpo.data.dataset import fingerprint

        options, model = session.options, self._measured["model"]
        found: Record = {
            "data": options.data or "rows that the run held out",
            "rows": {name: value for name, value in model.report.to_dict().items() if name in _ROW_FACTS},
            "fingerprint": fingerprint(model.groups),
            "model": summarise(model.groups, model.scores, seed=options.seed).to_dict(),
            "slices": {
                by: {label: part.to_dict() for label, part in slice_pairs(model.groups, model.scores, by, seed=options.seed).items()}
                for by in options.slices
            },
        }
        if "against" in self._measured:
            against = self._measured["against"]
            found["against"] = summarise(against.groups, against.scores, seed=options.seed).to_dict()
            found |= _change(against, model, options.seed)
        return found

    def lines(self, result: Record) -> Iterator[str]:
        model, before, change = result["model"], result.get("against"), result.get("change")
        yield f"{model['num_pairs']} pairs of {model['num_prompts']} prompts: {result['data']}"
        for name, style in _ROWS:
            parts = [f"{name:<18} {interval(model[name], style):<28}"]
            if before is not None:
                parts.append(f"before {interval(before[name], style):<28}")
            if change is not None and name in change:
                parts.append(f"change {interval(change[name], style.replace('.1%', '+.1%'))}")
            yield " ".join(parts).rstrip()
        yield "margin and log-probabilities are in nats per token"
        if change is not None and (said := power(change["accuracy"], "a change of accuracy", num=change["num_prompts"])):
            yield said
        for by, parts_by in result["slices"].items():
            for label, part in parts_by.items():
                text = f"accuracy {interval(part['accuracy'], '.1%')}, margin {interval(part['margin'], '+.3f')}"
                yield f"{by} = {label}: {part['num_pairs']} pairs, {text}"

    def show(self, result: Record) -> Shown:
        shown = Shown("Held-out pairs in slices", "Slices")
        for by, found in result["slices"].items():
            rows: list[Row] = [
                [
                    Cell(str(name)),
                    Cell(str(part["num_pairs"])),
                    estimate(part["accuracy"], ".1%"),
                    estimate(part["margin"], "+.3f"),
                    bar,
                ]
                for (name, part), bar in zip(found.items(), bars([part["margin"] for part in found.values()]), strict=True)
            ]
            columns = (str(by).replace("_", " "), "pairs", "accuracy", "margin, nats per token", "margin, from 0")
            shown.tables.append(Table(columns, rows))
        return shown


def _rows(session: Session) -> list[Preference | Dropped]:
    """The rows that `--data` names, read as the run reads its own, or those that the run held out."""
    # Rows are read by what training reads them with, which imports torch; the task itself is imported for `--help`.
    from orpo.data.settings import DataSettings
    from orpo.inference.ready import run_encoder
    from orpo.run.config import demo_test
    from orpo.run.data import held_out_rows, read_rows
    from orpo.run.keys import key_defaults

    options, target = session.options, session.target
    config = target.config if target is not None else None
    if options.data is not None:
        settings = DataSettings.of(key_defaults()) if config is None else config.data_settings()
        return list(read_rows(settings, options.data if options.split else demo_test(options.data), options.split))
    if config is None or target is None:
        told = f": {options.target} is no run, which would have held some out" if options.target else ""
        raise UserError(
            f"there are no pairs to evaluate{told}",
            where="pairs",
            mend="a run's folder, or --data FILE, folder or hub id with chosen and rejected answers",
        )
    return held_out_rows(config, lambda: run_encoder(target))


def _change(against: _Measured, model: _Measured, seed: int) -> Record:
    """The paired difference over the rows that both models have, and some of them token by token."""
    old, new = _by_place(against), _by_place(model)
    common = [where for where in new if where in old and _same_pairs(new[where][0], old[where][0])]
    if not common:
        return {"note": "no row has the same pairs for both models"}
    groups = [new[where][0] for where in common]
    before, after = (means_of([side[where][1] for where in common]) for side in (old, new))
    change = paired_difference(groups, before, after, seed=seed)
    picked = [common[index] for index in pick_shown(groups, before, after)]
    return {
        "change": change.to_dict(),
        "shown": [
            {"where": str(where), "model": _token_view(model, *new[where]), "against": _token_view(against, *old[where])}
            for where in picked
        ],
    }


def _by_place(measured: _Measured) -> Mapping[Any, tuple[TokenGroup, tuple[np.ndarray, ...]]]:
    return {group.where: (group, logps) for group, logps in zip(measured.groups, measured.logps, strict=True)}


def _same_pairs(one: TokenGroup, other: TokenGroup) -> bool:
    return one.pairs == other.pairs and len(one.response_ids) == len(other.response_ids)


def pick_shown(groups: Sequence[TokenGroup], before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> list[int]:
    """Rows to show: those whose margin changed most, in both directions, and the most ordinary ones."""

    def margin(scores: Sequence[np.ndarray], row: int) -> float:
        chosen, rejected = groups[row].pairs[0]
        return float(scores[row][chosen] - scores[row][rejected])

    order = sorted(range(len(groups)), key=lambda row: margin(after, row) - margin(before, row))
    middle = len(order) // 2
    picks = [*order[::-1][: NUM_SHOWN // 2], *order[: NUM_SHOWN // 4], *order[middle : middle + NUM_SHOWN // 4]]
    return list(dict.fromkeys(picks))[:NUM_SHOWN]


def _token_view(measured: _Measured, group: TokenGroup, logps: Sequence[np.ndarray]) -> Record:
    """Prompt, and the first pair's answers as tokens with their log-probabilities, to four digits."""
    decode = measured.tokenizer.decode
    view: Record = {"prompt": decode(group.prompt_ids.tolist())}
    for side, response in zip(("chosen", "rejected"), group.pairs[0], strict=True):
        texts = [decode([int(token)]) for token in group.response_ids[response]]
        view[side] = {"tokens": texts, "logps": [round(float(value), 4) for value in logps[response]]}
    return view
