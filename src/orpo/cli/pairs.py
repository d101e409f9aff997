"""Make preference pairs from a model's own answers: orpo pairs PROMPTS --model RUN|MODEL --verify FILE.py:FUNCTION --out pairs.jsonl

  orpo pairs prompts.jsonl --model runs/first --num_samples 8 --numeric answer --out pairs.jsonl
  orpo pairs prompts.jsonl --model smollm2-135m-instruct --verify checks.py:passed --choose right_wrong --out pairs.jsonl
  orpo pairs hub/set --endpoint_url http://127.0.0.1:8000/v1 --endpoint_model NAME --judge_url … --judge_model NAME --out pairs.jsonl

PROMPTS is whatever `orpo train` reads, and rows or a .txt with prompts alone. Answers are sampled, scored, and made into pairs that
`orpo train` takes; answers, scores and counts lie beside them in NAME.jsonl.work. The same command again goes on, or finds all done.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.cli.optiontext import column_map, given_flags, json_object
from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.evaluate.judging.endpoint import EndpointJudge
    from orpo.onpolicy.making import PairsJob
    from orpo.onpolicy.options import OnPolicyOptions

NAME = "pairs"
HELP = "make preference pairs from a model's own answers"

_GROUPS = {
    "sampling": ("num_samples", "temperature", "top_p", "max_new_tokens", "seed", "batch_size", "keep_answers"),
    "scorers (any number of them; their weighted sum counts)": (
        *("verify", "verify_time_s", "verify_memory_mib", "exact", "numeric", "ifeval", "reward", "judge", "judge_url", "judge_model"),
        *("judge_key_env", "logp", "length", "weights"),
    ),
    "choice of pairs": ("choose", "min_margin", "max_pairs", "max_length_ratio", "max_similarity", "right_at", "cut"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of sampling, scoring and choice are the keys of `on_policy:` too."""
    from orpo.onpolicy.options import OnPolicyOptions

    parser.usage = "orpo pairs PROMPTS --model RUN|MODEL --out FILE.jsonl [options]"
    parser.add_argument("prompts", metavar="PROMPTS", help="file, folder, hub id, or a .txt of passages")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the pairs go")
    parser.add_argument("--split", help="split to read where there are several")
    parser.add_argument("--column_map", "--column-map", metavar="MAP", help="our column names to the data's: '{prompt: question}'")
    parser.add_argument("--limit", type=int, metavar="N", help="most prompts")
    parser.add_argument("--no_audit", "--no-audit", action="store_true", help="do not audit the pairs")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    _add_models(parser.add_argument_group("who answers"))
    fields = {item.name: item for item in dataclasses.fields(OnPolicyOptions)}
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_option(group, fields[name])


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", action="append", default=[], metavar="RUN|MODEL", help="run, model folder, hub id or GGUF file; repeatable"
    )
    _add_endpoint(group)
    group.add_argument("--device", help="cuda, mps, cpu (the best there is)")
    group.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float16")
    group.add_argument("--chat_template", help="as in training (the run's, else the model's own)")
    group.add_argument("--model_revision", help="of a hub model")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model; needs --model_revision")


def _add_endpoint(group: Any) -> None:
    group.add_argument("--endpoint_url", metavar="URL", help="a server with OpenAI's protocol, such as http://127.0.0.1:8000/v1")
    group.add_argument("--endpoint_model", metavar="NAME", help="the model's name there")
    group.add_argument("--endpoint_key_env", metavar="VARIABLE", help="environment variable with its key")
    group.add_argument("--endpoint_options", metavar="JSON", default="{}", help="further fields of each request; null removes one")
    group.add_argument("--endpoint_workers", type=int, default=4, help="requests at a time (4)")
    group.add_argument("--endpoint_timeout", type=float, default=120.0, help="seconds for a reply (120)")
    group.add_argument("--endpoint_retries", type=int, default=5, help="further attempts for an answer (5)")


