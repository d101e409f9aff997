"""AlpacaEval 2: answers to 805 instructions against a reference model's, by a judge; raw and length-controlled win rate.

Instructions and reference outputs are read from files or the hub; none ships with this package. The length-controlled rate is the
`alpaca_eval` package's own (extra `alpaca`): a logistic regression that asks how the judge would have decided at equal lengths. It needs
the table `df_gamed.csv` of the hub's tatsu-lab/alpaca_eval, or a folder that has it.

Source: Length-Controlled AlpacaEval (arXiv 2404.04475).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import DataError, OrpoError, UserError
from orpo.evaluate.bootstrap import Estimate, estimate_share
from orpo.evaluate.judging.judges import Conversation, Judge, Reply, ask_all, fill
from orpo.evaluate.judging.local import RewardModel
from orpo.evaluate.judging.verdicts import read_model_name
from orpo.evaluate.task import Record, Task, TaskOption, register
from orpo.evaluate.wording import gaps, interval, power_of_rate
from orpo.report.shown import Drawing, Score, Shown
from orpo.system.installing import pip_line

if TYPE_CHECKING:
    from orpo.evaluate.cache import Cache
    from orpo.evaluate.session import Session

logger = logging.getLogger(__name__)

HUB_ID = "tatsu-lab/alpaca_eval"
HUB_REFERENCE = "alpaca_eval_gpt4_baseline.json"
TABLES = ("df_gamed.csv", "instruction_difficulty.csv")
MAX_NEW_TOKENS = 2048
JUDGE_TOKENS = 8
"""The verdict is one letter; a chatty judge is malformed, not waited for."""

_PROMPT_FILE = "alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
_OWN_PROMPT = (
    ("system", "You compare the outputs of two language models and name the one that a careful reader would prefer."),
    (
        "user",
        "Instruction:\n{instruction}\n\n--- Output of model m ---\n{output_1}\n--- End ---\n\n--- Output of model M ---\n{output_2}\n"
        "--- End ---\n\nWhich model's output is better? Reply with its name alone, one letter: m or M.",
    ),
)


@dataclass(frozen=True, slots=True)
class Output:
    """A model's output for an instruction."""

    instruction: str
    output: str
    generator: str


@dataclass(frozen=True, slots=True)
class AlpacaResult:
    """Win rates over the reference, from 0 to 1.

    Attributes:
        win_rate: mean preference; its interval is over instructions.
        num_wins, num_ties, num_losses: of the model; a preference of exactly one half is a tie.
        length_controlled: the package's rate, or None with the reason in `missing`.
        mean_chars, reference_mean_chars: length of the outputs.
        num_malformed, num_unanswered: judgements that could not be read, or are not there; they count in no rate.
        prompt: which judge prompt was used.
        preferences: per instruction the model's share, None where not judged.
    """

    num_instructions: int
    num_judged: int
    win_rate: Estimate
    num_wins: int
    num_ties: int
    num_losses: int
    length_controlled: float | None
    length_controlled_error: float | None
    missing: str | None
    mean_chars: float
    reference_mean_chars: float
    num_malformed: int
    num_unanswered: int
    prompt: str
    generator: str
    reference: str
    preferences: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = [name for name in self.__slots__ if name not in ("win_rate", "preferences")]
        return {"win_rate": self.win_rate.to_dict(), **{name: getattr(self, name) for name in names}, "preferences": list(self.preferences)}


def read_outputs(source: str | Path) -> list[Output]:
    """Outputs from a JSON or JSONL file with `instruction`, `output` and (optional) `generator`.

    Raises:
        DataError: rows of another form, or none.
    """
    from orpo.data.formats import read_source

    found = []
    for where, row in read_source(str(source), None):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise DataError("not an output for AlpacaEval", where=str(where), expected="instruction and output as text")
        found.append(Output(row["instruction"], row["output"], str(row.get("generator") or Path(source).stem)))
    if not found:
        raise DataError("there are no outputs", where=str(source))
    return found


def read_reference(source: str | Path | None, *, limit: int | None = None) -> list[Output]:
    """The reference outputs, from a file or, with None, GPT-4 Turbo's from the hub."""
    if source is not None:
        return read_outputs(source)[:limit]
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(HUB_ID, HUB_REFERENCE, repo_type="dataset")
    except Exception as error:  # the hub's client raises a dozen kinds where it cannot be reached
        raise UserError(
            f"the reference outputs cannot be fetched from the hub: {type(error).__name__}",
            where="alpacaeval",
            mend=f"give a file with --alpaca_reference ({HUB_REFERENCE} of {HUB_ID}, or any model's outputs)",
        ) from error
    return read_outputs(path)[:limit]


