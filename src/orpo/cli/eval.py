"""Evaluate a run or a model: held-out pairs, retention, IFEval, MT-Bench, AlpacaEval, your own prompts.

  orpo eval runs/first                                      held-out pairs and retention, before and after
  orpo eval runs/first --tasks ifeval --ifeval_prompts FILE
  orpo eval runs/first --tasks mtbench --mtbench FOLDER --judge_url http://127.0.0.1:8000/v1 --judge_model NAME
  orpo eval --tasks alpacaeval --answers OUTPUTS.json --alpaca_reference REFERENCE.json --judge_url …
  orpo eval runs/first --plugins my_task.py --tasks my_task
  orpo eval runs/first --config eval.yaml

Results, answers and judgements go to the run's eval/ folder. The same command again continues what was interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.cli.optiontext import given_flags, json_object, without_effect
from orpo.errors import UserError, UserErrors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.task import Task
    from orpo.system.place import Place

NAME = "eval"
HELP = "evaluate a run or a model: pairs, retention, IFEval, MT-Bench, AlpacaEval, own prompts"
RUNS_IN_PARALLEL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of the tasks are declared by them."""
    from orpo.evaluate.suite import load_tasks
    from orpo.evaluate.task import known_tasks

    load_tasks()
    parser.usage = "orpo eval RUN|MODEL [options]"
    parser.add_argument(
        "target", nargs="?", metavar="RUN|MODEL", help="run folder, model folder, hub id, GGUF file or smollm2-135m-instruct"
    )
    tasks = known_tasks()
    parser.add_argument("--tasks", default="pairs,retention", help=f"comma-separated: {', '.join(tasks)} (pairs,retention)")
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="MODULE|FILE.py",
        help="modules or files that bring tasks of their own, commas between them; repeatable. Their code runs with your rights",
    )
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="options from a file, named as here; those given here go first")
    parser.add_argument("--file_target", help=argparse.SUPPRESS)  # `target` of a file: two positional words would be one too many
    parser.add_argument("--output", type=Path, help="folder for results (the run's eval/, else eval/MODEL)")
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on stdout")
    parser.add_argument("--limit", type=int, help="most rows or prompts of each task")
    parser.add_argument("--seed", type=int, default=0, help="of samples and intervals (0)")
    _add_comparison(parser.add_argument_group("what it is compared with"))
    _add_task_options(parser, tasks)
    _add_generation(parser.add_argument_group("model and generation"))
    _add_judge(parser.add_argument_group("judge (mtbench, alpacaeval, custom)"))


def _add_comparison(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--against", metavar="RUN|MODEL", help="model to compare with (the one that the run started from)")
    group.add_argument("--no_before", action="store_true", help="compare a run with nothing")
    group.add_argument("--answers", type=Path, help="file with answers instead of generating them (one of the tasks with prompts)")


def _add_task_options(parser: argparse.ArgumentParser, tasks: Mapping[str, type[Task]]) -> None:
    for name, task in tasks.items():
        if not task.options:
            continue
        group = parser.add_argument_group(f"task {name}", task.help)
        for option in task.options:
            # `--slice` was there before options had one name in all places.
            flags = ["--slice", "--slices"] if option.name == "slices" else [f"--{option.name}"]
            words: dict[str, Any] = {"dest": option.name, "help": option.help.replace("%", "%%"), "default": None}
            if option.kind is bool:
                words |= {"action": "store_true"}
            else:
                words |= {"action": "append" if option.is_repeated else "store", "type": option.kind, "metavar": option.metavar}
            try:
                group.add_argument(*flags, **words)
            except argparse.ArgumentError as error:
                raise UserError(
                    f"its option {option.name!r} is one of `orpo eval` itself",
                    where=f"the task {name}",
                    mend=f"call it {name}_{option.name}",
                ) from error


def _add_generation(group: argparse._ArgumentGroup) -> None:
    _add_sampling(group)
    group.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float16")
    group.add_argument(
        "--num_processes",
        "--num-processes",
        type=int,
        metavar="N",
        help="share answers and log-probabilities among N processes of this machine, each with the model (1); the same results",
    )
    group.add_argument("--device", help="cuda, mps, cpu (the best there is)")
    group.add_argument("--chat_template", help="as in training (the run's, else the model's own)")
    group.add_argument("--max_length", type=int, help="pairs: most tokens of prompt and answer (the run's, else 1024)")
    group.add_argument("--model_revision", help="of a hub model")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model; needs --model_revision")


def _add_sampling(group: Any) -> None:
    group.add_argument("--max_new_tokens", type=int, help="of an answer (each task's own)")
    group.add_argument("--temperature", type=float, help="0 takes the likeliest token (each task's own)")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens up to this probability (1)")
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="most prompts at a time (64, or as many as memory holds); changes no answer beyond rounding",
    )


