"""The course of `orpo pairs`: prompts read, answers sampled and scored, pairs chosen, written, looked at. Each step has its cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.evaluate.cache import Cache
from orpo.inference.ready import Loading
from orpo.models.fingerprint import content_key
from orpo.onpolicy.answering import OWN, AskedGroup, Attempt, Progress, Tell, draw_from_endpoint, draw_locally
from orpo.onpolicy.asked import AskedPrompts, read_asked
from orpo.onpolicy.choice import LEFT_OUT, Rated, choose_pairs_of
from orpo.onpolicy.lookback import audit_lines, look_back
from orpo.onpolicy.options import OnPolicyOptions
from orpo.onpolicy.scorers import Scoring, score_all
from orpo.system.files import write_atomically
from orpo.system.machine import versions
from orpo.system.redact import redact

if TYPE_CHECKING:
    from orpo.evaluate.judging.endpoint import EndpointJudge

FORMAT = 1


class NoPairsError(UserError):
    """Answers there were, and scores, but no pair came of them."""


WORK_SUFFIX = ".work"
RESULT_FILE, CANDIDATES_FILE = "result.json", "candidates.jsonl"
WRITTEN_FILE = "written.json"
"""Hash of the pairs that are about to be put in place: whoever changes them afterwards keeps his changes."""


@dataclass(frozen=True)
class PairsJob:
    """What to make pairs of, and where they go.

    Attributes:
        prompts: any source of rows.
        models: runs or models of this machine.
        endpoint: one more that answers.
        asked: the prompts, where they are read already.
        output: the file of pairs; what was sampled lies beside it in `NAME.work`.
    """

    prompts: Any
    models: tuple[str, ...]
    output: Path
    options: OnPolicyOptions
    endpoint: EndpointJudge | None = None
    split: str | None = None
    column_map: Mapping[str, str] | None = None
    limit: int | None = None
    loading: Loading = field(default_factory=Loading)
    asked: AskedPrompts | None = None
    has_audit: bool = True

    @property
    def work(self) -> Path:
        """Caches, all candidates, and what came of them."""
        return self.output.with_name(self.output.name + WORK_SUFFIX)


def make_pairs(job: PairsJob, tell: Tell, progress: Progress) -> dict[str, Any]:
    """Make the pairs, or find that they are made.

    Returns:
        What `result.json` holds, and `is_already_made`.

    Raises:
        UserError: anything wrong with prompts, models, scorers or files, or no pair at all. What was sampled and scored is kept.
    """
    from orpo.checkpoint import RunLock

    _check(job)
    asked = job.asked or read_asked(job.prompts, split=job.split, column_map=job.column_map, limit=job.limit)
    identity = _identity(job, asked)
    if (made := _made(job, identity)) is not None:
        return {**made, "is_already_made": True}
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with RunLock(job.work):
        for line in [f"prompts      {len(asked.prompts)}: {'; '.join(asked.shapes)}", *_reason_lines(asked.reasons)]:
            tell(line)
        scorers = job.options.scorers(job.models[0] if job.models else None, job.loading)
        for scorer in scorers:
            scorer.check(asked.prompts)
        groups = [AskedGroup(one) for one in asked.prompts]
        num_missing = _sample(job, groups, tell, progress)
        scoring = score_all(scorers, job.options.weights or {}, groups, Cache(job.work / "cache" / "scores.jsonl"), progress)
        return {**_choose(job, asked, groups, scoring, num_missing, identity, tell), "is_already_made": False}


def _check(job: PairsJob) -> None:
    job.options.check("")
    if not job.models and job.endpoint is None and not job.options.keep_answers:
        raise UserError(
            "nobody is asked for answers", where="--model", mend="--model RUN|MODEL, or --endpoint_url URL --endpoint_model NAME"
        )
    _check_count(job)
    if job.output.suffix != ".jsonl":
        raise UserError(f"found {str(job.output)!r}", where="--out", expected="a file *.jsonl")
    above = next(folder for folder in job.output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file", where="--out", expected="a folder that is there, or can be made", mend="choose another place")
    if job.output.is_dir():
        raise UserError(f"{job.output} is a folder", where="--out", mend="name a file in it")
    if job.output.exists() and hashlib.sha256(job.output.read_bytes()).hexdigest() not in _own_hashes(job):
        what = "was changed since it was made" if job.work.is_dir() else "is there already, and was not made by this command"
        raise UserError(what, where=str(job.output), mend="choose another --out, or move it away; what was sampled is kept")


def _check_count(job: PairsJob) -> None:
    """Whether there can be two different answers to a prompt, before any is sampled."""
    options = job.options
    num_asked = len(job.models) + (job.endpoint is not None)
    if options.keep_answers or num_asked > 1:
        return
    if options.num_samples < 2:
        raise UserError(
            "two answers make a pair", where="num_samples", expected="at least 2 of one model", mend="--num_samples 4, for instance"
        )
    if options.temperature == 0 and job.endpoint is None:
        raise UserError(
            "at temperature 0 a model gives the same answer every time, and a prompt has fewer than two different answers",
            where="temperature", mend="--temperature 0.8, for instance",
        )  # fmt: skip


def _own_hashes(job: PairsJob) -> set[str]:
    """Of what this command has written; a kill may have come before or after the file was put in place."""
    found = set()
    for name in (RESULT_FILE, WRITTEN_FILE):
        try:
            found.add(str(json.loads((job.work / name).read_text(encoding="utf-8"))["sha256"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _identity(job: PairsJob, asked: AskedPrompts) -> str:
    """Hash of everything that decides the result, as far as it is known without loading a model."""
    scorers = job.options.scorers("", job.loading)
    verifiers = [scorer.verifier.identity for scorer in scorers if hasattr(scorer, "verifier")]
    rows = hashlib.sha256(
        "\n".join([f"{one.key}{one.answers}{json.dumps(one.row, default=str)}" for one in asked.prompts]).encode("utf-8", "replace")
    )
    return content_key(
        format=FORMAT,
        prompts=rows.hexdigest(),
        models=[[name, _stamp(name)] for name in job.models],
        endpoint=None if job.endpoint is None else [job.endpoint.url, job.endpoint.identity],
        options={key: value for key, value in job.options.to_dict().items() if key != "batch_size"},
        verifiers=verifiers,
        loading=str(job.loading),
    )


def _stamp(name: str) -> list[list[Any]]:
    """Sizes and times of a model's files, where it is a folder: another model of the same name has others."""
    path = Path(name).expanduser()
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if "checkpoint-" not in str(file)]