def match_outputs(reference: Sequence[Output], outputs: Sequence[Output]) -> list[Output]:
    """A model's outputs in the order of the reference.

    Raises:
        DataError: an instruction has no output.
    """
    by_instruction = {output.instruction: output for output in outputs}
    missing = [one.instruction for one in reference if one.instruction not in by_instruction]
    if missing:
        raise DataError(f"{len(missing)} of {len(reference)} instructions have no output, first {missing[0][:80]!r}", where="alpacaeval")
    return [by_instruction[one.instruction] for one in reference]


def judge_outputs(
    reference: Sequence[Output],
    outputs: Sequence[Output],
    judge: Judge | RewardModel,
    cache: Cache,
    *,
    tables: str | Path | None = None,
    seed: int = 0,
    retry_malformed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> AlpacaResult:
    """Win rates of a model's outputs over the reference's.

    Args:
        reference, outputs: instruction by instruction, in the published order (the tables go by position).
        judge: an endpoint or model that names the better one, or a reward model.
        cache: where judgements are kept.
        tables: folder with the package's tables; None lets it fetch them.
        seed: of the interval.
        retry_malformed: ask again where a kept reply could not be read.

    Raises:
        UserError: nothing could be judged.
        JudgeUnavailable: the judge stopped answering; what it said is kept in the cache.
    """
    prompt, messages = judge_prompt()
    if isinstance(judge, RewardModel):
        prompt, preferences, num_malformed, num_unanswered = "reward model", _by_reward(reference, outputs, judge, cache, progress), 0, 0
    else:
        preferences, num_malformed, num_unanswered = _by_reading(
            reference, outputs, judge, cache, messages, retry_malformed=retry_malformed, progress=progress
        )
    judged = [preference for preference in preferences if preference is not None]
    if not judged:
        raise UserError(
            f"no output could be judged: {num_malformed} verdicts cannot be read, {num_unanswered} are missing",
            where="judge",
            mend="look at the replies in eval/cache, or take another judge",
        )
    controlled, error, missing = _length_controlled(reference, outputs, preferences, tables)
    return AlpacaResult(
        num_instructions=len(reference),
        num_judged=len(judged),
        win_rate=estimate_share(judged, seed=seed),
        num_wins=sum(preference > 0.5 for preference in judged),
        num_ties=sum(preference == 0.5 for preference in judged),
        num_losses=sum(preference < 0.5 for preference in judged),
        length_controlled=controlled,
        length_controlled_error=error,
        missing=missing,
        mean_chars=sum(len(one.output) for one in outputs) / len(outputs),
        reference_mean_chars=sum(len(one.output) for one in reference) / len(reference),
        num_malformed=num_malformed,
        num_unanswered=num_unanswered,
        prompt=prompt,
        generator=outputs[0].generator,
        reference=reference[0].generator,
        preferences=tuple(preferences),
    )


def judge_prompt() -> tuple[str, Conversation]:
    """Name and messages of the judge's prompt: AlpacaEval's own where the package is installed, else this package's."""
    with suppress(importlib.metadata.PackageNotFoundError, OSError):
        path = Path(str(importlib.metadata.distribution("alpaca_eval").locate_file(_PROMPT_FILE)))
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", path.read_text(encoding="utf-8"), re.DOTALL)
        if turns:
            return "alpaca_eval_clf", tuple({"role": role, "content": content.strip("\n")} for role, content in turns)
    return "orpo", tuple({"role": role, "content": content} for role, content in _OWN_PROMPT)


def is_swapped(instruction: str) -> bool:
    """Whether the model's output is shown first. Half of the instructions, by their text: judges lean to one place."""
    return hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


def read_preference(reply: Reply) -> float | None:
    """Share for the output shown second (M): from the log-probabilities of the two names where they are there, else 0 or 1."""
    if reply.first_logprobs:
        weights = {name: math.exp(logprob) for name, logprob in reply.first_logprobs.items() if name in ("m", "M")}
        if not weights:
            return None
        return weights.get("M", 0.0) / sum(weights.values())
    name = read_model_name(reply.text)
    return None if name is None else float(name == "M")


def _is_malformed(reply: Reply) -> bool:
    return read_preference(reply) is None


def _by_reading(
    reference: Sequence[Output],
    outputs: Sequence[Output],
    judge: Judge,
    cache: Cache,
    messages: Conversation,
    *,
    retry_malformed: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[float | None], int, int]:
    conversations = []
    for one, other in zip(reference, outputs, strict=True):
        shown = (other.output, one.output) if is_swapped(one.instruction) else (one.output, other.output)
        values = {"instruction": one.instruction, "output_1": shown[0], "output_2": shown[1]}
        conversations.append(tuple({**message, "content": fill(message["content"], values)} for message in messages))
    is_stale = _is_malformed if retry_malformed else None
    replies = ask_all(judge, conversations, cache, max_tokens=JUDGE_TOKENS, is_stale=is_stale, progress=progress).replies
    preferences: list[float | None] = []
    for one, reply in zip(reference, replies, strict=True):
        second = None if reply is None else read_preference(reply)
        preferences.append(1 - second if second is not None and is_swapped(one.instruction) else second)
    num_malformed = sum(reply is not None and _is_malformed(reply) for reply in replies)
    return preferences, num_malformed, sum(reply is None for reply in replies)


def _by_reward(
    reference: Sequence[Output],
    outputs: Sequence[Output],
    judge: RewardModel,
    cache: Cache,
    progress: Callable[[int, int], None] | None,
) -> list[float | None]:
    pairs = [(one.instruction, side.output) for one, other in zip(reference, outputs, strict=True) for side in (one, other)]
    scores = judge.scores(pairs, cache, progress=progress)
    return [1.0 if own > base else 0.0 if own < base else 0.5 for base, own in zip(scores[::2], scores[1::2], strict=True)]


def _length_controlled(
    reference: Sequence[Output], outputs: Sequence[Output], preferences: Sequence[float | None], tables: str | Path | None
) -> tuple[float | None, float | None, str | None]:
    """(rate, standard error, None), or (None, None, what is missing)."""
    try:
        return (*length_controlled_win_rate(reference, outputs, preferences, tables), None)
    except OrpoError as error:
        logger.warning("no length-controlled win rate: %s", error)
        return None, None, str(error)


def length_controlled_win_rate(
    reference: Sequence[Output], outputs: Sequence[Output], preferences: Sequence[float | None], tables: str | Path | None = None
) -> tuple[float, float]:
    """AlpacaEval's length-controlled win rate and its standard error, from 0 to 1, by the package's own regression.

    Raises:
        UserError: the package or a table is missing, or the regression has nothing to work on.
    """
    try:
        import pandas
        import sklearn

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses what setuptools and scikit-learn will drop; the extra keeps them back
            from alpaca_eval.metrics import glm_winrate
    except ImportError as error:
        raise UserError(f"alpaca_eval, or what it needs, is not installed: {error}", where="alpacaeval", mend=pip_line("alpaca")) from error
    rows = [
        {
            "instruction": one.instruction,
            "output_1": one.output,
            "output_2": other.output,
            "generator_1": reference[0].generator,
            "generator_2": outputs[0].generator,
            "annotator": "orpo",
            "preference": None if preference is None else 1 + preference,
        }
        for one, other, preference in zip(reference, outputs, preferences, strict=True)
    ]
    frame = pandas.DataFrame(rows).dropna(subset=["preference"])
    if reference[0].generator == outputs[0].generator:
        raise UserError("model and reference have the same name", where="alpacaeval", mend="name them apart by `generator`")
    # It also sets options of scikit-learn for the whole process.
    with _tables_from(glm_winrate, tables), sklearn.config_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = glm_winrate.get_length_controlled_winrate(frame, save_weights_dir=None, is_add_glm_preference_inplace=False)
        except UserError:
            raise
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"the regression fails on these judgements: {type(error).__name__} {error}", where="alpacaeval") from error
    return float(found["length_controlled_winrate"]) / 100, float(found["lc_standard_error"]) / 100


