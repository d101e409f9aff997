"""Write a commented first configuration for your model and data: orpo init [DATA] [--model MODEL] [--out orpo.yaml]

Nothing is asked: the rows' shape, their test rows and lengths, the model's size and template, and this machine's memory are looked at. Each
number has its source beside it. Without DATA the one data file in this folder is taken, or the packaged pairs where there is none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from orpo.data.reading.sources import DEMO_DATA
from orpo.errors import UserError

NAME = "init"
HELP = "write a commented first configuration for your model and data"

_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".json.gz", ".csv.gz")
_MODEL = "smollm2-135m-instruct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data", nargs="?", metavar="DATA", help="file, folder or hub id with the preference rows")
    parser.add_argument("--model", default=_MODEL, metavar="MODEL", help=f"hub id, folder or GGUF file ({_MODEL})")
    parser.add_argument("--model_revision", "--model-revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--out", default="orpo.yaml", metavar="FILE", help="file to write (orpo.yaml)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Look, and write the file."""
    from orpo.system.console import print_json, report_console, say
    from orpo.system.process import quiet_libraries
    from orpo.training.starter import as_yaml, starter, write_starter

    quiet_libraries()
    if Path(args.out).exists():  # told before a model is fetched for nothing
        write_starter(Path(args.out), "")
    data = args.data or only_data_file(Path())
    lines = starter(args.model, data, revision=args.model_revision)
    write_starter(Path(args.out), as_yaml(lines, path=args.out))
    console = report_console(is_json=args.json)
    for line in lines:
        if line.why:
            say(console, f"{line.key} = {line.value}: {line.why}")
    say(console, f"written      {args.out}")
    say(console, f"next         orpo check {args.out}   ·   orpo train {args.out}")
    if args.json:
        print_json({"file": args.out, "values": {line.key: line.value for line in lines}, "why": {line.key: line.why for line in lines}})
    return 0


def only_data_file(folder: Path) -> str:
    """The one file of rows in a folder; the packaged pairs where there is none.

    Raises:
        UserError: there are several.
    """
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(_ENDINGS))
    if len(found) > 1:
        raise UserError(f"there are several files of rows: {', '.join(found[:5])}", where="DATA", mend=f"name one: orpo init {found[0]}")
    return found[0] if found else DEMO_DATA