def _add_option(group: argparse._ArgumentGroup, item: Any) -> None:
    flags = list(dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}")))
    text = str(item.metadata["help"]).replace("%", "%%")
    if isinstance(item.default, bool):
        group.add_argument(*flags, action="store_true", default=None, help=text)
        return
    shown = "" if item.default is None else f" ({item.default})"
    words: dict[str, Any] = {"help": text + shown, "metavar": item.metadata.get("metavar")}
    if item.name == "verify":
        words["action"] = "append"
    elif isinstance(item.default, int | float):
        words |= {"type": type(item.default), "metavar": "N"}
    elif item.name == "max_length_ratio":
        words |= {"type": float, "metavar": "R"}
    elif isinstance(item.default, str):
        from orpo.onpolicy.choice import WAYS

        words |= {"choices": WAYS if item.name == "choose" else ("rejected", "drop", "keep"), "metavar": None}
    group.add_argument(*flags, dest=item.name, **words)


def run(args: argparse.Namespace) -> int:
    """Make the pairs; exit code 2 where none came of the answers."""
    from orpo.cli.bars import PartBars
    from orpo.onpolicy.making import make_pairs
    from orpo.system.console import print_json, report_console, say, stderr_console
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    task = task_of(args)
    console = report_console(is_json=args.json)
    with PartBars(stderr_console()) as progress:
        facts = make_pairs(task, lambda line: say(console, line), progress)
    if facts["is_already_made"]:
        say(console, f"{task.output} is made already ({facts['num_pairs']} pairs); nothing was done")
    say(console, f"next         orpo train --model_name_or_path {task.models[0] if task.models else 'MODEL'} --dataset_name {task.output}")
    if args.json:
        print_json(facts)
    return 0


def task_of(args: argparse.Namespace) -> PairsJob:
    """The command line as a task.

    Raises:
        UserError: a value is not what it should be.
    """
    from orpo.inference.ready import Loading
    from orpo.onpolicy.making import PairsJob

    if args.limit is not None and args.limit < 1:
        raise UserError(f"found {args.limit}", where="--limit", expected="at least 1")
    return PairsJob(
        prompts=args.prompts,
        models=tuple(dict.fromkeys(args.model)),
        output=args.out.expanduser(),
        options=_options(args),
        endpoint=_endpoint(args),
        split=args.split,
        column_map=column_map(args.column_map),
        limit=args.limit,
        loading=Loading(
            device=args.device,
            dtype=args.dtype,
            chat_template=args.chat_template,
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
        ),
        has_audit=not args.no_audit,
    )


def _options(args: argparse.Namespace) -> OnPolicyOptions:
    from orpo.onpolicy.options import OnPolicyOptions

    names = [item.name for item in dataclasses.fields(OnPolicyOptions)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if "weights" in given:
        given["weights"] = _weights(given["weights"])
    return OnPolicyOptions(**given)


def _weights(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, is_given, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            is_given = ""
        if not is_given:
            raise UserError(
                f"found {part!r}", where="--weights", expected="NAME=NUMBER with commas between them, such as passed=1,length=-0.01"
            )
    return found


def _endpoint(args: argparse.Namespace) -> EndpointJudge | None:
    if args.endpoint_url is None:
        if idle := given_flags(args, _add_endpoint):
            raise UserError("it has no address", where=", ".join(idle), mend="add --endpoint_url http://127.0.0.1:8000/v1")
        return None
    from orpo.evaluate.judging.endpoint import EndpointJudge

    if args.endpoint_model is None:
        raise UserError("the endpoint's model has no name", where="--endpoint_model", expected="the name that its server knows it by")
    key = None
    if args.endpoint_key_env is not None:
        key = os.environ.get(args.endpoint_key_env)
        if not key:
            raise UserError(f"the environment variable {args.endpoint_key_env} is not set", where="--endpoint_key_env")
    return EndpointJudge(
        args.endpoint_url,
        args.endpoint_model,
        key,
        options=json_object(args.endpoint_options, "--endpoint_options"),
        num_workers=args.endpoint_workers,
        timeout_s=args.endpoint_timeout,
        num_retries=args.endpoint_retries,
        role="endpoint",
    )
