"""Bring a run's weights into the form that another program reads: orpo export runs/my-run --to gguf

merged   a plain model folder that needs nothing else (an adapter is merged into its base)
adapter  the LoRA adapter alone
gguf     one file for llama.cpp, Ollama, LM Studio (Llama family)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orpo.inference.ready import Ready

NAME = "export"
HELP = "write a run's weights as a merged model, an adapter, or a GGUF file"

FORMS = ("merged", "adapter", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a run's folder, one of its checkpoints, or any model's name")
    parser.add_argument("--to", choices=FORMS, default="merged", help="the form (merged)")
    parser.add_argument("--out", type=Path, help="where to; by default inside the run's folder, under export/")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights on disk; gguf: float16 unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at the same place")
    parser.add_argument("--model_revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Export and say where to."""
    from orpo.inference.ready import make_ready
    from orpo.system.console import human_bytes, print_json, report_console, say, stderr_console
    from orpo.system.process import quiet_libraries

    quiet_libraries()
    say(stderr_console(), f"loading      {args.model}")
    ready = make_ready(args.model, revision=args.model_revision, dtype="auto", device="cpu")
    say(stderr_console(), f"exporting    {args.to}; what is written is loaded again and compared with the model")
    target = export(ready, args)
    files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
    num_bytes = sum(path.stat().st_size for path in files)
    if args.json:
        print_json({"form": args.to, "path": str(target), "bytes": num_bytes, "files": [path.name for path in files]})
        return 0
    console = report_console(is_json=False)
    say(console, f"{args.to}: {target} ({human_bytes(num_bytes)})")
    if args.to == "merged":
        say(console, f'load it with AutoModelForCausalLM.from_pretrained("{target}")')
    return 0


def export(ready: Ready, args: argparse.Namespace) -> Path:
    """Write the form that was asked for.

    Raises:
        UserError: no adapter to export, an architecture that GGUF has no name for, or a place that is taken.
    """
    from orpo.models.export import export_adapter, export_gguf, export_merged

    model, tokenizer = ready.loaded.model, ready.loaded.tokenizer
    target = args.out or default_target(args.model, args.to)
    stops = ready.encoder.terminator_ids
    if args.to == "adapter":
        return export_adapter(model, tokenizer, target, stop_token_ids=stops, is_overwriting=args.overwrite)
    if args.to == "gguf":
        return export_gguf(
            model,
            tokenizer,
            target,
            dtype=args.dtype or "float16",
            name=Path(args.model).name,
            stop_token_ids=stops,
            is_overwriting=args.overwrite,
        )
    return export_merged(model, tokenizer, target, dtype=args.dtype, stop_token_ids=stops, is_overwriting=args.overwrite)


def default_target(model: str, form: str) -> Path:
    """`<run>/export/merged`, or `<name>-merged` here for a model that is no folder of ours."""
    folder = Path(model)
    name = f"{folder.name or 'model'}.gguf" if form == "gguf" else form
    if (folder / "run.json").is_file():
        return folder / "export" / name
    return Path(name if form == "gguf" else f"{folder.name}-{form}")
