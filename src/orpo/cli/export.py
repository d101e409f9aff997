"""Bring a run's weights into the form that another program reads: orpo export runs/my-run --to gguf

merged   a plain model folder that needs nothing else (an adapter is merged into its base)
adapter  the LoRA adapter alone
gguf     one file for llama.cpp, Ollama, LM Studio, with a Modelfile beside it
hub      weights, tokenizer and card as a repository, private unless --public: an adapter as an adapter, or merged with --merge
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.inference.ready import Ready
    from orpo.models.find import ModelSource

NAME = "export"
HELP = "write a run's weights as a merged model, an adapter, or a GGUF file, or publish them"

FORMS = ("merged", "adapter", "gguf", "hub")
_FLAGS_OF = {
    "gguf": ("quantize", "converter", "system"),
    "hub": ("repo_id", "public", "dry_run", "merge"),
}
"""Flags that only one form takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a run's folder, one of its checkpoints, or any model's name")
    parser.add_argument("--to", choices=FORMS, default="merged", help="the form (merged)")
    parser.add_argument("--out", type=Path, help="where to; by default inside the run's folder, under export/")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights on disk; gguf: float16 unless said")
    parser.add_argument("--max_shard_size", default="5GB", help="most bytes of a file of weights; a larger model is cut (5GB)")
    parser.add_argument("--base", help="merge an adapter into this model: the full-precision weights of a quantized base")
    parser.add_argument("--dequantize", action="store_true", help="merge an adapter into the unpacked weights of its quantized base")
    parser.add_argument("--also", action="append", metavar="ADAPTER[=WEIGHT]", help="merge this adapter of the same base too; repeatable")
    parser.add_argument("--weight", type=float, help="of the first adapter beside those of --also (1)")
    parser.add_argument("--quantize", help="gguf: q8_0, or a type of llama-quantize such as q4_k_m")
    parser.add_argument("--converter", help="gguf: llama.cpp's convert_hf_to_gguf.py, or its folder; by default it is looked for")
    parser.add_argument("--system", help="gguf: system message for the Modelfile, which Ollama puts before every talk that has none")
    parser.add_argument("--repo_id", help="hub: OWNER/NAME of the repository")
    parser.add_argument("--public", action="store_true", help="hub: for everybody; a new repository is private otherwise")
    parser.add_argument("--merge", action="store_true", help="hub: merge an adapter into its base, and publish the whole model")
    parser.add_argument("--dry_run", action="store_true", help="hub: list the files and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at the same place")
    parser.add_argument("--model_revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Export and say where to."""
    from orpo.inference.ready import make_ready
    from orpo.system.console import say, stderr_console
    from orpo.system.process import quiet_libraries

    _check_flags(args)
    _check_place(args)
    others = _others(args)
    quiet_libraries()
    say(stderr_console(), f"loading      {args.model}")
    ready = make_ready(
        args.model,
        revision=args.model_revision,
        dtype="auto",
        device="cpu",
        adapter_base=args.base,
        is_dequantized=args.dequantize,
    )
    if others:
        from orpo.models.blend import blend

        model = blend(ready.loaded.model, 1.0 if args.weight is None else args.weight, others)
        ready = replace(ready, loaded=ready.loaded._replace(model=model))
    say(stderr_console(), f"exporting    {args.to}; what is written is loaded again and compared with the model")
    if args.to == "hub":
        return _to_hub(ready, args)
    target = export(ready, args)
    _tell(args, str(target), sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target])
    return 0


def _check_place(args: argparse.Namespace) -> None:
    from orpo.models.export import require_file, require_folder

    if args.to != "hub":
        target = args.out or default_target(args.model, args.to)
        (require_file if args.to == "gguf" else require_folder)(target, is_overwriting=args.overwrite)


def _others(args: argparse.Namespace) -> list[tuple[ModelSource, float]]:
    """The adapters of --also with their weights, looked at before a model is loaded."""
    from orpo.models.blend import Part, check_weight, find_parts

    if not args.also:
        return []
    if args.weight is not None:
        check_weight(args.weight, str(args.weight))
    parts = [Part.parse(text) for text in args.also]
    sources = find_parts(args.model, parts, is_base_given=bool(args.base))
    return [(source, part.weight) for source, part in zip(sources[1:], parts, strict=True)]


