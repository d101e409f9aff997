"""Before an export takes its name: does what was written compute what the model computes that it was made from?

Merged models and adapters are loaded again from what was written and asked for logits; a GGUF file's tensors are compared with the model's
within the rounding of their type.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from orpo.errors import UserError
from orpo.models.adapters import adapter_base, has_experts, is_adapted
from orpo.models.softcap import honour_soft_cap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PROBE_ROWS, _PROBE_TOKENS = 2, 24

_ERRORS = {8: 0.01, 6: 0.025, 5: 0.05, 4: 0.1, 3: 0.2, 2: 0.35, 1: 0.5}
"""Root mean square error of llama.cpp's types by their bits, in that of the weights; rounded up from what was measured."""

_TOLERANCES = {"float32": 1e-3, "float32 elsewhere": 2e-2, "half": 0.1}
"""Of the root mean square of the differences between logits, in standard deviations of the logits: float32 on one processor, on two kinds
(whose products may be shortened), and 16 bits, where merging and every layer round (with experts: of the token in the middle)."""


def check_merged(plain: PreTrainedModel, folder: Path) -> None:
    """A folder, loaded again, has the merged model's weights bit for bit and computes the same.

    Loaded in the precision of its files the second model's weights stay in them: what is read of it is cache that the system can take back.
    A quantized model, which only its own device can load, is compared by the tensors in the files.

    Raises:
        UserError: it does not.
    """
    if _is_quantized(plain):
        _check_files(plain, folder)
        return
    written = type(plain).from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True).eval()
    honour_soft_cap(written)
    _check_equal(plain.state_dict(), written.state_dict())  # not the files: some architectures are stored under other names than they run
    _check_logits(plain, written, "merged model")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model computes for a few tokens, kept while the model itself is changed.

    Attributes:
        ids, logits: the tokens, and what it makes of them.
        dtypes, device: of its weights.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    dtypes: set[torch.dtype]
    device: str

    @classmethod
    def of(cls, model: Any) -> Probe:
        """Ask a model, where it is."""
        ids = _probe_ids(model)
        return cls(ids, _logits(model, ids), _dtypes(model), model.device.type)


def check_merge(before: Probe, plain: PreTrainedModel) -> None:
    """A merged model in memory computes what the model with its adapter did.

    Raises:
        UserError: it does not.
    """
    _check_probe(before, plain, "merged model")


def check_adapter(model: Any, folder: Path) -> None:
    """An adapter's folder, loaded onto its base from where that is stored, computes what the model does.

    The base is read in the precision of its files, so that its weights stay in them and take no memory of their own. Where it cannot be
    loaded again (quantized, of foreign code, built in memory, no longer where it was) the adapter's tensors are compared alone.

    Raises:
        UserError: it does not.
    """
    _check_adapter_tensors(model, folder)
    base = model.get_base_model()
    if _is_quantized(base) or type(base).__module__.startswith("transformers_modules"):
        return
    written = _on_its_base(folder)
    if written is not None:
        _check_logits(model, written, "adapter")


def _on_its_base(folder: Path) -> Any:
    from orpo.models.find import ModelSource, find_source
    from orpo.models.load import load_model

    try:
        find_source(adapter_base(ModelSource(str(folder), "adapter", str(folder)))[0])
        return load_model(folder, dtype="auto", device="cpu").model
    except UserError as error:  # weights that were trained are not thrown away since a base has moved
        logger.warning("the adapter cannot be tried on its base model: %s", str(error).splitlines()[0])
        return None


def check_gguf(plain: PreTrainedModel, path: Path) -> None:
    """Every tensor of a GGUF file is the model's, within half a step of the type it is stored in.

    Raises:
        UserError: one differs, is missing, or is one too many.
    """
    from gguf import GGUFReader

    from orpo.models.gguf_write import tensors_of

    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    expected = dict(tensors_of(plain))
    if stored.keys() != expected.keys():
        _refuse("GGUF file", f"its tensors differ by name, {sorted(stored.keys() ^ expected.keys())[0]} first")
    for name, tensor in expected.items():
        values = tensor.detach().to("cpu").float().numpy()
        written = np.asarray(stored[name].data)
        if written.shape != values.shape:
            _refuse("GGUF file", f"{name} has shape {written.shape}, the model's has {values.shape}")
        if match := re.search(r"attn_([qk])\.weight$", name):
            config = plain.config
            written = _halves_apart(written, config.num_attention_heads if match[1] == "q" else config.num_key_value_heads)
        step = np.finfo(written.dtype)
        allowed = np.abs(values) * step.eps / 2 + step.smallest_subnormal
        if not (np.abs(written.astype(np.float64) - values) <= allowed).all():
            _refuse("GGUF file", f"{name} differs by more than {written.dtype} rounds")