@contextmanager
def _tables_from(module: Any, folder: str | Path | None) -> Iterator[None]:
    """The package fetches its tables by one function; let it find them in a folder, or say plainly what is missing."""
    original = module.hf_hub_download

    def find(*args: Any, filename: str, **kwargs: Any) -> str:
        if folder is not None:
            path = Path(folder).expanduser() / filename
            if path.is_file():
                return str(path)
            raise UserError(f"there is no {filename}", where=str(folder), expected=" and ".join(TABLES))
        try:
            return str(original(*args, filename=filename, **kwargs))
        except Exception as error:  # the hub's client raises a dozen kinds where it cannot be reached
            raise UserError(
                f"its table {filename} cannot be fetched from the hub ({type(error).__name__})",
                where="alpacaeval",
                mend=f"--alpaca_tables FOLDER with {' and '.join(TABLES)} of {HUB_ID}",
            ) from error

    module.hf_hub_download = find
    try:
        yield
    finally:
        module.hf_hub_download = original


def as_annotations(reference: Sequence[Output], outputs: Sequence[Output], preferences: Sequence[float | None]) -> str:
    """The judgements as JSON lines in the package's form, for use with its own tools."""
    lines = [
        json.dumps(
            {
                "instruction": one.instruction,
                "output_1": one.output,
                "generator_1": one.generator,
                "output_2": other.output,
                "generator_2": other.generator,
                "preference": None if preference is None else 1 + preference,
            },
            ensure_ascii=False,
        )
        for one, other, preference in zip(reference, outputs, preferences, strict=True)
    ]
    return "\n".join(lines) + "\n"