def _check_flags(args: argparse.Namespace) -> None:
    for form, flags in _FLAGS_OF.items():
        for flag in flags:
            if getattr(args, flag) and args.to != form:
                raise UserError(f"--{flag} is for --to {form}", where=f"--to {args.to}", mend=f"leave --{flag} away, or use --to {form}")
    if args.base and args.dequantize:
        raise UserError("--base and --dequantize exclude each other", expected="one of them")
    is_adapter = args.to == "adapter" or (args.to == "hub" and not args.merge)
    if is_adapter and (args.base or args.dequantize):
        raise UserError(
            "an adapter goes with the base it was trained on", where=f"--to {args.to}", mend="leave --base and --dequantize away"
        )
    if args.also and is_adapter:
        raise UserError("several adapters are one model only when they are merged", where="--also", mend="use --to merged, or --merge")
    if args.weight is not None and not args.also:
        raise UserError("is for several adapters", where="--weight", mend="name the others by --also, or leave --weight away")
    if args.to == "hub" and not args.repo_id and not args.dry_run:
        raise UserError("which repository?", where="--to hub", expected="--repo_id OWNER/NAME, or --dry_run to see the files")
    if args.to == "hub" and args.out is not None:
        raise UserError("--to hub writes nothing here", where="--out", mend="leave --out away, or export with --to merged")


def _tell(args: argparse.Namespace, target: str, files: list[Path], *, is_published: bool = False) -> None:
    from orpo.system.console import human_bytes, print_json, report_console, say

    num_bytes = sum(path.stat().st_size for path in files)
    if args.json:
        print_json({"form": args.to, "path": target, "bytes": num_bytes, "files": [path.name for path in files]})
        return
    console = report_console(is_json=False)
    if args.to == "hub":
        for path in files:
            say(console, f"  {human_bytes(path.stat().st_size):>10}  {path.name}")
    say(console, f"{args.to}: {target} ({human_bytes(num_bytes)}{'' if is_published or args.to != 'hub' else '; nothing was sent'})")
    if args.to == "gguf":
        say(console, f"for Ollama: ollama create NAME -f {Path(target).with_suffix('.Modelfile')}")
    if args.to == "merged":
        say(console, f'load it with AutoModelForCausalLM.from_pretrained("{target}")')


def export(ready: Ready, args: argparse.Namespace) -> Path:
    """Write the form that was asked for. The model in memory may be changed by it.

    Raises:
        UserError: no adapter to export, an architecture that GGUF has no name for, or a place that is taken.
    """
    from orpo.models.export import export_adapter, export_gguf, export_merged
    from orpo.models.modelfile import write_modelfile

    model, tokenizer = ready.loaded.model, ready.loaded.tokenizer
    target = args.out or default_target(args.model, args.to)
    shared: dict[str, Any] = {"stop_token_ids": ready.encoder.terminator_ids, "is_overwriting": args.overwrite}
    if args.to == "adapter":
        return export_adapter(model, tokenizer, target, **shared)
    if args.to == "gguf":
        path = export_gguf(
            model,
            tokenizer,
            target,
            dtype=args.dtype or "float16",
            quantize=args.quantize.lower() if args.quantize else None,
            converter=args.converter,
            name=Path(args.model).name,
            is_in_place=True,
            **shared,
        )
        write_modelfile(path, tokenizer, stop_token_ids=ready.encoder.terminator_ids, system=args.system)
        return path
    return export_merged(model, tokenizer, target, dtype=args.dtype, max_shard_size=args.max_shard_size, is_in_place=True, **shared)


def _to_hub(ready: Ready, args: argparse.Namespace) -> int:
    """Export into a folder of its own, add the run's card, and send what may be sent."""
    from orpo.models.adapters import is_adapted
    from orpo.models.hub import files_for_hub, publish

    form = "adapter" if is_adapted(ready.loaded.model) and not args.merge else "merged"
    with tempfile.TemporaryDirectory(prefix="orpo-hub-") as scratch:
        folder = Path(scratch) / "model"
        export(ready, argparse.Namespace(**{**vars(args), "to": form, "out": folder}))
        card = next((place / "README.md" for place in (Path(args.model), Path(args.model).parent) if (place / "run.json").is_file()), None)
        if card is not None and card.is_file():
            shutil.copy(card, folder / "README.md")
        files = files_for_hub(folder)
        address = args.repo_id or "(no repository named)"
        if not args.dry_run:
            address = publish(folder, args.repo_id, is_public=args.public)
        _tell(args, address, files, is_published=not args.dry_run)
    return 0


def default_target(model: str, form: str) -> Path:
    """`<run>/export/merged`, or `<name>-merged` here for a model that is no folder of ours."""
    folder = Path(model)
    name = f"{folder.name or 'model'}.gguf" if form == "gguf" else form
    if (folder / "run.json").is_file():
        return folder / "export" / name
    return Path(name if form == "gguf" else f"{folder.name}-{form}")