def _add_judge(group: Any) -> None:
    group.add_argument("--judge_url", metavar="URL", help="endpoint with OpenAI's protocol, such as http://127.0.0.1:8000/v1")
    group.add_argument("--judge_model", metavar="NAME", help="the model's name there")
    group.add_argument("--judge_key_env", metavar="VARIABLE", help="environment variable with the key (ORPO_JUDGE_API_KEY, OPENAI_API_KEY)")
    group.add_argument("--judge_options", metavar="JSON", default="{}", help="further fields of each request; null removes one")
    group.add_argument("--judge_logprobs", action="store_true", help="alpacaeval: weigh verdicts by log-probabilities, as published")
    group.add_argument("--judge_workers", type=int, default=4, help="questions at a time (4)")
    group.add_argument("--judge_timeout", type=float, default=120.0, help="seconds for a reply (120)")
    group.add_argument("--judge_retries", type=int, default=5, help="further attempts for a question (5)")
    group.add_argument("--judge", metavar="FOLDER|HUB_ID", help="a judge or reward model of your own")
    group.add_argument("--retry_malformed", action="store_true", help="ask again where a kept verdict could not be read")


def options_of(args: argparse.Namespace) -> EvalOptions:
    """The command line as options.

    Raises:
        UserError: a value is not what it should be.
    """
    from orpo.evaluate.options import EvalOptions, JudgeOptions
    from orpo.inference.ready import Loading

    judge = JudgeOptions(
        url=args.judge_url,
        model=args.judge_model,
        local=args.judge,
        key_variable=args.judge_key_env,
        options=json_object(args.judge_options, "--judge_options"),
        wants_logprobs=args.judge_logprobs,
        num_workers=args.judge_workers,
        timeout_s=args.judge_timeout,
        num_retries=args.judge_retries,
    )
    loading = Loading(
        device=args.device,
        dtype=args.dtype,
        chat_template=args.chat_template,
        max_length=args.max_length,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    shared = {name: getattr(args, name) for name in _SAME_NAMES}
    shared["target"] = args.target or args.file_target
    own, given = _task_values(args)
    return EvalOptions(
        **shared,
        **own,
        given=given,
        tasks=tuple(dict.fromkeys(_words([args.tasks]))),
        has_before=not args.no_before,
        plugins=tuple(_words(args.plugins)),
        loading=loading,
        judge=judge,
    )


# Options of the whole evaluation that are called the same in `EvalOptions`.
_SAME_NAMES = (
    *("target", "against", "answers", "limit", "max_new_tokens", "temperature", "top_p", "seed", "batch_size", "output"),
    "retry_malformed",
)


def _task_values(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given of the tasks' options: those that are fields of `EvalOptions`, and the others."""
    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.task import known_tasks

    own: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for option in (option for task in known_tasks().values() for option in task.options):
        value = getattr(args, option.name, None)
        if value is not None:
            is_field = option.name in EvalOptions.__dataclass_fields__
            (own if is_field else given)[option.name] = tuple(value) if option.is_repeated else value
    return own, given


def _idle(args: argparse.Namespace, tasks: Sequence[str]) -> list[str]:
    """A line for the options that were given and that none of the tasks asks for."""
    from orpo.evaluate.task import find_task, known_tasks

    known, lines = known_tasks(), []
    for name, task in known.items():
        if name not in tasks:
            given = [f"--{option.name}" for option in task.options if getattr(args, option.name, None) not in (None, False)]
            lines += without_effect(given, f"the task {name} is not among --tasks")
    asked, named = [find_task(name) for name in tasks], ", ".join(tasks)
    if args.answers is not None or not any(task.generates for task in asked):
        why = "the answers are given" if args.answers is not None else f"no answers are made for {named}"
        lines += without_effect(given_flags(args, _add_sampling), why)
    judge = given_flags(args, _add_judge)
    if not any(task.asks_judge for task in asked):
        judged = ", ".join(name for name, task in known.items() if task.asks_judge)
        return lines + without_effect(judge, f"no judge is asked for {named}, as one is for {judged}")
    if args.judge is not None and args.judge_url is None:
        of_models = ("--judge", "--retry_malformed")
        return lines + without_effect([flag for flag in judge if flag not in of_models], "the judge is a model, not --judge_url")
    if "alpacaeval" not in tasks:
        lines += without_effect([flag for flag in judge if flag == "--judge_logprobs"], "the task alpacaeval is not among --tasks")
    return lines


def _words(given: Iterable[str]) -> list[str]:
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


def run(args: argparse.Namespace) -> int:
    """Do the tasks; exit code 2 where one could not be done, with the others' results in place."""
    from orpo.system.launch import run_in_several

    code = run_in_several(args.words, args.num_processes)
    if code is not None:
        return code
    from orpo.system.place import Place, adopt

    try:
        place = adopt(os.environ)
    except UserError:  # of a scheduler's allocation, inside which one process was started
        place = Place()
    return _evaluate(args, place)


def _evaluate(args: argparse.Namespace, place: Place) -> int:
    from orpo.cli.bars import PartBars
    from orpo.evaluate.crew import join_crew
    from orpo.evaluate.suite import Evaluation, lines_of, warnings_of
    from orpo.system.console import print_json, report_console, say, stderr_console
    from orpo.system.group import told_together
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    options = told_together(lambda: options_of(args))
    console = stderr_console()
    for line in _idle(args, options.tasks):
        say(console, f"note         {line}")
    if place.world_size > 1:
        options = replace(options, loading=options.loading.on(place.local_rank))
    with PartBars(console) as progress:
        evaluation = told_together(lambda: Evaluation(options, tell=lambda line: say(console, line), progress=progress))
        if place.world_size > 1:
            evaluation.session.crew = crew = join_crew(place)
            if place.rank:
                crew.serve(evaluation.session.do)
                return 0
        records, errors = evaluation.run()
    report = report_console(is_json=args.json)
    for warning in warnings_of(records):
        say(report, f"warning      {warning}")
    for record in records.values():
        for line in lines_of(record):
            say(report, line)
    if records:
        say(console, f"results      {evaluation.folder}")
    if args.json:
        print_json({"folder": str(evaluation.folder), "tasks": records, "errors": {name: str(error) for name, error in errors.items()}})
    if errors:
        raise UserErrors(list(errors.values()), title=f"{len(errors)} of {len(options.tasks)} tasks could not be done:")
    return 0


# ---- what is read before the command line ----------------------------------------------------------------------------------------------


def before_parsing(words: Sequence[str]) -> list[str]:
    """Load the tasks that plugins bring, so that their options are known; put the words of a file before those of the command line.

    Raises:
        UserError: a plugin or the file cannot be used.
    """
    from orpo.evaluate.suite import load_tasks

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plugins", action="append", default=[])
    early.add_argument("--config", type=Path)
    first, _ = early.parse_known_args(list(words))
    values = {} if first.config is None else _read_config(first.config)
    plugins = values.pop("plugins", None) or []
    if not isinstance(plugins, (str, list)):
        raise UserError(f"found {plugins!r}", where=f"{first.config}: plugins", expected="modules or files, as a list")
    load_tasks(tuple(_words([plugins] if isinstance(plugins, str) else map(str, plugins))), where=f"{first.config}: plugins")
    load_tasks(tuple(_words(first.plugins)))
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    actions = {action.dest: action for action in parser._actions} | parser._option_string_actions
    return [*(word for key, value in values.items() for word in _as_words(key, value, actions, str(first.config))), *words]


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), mend="correct the path after --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is no YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError("holds no keys", where=str(path), expected="options of `orpo eval` as `name: value`, such as `tasks: [pairs]`")
    return {str(key): value for key, value in values.items()}


def _as_words(key: str, value: Any, actions: Mapping[str, argparse.Action], where: str) -> list[str]:
    """A key of the file as words of a command line."""
    action = actions.get(f"--{key}") or actions.get(key)
    if key == "target":
        return [f"--file_target={value}"]
    if action is None or not action.option_strings or key in ("config", "json"):
        names = sorted({action.dest for action in actions.values()} - {"file_target", "config", "json"})
        near = difflib.get_close_matches(key, names, n=1)
        mend = f"did you mean {near[0]}?" if near else "`orpo eval --help` names them all"
        raise UserError(f"there is no option {key!r}", where=where, mend=mend)
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"found {value!r}", where=f"{where}: {key}", expected="true or false")
        return [flag] if value else []
    if value is None:
        return []
    if isinstance(value, list):
        texts = [str(one) for one in value]
        return [f"{flag}={','.join(texts)}"] if key == "tasks" else [f"{flag}={text}" for text in texts]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