def check_converted(plain: PreTrainedModel, path: Path, kind: str, *, num_tokens: int) -> None:
    """Every weight of a GGUF file is the model's within the rounding of the type it is stored in.

    The file is read back by transformers. For a family that it does not read from GGUF the tensors are found by the `gguf` package's table
    of names instead, and their rows are compared in any order, since converters rearrange them.

    Args:
        num_tokens: of the tokenizer; rows of the embeddings beyond them may be left out.

    Raises:
        UserError: one differs or is missing.
    """
    from orpo.models.gguf_read import load_weights

    try:
        found = load_weights(path, plain).state_dict()
    except UserError as error:
        logger.info("%s", str(error).splitlines()[0])
        _check_by_name(plain, path, kind, num_tokens)
        return
    turned = _stored_turned(plain)
    for name, tensor in plain.state_dict().items():
        values, written = tensor.detach().float().cpu(), found[name].float()
        if written.shape != values.shape:
            _refuse("GGUF file", f"{name} has shape {tuple(written.shape)}, the model's has {tuple(values.shape)}")
        if name in turned:  # blocks lie along the file's rows
            values, written = values.T, written.T
        _check_gap(name, (written - values).abs(), _rounding(values, kind), kind)


def _stored_turned(model: PreTrainedModel) -> set[str]:
    """Weights that the model keeps as (inputs, outputs), GPT-2's, and a GGUF file the other way round."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def check_quantized(before: Path, after: Path) -> None:
    """A quantized GGUF file holds the tensors of the one it was made from, as near as their types are.

    Raises:
        UserError: one is missing, or its error is beyond twice what its type makes of weights that are drawn from a normal distribution.
    """
    from gguf import GGUFReader, dequantize

    stored, found = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (before, after))
    if stored.keys() != found.keys():
        _refuse("GGUF file", f"its tensors differ by name, {sorted(stored.keys() ^ found.keys())[0]} first")
    for name, tensor in found.items():
        values = dequantize(stored[name].data, stored[name].tensor_type).astype(np.float64)
        written = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if written.shape != values.shape:
            _refuse("GGUF file", f"{name} has shape {written.shape}, and had {values.shape}")
        bits = re.search(r"Q(\d)", tensor.tensor_type.name)
        bound = 2 * _ERRORS[int(bits[1])] if bits else 0.01
        error = float(np.sqrt(np.square(written - values).mean()))
        if not error <= bound * float(np.sqrt(np.square(values).mean())):  # nan included
            _refuse("GGUF file", f"{name} differs by more than {tensor.tensor_type.name} rounds")


def _check_by_name(plain: PreTrainedModel, path: Path, kind: str, num_tokens: int) -> None:
    import torch
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

    reader = GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    name_of_architecture = reader.fields["general.architecture"].contents()
    architecture = next((key for key, name in MODEL_ARCH_NAMES.items() if name == name_of_architecture), None)
    if architecture is None:
        logger.warning("the GGUF file was not compared with the model: the package gguf does not know %r", name_of_architecture)
        return
    table = get_tensor_name_map(architecture, plain.config.get_text_config().num_hidden_layers)
    tied = set(getattr(plain, "all_tied_weights_keys", None) or ())
    if "lm_head.weight" in plain.state_dict() and "lm_head.weight" not in tied and "output.weight" not in stored:
        _refuse("GGUF file", "the output head is left out, since this family ties it to the embeddings, and here it is another")
    others = []
    for name, tensor in plain.state_dict().items():
        place = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if place not in stored:
            others += [name] if name not in tied else []
            continue
        values = tensor.detach().float().cpu()
        written = torch.from_numpy(np.array(dequantize(stored[place].data, stored[place].tensor_type)))
        if place in ("token_embd.weight", "output.weight") and num_tokens <= len(written) < len(values):
            values = values[: len(written)]
        _check_rows(name, values, written, kind)
    if others:
        logger.warning(
            "%d of %d tensors stand in the GGUF file in another form and were not compared, %s first",
            len(others),
            len(plain.state_dict()),
            others[0],
        )


def _check_rows(name: str, values: torch.Tensor, written: torch.Tensor, kind: str) -> None:
    """Sums of the rows and of their squares, sorted; a layer may be stored turned round, a norm with 1 added."""
    if written.shape != values.shape and written.shape == values.T.shape:
        values = values.T
    if written.shape != values.shape:
        _refuse("GGUF file", f"{name} has shape {tuple(written.shape)}, the model's has {tuple(values.shape)}")
    if values.ndim == 1 and float((written - values).mean()) > 0.5:
        written = written - 1
    values, written = (rows.double().reshape(len(rows), -1) for rows in (values, written))
    allowed = _rounding(values.float(), kind).double().expand_as(values).sum(-1).max() * 1.01
    largest = 2 * values.abs().max() + 1
    for power, bound in ((1, allowed), (2, allowed * largest)):
        ours, theirs = (rows.pow(power).sum(-1).sort().values for rows in (values, written))
        _check_gap(name, (ours - theirs).abs(), bound, kind)


def _check_gap(name: str, gaps: torch.Tensor, allowed: torch.Tensor, kind: str) -> None:
    if not bool((gaps <= allowed).all()):  # nan included
        _refuse("GGUF file", f"{name} differs by up to {float(gaps.nan_to_num(nan=float('inf')).max()):.2g}, which {kind} does not round")


def _rounding(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Half a step of a type at each value, and a little for what a converter adds and a reader takes off again (1 to a norm)."""
    import torch

    if kind == "q8_0":  # 127 steps to the largest value of a block, whose scale is a float16
        return values.abs().max(dim=-1, keepdim=True).values / 127 if values.ndim > 1 else values.abs() * 1e-6 + 1e-6
    step = torch.finfo(getattr(torch, kind))
    return values.abs() * max(step.eps / 2, 1e-6) + max(step.smallest_normal, 1e-6) if kind != "float32" else values.abs() * 1e-6 + 1e-6