@register
class AlpacaEvalTask(Task):
    """Win rates over the reference, of generated or given outputs."""

    name = "alpacaeval"
    help = "win rate over a reference model, raw and length-controlled, by a judge"
    options = (
        TaskOption("alpaca_reference", "reference outputs (the hub's)", Path),
        TaskOption("alpaca_tables", "df_gamed.csv, for length control (the hub's)", Path, metavar="FOLDER"),
    )
    takes_answers = True

    def __init__(self) -> None:
        self._reference: list[Output] = []

    def prepare(self, session: Session) -> tuple[str, ...]:
        self._reference = read_reference(session.options.alpaca_reference, limit=session.options.limit)
        return ()

    def run(self, session: Session) -> Record:
        options, reference, judge = session.options, self._reference, session.judge
        if options.answers is not None:
            outputs = match_outputs(reference, read_outputs(options.answers))
        else:
            answers = session.answers([one.instruction for one in reference], session.sampling(MAX_NEW_TOKENS))
            outputs = [Output(one.instruction, answer.text, str(options.target)) for one, answer in zip(reference, answers, strict=True)]
        found = judge_outputs(
            reference,
            outputs,
            judge,
            session.judgement_cache,
            tables=options.alpaca_tables,
            seed=options.seed,
            retry_malformed=options.retry_malformed,
            progress=session.step("judgements"),
        )
        session.write_text("alpacaeval-annotations.jsonl", as_annotations(reference, outputs, found.preferences))
        return found.to_dict()

    def lines(self, result: Record) -> Iterator[str]:
        yield f"{result['generator']} against {result['reference']}, {result['num_judged']} of {result['num_instructions']} judged"
        counts = f"{result['num_wins']} won, {result['num_ties']} tied, {result['num_losses']} lost"
        yield f"win rate {interval(result['win_rate'], '.1%')} ({counts})"
        if result["length_controlled"] is not None:
            controlled, error = result["length_controlled"], result["length_controlled_error"]
            yield f"length-controlled win rate {controlled:.1%} (standard error {error:.1%})"
        else:
            yield f"no length-controlled win rate: {_on_one_line(result['missing'])}"
        yield f"mean length {result['mean_chars']:.0f} characters, reference {result['reference_mean_chars']:.0f}"
        yield from power_of_rate(result["win_rate"], result["num_judged"])
        yield from gaps(result)

    def show(self, result: Record) -> Shown:
        rates = {"win rate": result["win_rate"], "length-controlled": result["length_controlled"]}
        shown = Shown("AlpacaEval")
        if result["length_controlled"] is None:
            shown.lead.append(f"No length-controlled rate: {_on_one_line(result['missing'])}")
        shown.lead += [f"{said}." for said in (*power_of_rate(result["win_rate"], result["num_judged"]), *gaps(result))]
        counted = "/".join(str(result[key]) for key in ("num_wins", "num_ties", "num_losses"))
        shown.scores = [Score(name, value, ".1%") for name, value in rates.items()]
        shown.scores += [Score("won/tied/lost", counted), Score("characters", result["mean_chars"], ",.0f")]
        shown.scores.append(Score("judged", f"{result['num_judged']} of {result['num_instructions']}"))
        shown.figures = [Drawing(f"Win rate over {result['reference']}", rates, style=".0%", low=0.0, high=1.0, mark=0.5)]
        return shown


def _on_one_line(reason: Any) -> str:
    return "; ".join(line.strip() for line in str(reason).splitlines())