def _made(job: PairsJob, identity: str) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads((job.work / RESULT_FILE).read_text(encoding="utf-8"))
        data = job.output.read_bytes()
    except (OSError, ValueError):
        return None
    is_same = facts.get("identity") == identity and facts.get("sha256") == hashlib.sha256(data).hexdigest()
    return facts if is_same and not facts.get("num_missing") else None


def _sample(job: PairsJob, groups: list[AskedGroup], tell: Tell, progress: Progress) -> int:
    """Answers of everybody who is asked; how many an endpoint did not give."""
    cache = Cache(job.work / "cache" / "answers.jsonl")
    if job.options.keep_answers:
        for group in groups:
            group.attempts += [Attempt(text, OWN) for text in group.asked.answers]
    for name in job.models:
        draw_locally(name, groups, job.options.draws, cache, job.loading, tell, progress)
    if job.endpoint is None:
        return 0
    num_missing = draw_from_endpoint(job.endpoint, groups, job.options.draws, cache, progress)
    if num_missing:
        tell(f"warning      {num_missing} answers of {job.endpoint.model} did not come; the same command asks for them again")
    return num_missing


def _choose(
    job: PairsJob,
    asked: AskedPrompts,
    groups: list[AskedGroup],
    scoring: Scoring,
    num_missing: int,
    identity: str,
    tell: Tell,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    num_covered = 0
    for group, parts, totals in zip(groups, scoring.parts, scoring.totals, strict=True):
        if group.problem is not None and not group.attempts:
            left_out["prompt_unusable"] += 1
            continue
        rated = [Rated(one.text, total, one.is_cut) for one, total in zip(group.attempts, totals, strict=True)]
        pairs, reasons = choose_pairs_of(rated, job.options.rule)
        left_out += reasons
        num_covered += bool(pairs)
        rows += [_row(job, group, parts, totals, pair) for pair in pairs]
    _write_candidates(job, groups, scoring)
    for line in _scoring_lines(scoring, left_out):
        tell(line)
    if not rows:
        raise NoPairsError(_nothing(groups, left_out, scoring), where=str(job.prompts), mend=_advice(left_out, job.options))
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    # The hash goes first: killed in between, the next start still knows whichever file is there as this command's own.
    write_atomically(job.work / WRITTEN_FILE, json.dumps({"sha256": hashlib.sha256(data).hexdigest()}).encode())
    write_atomically(job.output, data)
    return _finish(job, asked, groups, scoring, rows, left_out, num_covered, num_missing, identity, data, tell)


def _finish(
    job: PairsJob,
    asked: AskedPrompts,
    groups: list[AskedGroup],
    scoring: Scoring,
    rows: list[dict[str, Any]],
    left_out: Counter[str],
    num_covered: int,
    num_missing: int,
    identity: str,
    data: bytes,
    tell: Tell,
) -> dict[str, Any]:
    texts = [(_text(row["chosen"]), _text(row["rejected"])) for row in rows]
    scored = [
        list(zip([one.text for one in group.attempts], totals, strict=True)) for group, totals in zip(groups, scoring.totals, strict=True)
    ]
    back = look_back(texts, scored, num_covered)
    tell(f"pairs        {len(rows)}: {job.output}")
    for line in back.lines():
        tell(line)
    lines, audit = audit_lines(job.output) if job.has_audit else ([], None)
    for line in lines:
        tell(line)
    known = [total for totals in scoring.totals for total in totals if total is not None]
    facts = {
        "format": FORMAT,
        "identity": identity,
        "sha256": hashlib.sha256(data).hexdigest(),
        "output": job.output.name,
        "num_prompts": len(asked.prompts),
        "rows_without_prompt": dict(asked.reasons),
        "num_answers": sum(len(group.attempts) for group in groups),
        "num_missing": num_missing,
        "num_pairs": len(rows),
        "mean_score": sum(known) / len(known) if known else None,
        "left_out": dict(left_out),
        "scorer_failures": {name: dict(reasons.most_common(5)) for name, reasons in scoring.failures.items()},
        "lengths": back.to_dict(),
        "audit": audit,
        "models": list(job.models) + ([job.endpoint.model] if job.endpoint else []),
        "options": job.options.to_dict(),
        "versions": versions(),
    }
    write_atomically(job.work / RESULT_FILE, (json.dumps(redact(facts), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    return facts


def _row(
    job: PairsJob, group: AskedGroup, parts: Sequence[Mapping[str, Any]], totals: Sequence[float | None], pair: tuple[int, int]
) -> dict[str, Any]:
    asked, options = group.asked, job.options
    is_text = isinstance(asked.prompt, str)

    def answer(place: int) -> Any:
        text = group.attempts[place].text
        return text if is_text else [{"role": "assistant", "content": text}]

    chosen, rejected = pair
    row: dict[str, Any] = {
        "prompt": asked.prompt if is_text else list(asked.prompt),
        "chosen": answer(chosen),
        "rejected": answer(rejected),
    }
    if asked.tools:
        row["tools"] = list(asked.tools)
    if asked.variables:
        row["chat_template_kwargs"] = asked.variables
    for side, place in (("chosen", chosen), ("rejected", rejected)):
        row |= {f"{side}_score": totals[place], f"{side}_parts": dict(parts[place]), f"{side}_by": group.attempts[place].by}
    row["margin"] = float(totals[chosen] or 0.0) - float(totals[rejected] or 0.0)
    return row | {"sampling": {**options.draws.sampling.to_dict(), "num_samples": options.num_samples}, "source": str(asked.where)}


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer[0]["content"])


def _write_candidates(job: PairsJob, groups: Sequence[AskedGroup], scoring: Scoring) -> None:
    """All answers with their scores, for whoever wants to choose otherwise."""
    lines = []
    for group, parts, totals in zip(groups, scoring.parts, scoring.totals, strict=True):
        answers = [
            {"text": one.text, "by": one.by, "finish": one.finish, "score": total, "parts": dict(part)}
            for one, part, total in zip(group.attempts, parts, totals, strict=True)
        ]
        facts = {"prompt": group.asked.prompt, "source": str(group.asked.where), "problem": group.problem, "candidates": answers}
        lines.append(json.dumps(facts, ensure_ascii=False) + "\n")
    write_atomically(job.work / CANDIDATES_FILE, "".join(lines).encode("utf-8", "replace"))


def _reason_lines(reasons: Mapping[str, int]) -> list[str]:
    return [f"             {count} rows gave no prompt: {reason}" for reason, count in reasons.items()]


def _scoring_lines(scoring: Scoring, left_out: Mapping[str, int]) -> list[str]:
    known = [total for totals in scoring.totals for total in totals if total is not None]
    lines = [f"scored       {len(known)} answers, mean {sum(known) / len(known):.3f}"] if known else []
    for name, reasons in scoring.failures.items():
        reason, count = reasons.most_common(1)[0]
        lines.append(f"warning      {name} gave no score to {sum(reasons.values())} answers; most often ({count}): {reason}")
    return lines + [f"left out     {count} {LEFT_OUT[reason]}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1])]


def _nothing(groups: Sequence[AskedGroup], left_out: Mapping[str, int], scoring: Scoring) -> str:
    num_answers = sum(len(group.attempts) for group in groups)
    told = "; ".join(f"{count} {LEFT_OUT[reason]}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))
    failed = "; ".join(f"{name}: {reasons.most_common(1)[0][0]}" for name, reasons in scoring.failures.items())
    return f"no pair came of {num_answers} answers to {len(groups)} prompts: {told or 'nothing was scored'}" + (
        f" ({failed})" if failed else ""
    )


def _advice(left_out: Mapping[str, int], options: OnPolicyOptions) -> str:
    kept = "answers and scores are kept, so that another choice costs nothing"
    advice: dict[str, str] = {
        "no_score": "mend the scorer",
        "no_right": "take easier prompts, a stronger model beside yours (--model), or more samples (--num_samples)",
        "no_wrong": "take harder prompts or a higher temperature",
        "one_answer": "two answers make a pair: --num_samples 4, or a temperature above 0"
        if options.num_samples < 2
        else "raise --temperature",
        "only_cut": "raise --max_new_tokens",
        "tie": "a scorer that tells answers apart, or more samples (--num_samples)",
        "margin": "lower --min_margin",
        "lengths": "raise --max_length_ratio",
        "prompt_unusable": "shorter prompts, or another --chat_template",
    }
    worst: Callable[[str], int] = lambda reason: left_out.get(reason, 0)  # noqa: E731
    reason = max(advice, key=worst)
    return f"{advice[reason]}; {kept}" if left_out.get(reason) else kept