def _halves_apart(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """From neighbouring rows that rotate against each other to the halves of a head, as transformers has them."""
    size = rows.shape[0] // num_heads
    order = np.concatenate([head * size + np.r_[0:size:2, 1:size:2] for head in range(num_heads)])
    return rows[order]


def _check_files(plain: PreTrainedModel, folder: Path) -> None:
    from safetensors.torch import load_file

    own = plain.state_dict()
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items() if name in own}
    if not stored:
        _refuse("model", "its files hold none of the weights in memory")
    _check_equal({name: own[name] for name in stored}, stored)


def _check_equal(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    import torch

    for name, tensor in own.items():
        if name not in found:
            _refuse("model", f"{name} is missing")
        if found[name].dtype != tensor.dtype or not torch.equal(found[name].cpu(), tensor.detach().cpu()):
            _refuse("model", f"{name} is not the one in memory")


def check_state(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """A folder written from the whole weights of a model that is in parts has these weights, bit for bit.

    Raises:
        UserError: it does not.
    """
    if is_adapted(model):
        _check_adapter_tensors(model, folder, state)
        return
    written = _own_class(model).from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    _check_equal(state, written.state_dict())


def _own_class(model: Any) -> Any:
    """The class that a model had before it was spread: the folder's own code need not be trusted again to read it, as here it is loaded."""
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    return next(kind for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel) and not issubclass(kind, FSDPModule))


def _check_adapter_tensors(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    whole = None if state is None else dict(state)
    for name, tensor in get_peft_model_state_dict(model, whole, save_embedding_layers=False).items():
        if name not in stored or not torch.equal(stored[name], tensor.detach().cpu()):
            _refuse("adapter", f"{name} is {'not the one in memory' if name in stored else 'missing'}")


def _check_logits(model: Any, written: Any, what: str) -> None:
    """Compare two models on a few tokens, each where it is."""
    _check_probe(Probe.of(model), written, what)


def _check_probe(before: Probe, written: Any, what: str) -> None:
    import torch

    expected, found = before.logits, _logits(written, before.ids)
    if expected.shape != found.shape:
        _refuse(what, f"it gives logits for {found.shape[-1]} tokens, the model for {expected.shape[-1]}")
    gaps = torch.where(expected == found, torch.zeros_like(expected), (expected - found).abs())
    spread = expected[torch.isfinite(expected)].std()
    by_token = gaps.square().mean(-1)
    is_half = bool((before.dtypes | _dtypes(written)) & {torch.float16, torch.bfloat16})
    # Rounding sends a token between two experts to the other one, and what that gives is no rounding: such a token says nothing.
    typical = by_token.median() if is_half and has_experts(written) else by_token.mean()
    gap = float(typical.sqrt() / spread.clamp_min(1e-6))
    is_on_cpu = {before.device, written.device.type} == {"cpu"}
    tolerance = _TOLERANCES["half" if is_half else "float32" if is_on_cpu else "float32 elsewhere"]
    if not gap <= tolerance:  # nan included
        _refuse(what, f"its logits differ from the model's by {gap:.2g} of their standard deviation, {tolerance:g} can be rounding")


def _dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _probe_ids(model: Any) -> torch.Tensor:
    """The same few tokens every time, the last of the vocabulary among them (new tokens are there), none that stands for an image."""
    import torch

    config = model.config
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    reserved = {value for name, value in settings.items() if re.search(r"token_(id|index)$", name) and isinstance(value, int)}
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    free = [token_id for token_id in range(num_rows) if token_id not in reserved] or [0]
    shape = (_PROBE_ROWS, _PROBE_TOKENS)
    picks = torch.randint(len(free), shape, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(free)[picks]
    last = torch.tensor(free[-_PROBE_TOKENS // 2 :])
    ids[0, : len(last)] = last
    return ids


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids.to(model.device)).logits
            return logits.float().cpu()
    finally:
        model.train(was_training)


def _is_quantized(model: Any) -> bool:
    base = model.get_base_model() if is_adapted(model) else model
    names = ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer")
    return any(getattr(base, name, None) for name in names) or getattr(base.config, "quantization_config", None) is not None


def _refuse(what: str, difference: str) -> NoReturn:
    raise UserError(
        f"the {what} that was written is not the model it was made from: {difference}; it was not published",
        mend="the run's folder and its checkpoints are untouched; choose another form of export, and report this with the model's name",
    )
