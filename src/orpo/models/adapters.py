"""LoRA adapters: put one on a model, load one, merge one."""

from __future__ import annotations

import copy
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.models.bare import is_bare
from orpo.models.dtype import settle_dtype, spread_dtype
from orpo.models.find import ModelSource, explain_failure, read_json
from orpo.system.parts import has_weights_in_parts, read_parts, shapes_of_parts

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head."""

HUB_COMMIT = "hub_commit"
"""Attribute of a model that came from the hub: the commit it came from."""


def lora_config(values: Mapping[str, Any]) -> LoraConfig:
    """The adapter that a run's keys ask for (LoRA, arXiv 2106.09685)."""
    from peft import LoraConfig

    return LoraConfig(
        r=values["lora_r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout"],
        target_modules=values["lora_target_modules"] or ALL_LINEAR,
        target_parameters=values["lora_target_parameters"],
        modules_to_save=values["lora_modules_to_save"],
        use_rslora=values["use_rslora"],
        use_dora=values["use_dora"],
        init_lora_weights=values.get("lora_init", True),
        bias="none",
        task_type="CAUSAL_LM",
    )


def read_targets(value: Any) -> Any:
    """`lora_target_modules` as it was meant: `q_proj,v_proj` and `q_proj` are names, `all` is every linear layer.

    PEFT takes any text as a regular expression for the whole path of a layer, which a bare name never matches.
    """
    if not isinstance(value, str) or value == ALL_LINEAR:
        return value
    if value.strip() == "all":
        return ALL_LINEAR
    return [name.strip() for name in value.split(",")] if re.fullmatch(r"\s*[\w.]+(\s*,\s*[\w.]+)*\s*", value) else value


def put_adapter(model: PreTrainedModel, peft_config: PeftConfig, *, use_gradient_checkpointing: bool = False) -> PeftModel:
    """Freeze the model and put a trainable adapter on it; it starts as no change at all.

    Args:
        use_gradient_checkpointing: whether the run will; a frozen model must be prepared for it.

    Raises:
        UserError: the model has an adapter already, or none of its layers has a name that is asked for.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from torch.linalg import LinAlgError

    if is_adapted(model):
        raise UserError("the model has an adapter already", where="peft_config", mend="merge it first, or leave peft_config out")
    modules = {name for name, _ in model.named_modules() if name}
    targets = getattr(peft_config, "target_modules", None)
    check_names([] if isinstance(targets, str) else targets or [], modules, "target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR and not any(re.fullmatch(targets, name) for name in modules):
        raise UserError(
            f"the regular expression {targets!r} matches no layer of this model",
            where="target_modules",
            expected="an expression for the whole path of a layer, such as .*[qv]_proj, or a list of names",
            mend="leave it out to adapt all linear layers",
        )
    check_names(getattr(peft_config, "modules_to_save", None) or [], modules, "modules_to_save")
    parameters = {name for name, _ in model.named_parameters()}
    check_names(getattr(peft_config, "target_parameters", None) or [], parameters, "target_parameters")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=use_gradient_checkpointing)
    elif use_gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    needs_base = not starts_without_base(peft_config)
    if needs_base:
        settle_dtype(model.parameters(), spread_dtype(model))
    try:
        with nullcontext() if needs_base else _as_it_will_be(model):
            adapted = get_peft_model(model, text_layers_only(peft_config, model), low_cpu_mem_usage=is_bare(model))
    except (ValueError, TypeError, AttributeError, ImportError, LinAlgError) as error:  # the last of weights that are not finite
        raise _does_not_fit(error, peft_config) from error
    pin_base(adapted)
    return adapted


def starts_without_base(peft_config: PeftConfig) -> bool:
    """Whether an adapter's first weights are made without a look at those of its base."""
    from peft import LoraConfig

    needs = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora")
    is_drawn = getattr(peft_config, "init_lora_weights", None) in (True, "gaussian")
    return type(peft_config) is LoraConfig and is_drawn and not any(getattr(peft_config, name, None) for name in needs)


@contextmanager
def _as_it_will_be(model: PreTrainedModel) -> Iterator[None]:
    """A model that was read as it is stored shows the dtype that it will have, and no values: an adapter's weights are drawn in its base's
    dtype, and would be rounded to it."""
    import torch

    dtype = spread_dtype(model)
    stored = {} if dtype is None else {weight: weight.data for weight in model.parameters()}
    for weight, values in stored.items():
        weight.data = torch.empty(1, dtype=dtype, device=values.device).expand(values.shape)
    try:
        yield
    finally:
        for weight, values in stored.items():
            weight.data = values


def _does_not_fit(error: Exception, peft_config: PeftConfig) -> Exception:
    """What PEFT could not do, told by what asked for it; an error of another kind as it is."""
    start = getattr(peft_config, "init_lora_weights", True)
    if not isinstance(start, bool):
        return UserError(
            f"an adapter of this model cannot start by {start!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where="lora_init",
            expected="pissa, pissa_niter_16, olora, orthogonal or gaussian; the first three need a base that is not quantized",
        )
    return UserError(f"the adapter does not fit the model: {error}", where="peft_config") if isinstance(error, ValueError) else error


def text_layers_only(peft_config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """The adapter's configuration kept off the vision and audio towers of a multimodal model, which rows of text never reach.

    Layers that are excluded by name, or chosen by a regular expression, stay as they were chosen.
    """
    targets = getattr(peft_config, "target_modules", None)
    is_expression = isinstance(targets, str) and targets != ALL_LINEAR
    if is_expression or getattr(peft_config, "exclude_modules", True) or model.config.get_text_config() is model.config:
        return peft_config
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name:
        return peft_config
    wanted = copy.copy(peft_config)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    wanted.exclude_modules = rf"(?!{re.escape(name)}\.)(?!{re.escape(head)}$).*"
    return wanted


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: Any, ratio: float) -> None:
    """Let an adapter's B matrices learn at another rate than its A: LoRA+ (arXiv 2402.12354). They are moved into groups of their own.

    Raises:
        UserError: the model has no such matrices.
    """
    fast = {id(weight) for name, weight in model.named_parameters() if re.search(r"\.lora_(embedding_)?B\b", name)}
    if not fast:
        raise UserError("there is no LoRA adapter, whose rates LoRA+ sets apart", where="loraplus_lr_ratio", mend="set use_peft: true")
    for group in list(optimizer.param_groups):
        others = [weight for weight in group["params"] if id(weight) not in fast]
        if len(others) == len(group["params"]):
            continue
        moved = [weight for weight in group["params"] if id(weight) in fast]
        group["params"] = others
        optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * ratio})


def pin_base(model: Any) -> None:
    """Let an adapter's configuration name the commit of its base: without one it is put on whatever `main` is that day."""
    settings = model.peft_config[model.active_adapter]
    commit = getattr(model.get_base_model(), HUB_COMMIT, None)
    if settings.revision is None and commit:
        settings.revision = commit


def has_experts(model: Any) -> bool:
    """Whether a token takes its way through some of a layer's experts: a mixture of experts, by the names in its configuration."""
    return any("experts" in name and name[0] != "_" for name in vars(model.config.get_text_config()))


def is_adapted(model: Any) -> bool:
    """Whether the model carries a PEFT adapter."""
    import sys

    peft = sys.modules.get("peft")  # where PEFT was never imported no model can have come from it
    return peft is not None and isinstance(model, peft.PeftModel)


def merge(model: Any, *, is_in_place: bool = False) -> PreTrainedModel:
    """The plain model whose weights hold the adapter's update. A model without an adapter comes back as it is.

    Args:
        is_in_place: work on the model itself, which then is the merged one; by default on a copy, so that the model stays usable (at the
            price of its memory once more).

    Raises:
        UserError: the base is quantized (its weights could only hold a rounded sum), or the sum is not finite.
    """
    if not is_adapted(model):
        return model
    base = model.get_base_model()
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False) or getattr(base, "hf_quantizer", None):
        is_stored_quantized = bool(getattr(getattr(base, "hf_quantizer", None), "pre_quantized", False))
        raise UserError(
            "an adapter cannot be merged into a quantized model without rounding it away",
            where=base.name_or_path or None,
            mend="the base is stored quantized: --dequantize merges into its unpacked weights, --base MODEL into full-precision ones; or "
            "export the adapter itself (--to adapter), which is used together with its base"
            if is_stored_quantized
            else "load the adapter's folder again without load_in_4bit or load_in_8bit, then merge",
        )
    target = model if is_in_place else copy.deepcopy(model)
    _untie_adapted(target.get_base_model())
    try:
        return target.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter's weights are not finite: {error}", mend="use an earlier checkpoint") from error


def _untie_adapted(base: PreTrainedModel) -> None:
    """Give a tied output head weights of its own, where an adapter changes it or the embeddings: the update of one is not the other's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if not any(isinstance(module, BaseTunerLayer) for module in (head, embeddings)):
        return
    head, embeddings = (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in (head, embeddings))
    if head is None or head.weight is not embeddings.weight:
        return
    head.weight = type(head.weight)(head.weight.detach().clone(), requires_grad=False)
    for config in {id(config): config for config in (base.config, base.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def adapter_base(source: ModelSource) -> tuple[str, str | None]:
    """(name, revision) of the model that an adapter's folder says it belongs to.

    Raises:
        UserError: adapter_config.json is broken or names none.
    """
    path = Path(source.location) / "adapter_config.json"
    config = read_json(path)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError("the adapter does not say which model it belongs to", where=str(path), expected='"base_model_name_or_path": "…"')
    revision = config.get("revision")
    return base, revision if isinstance(revision, str) else None


@contextmanager
def about_base(source: ModelSource) -> Iterator[None]:
    """While the base of an adapter is found and loaded: whatever fails is told to be the adapter's base, and where its name stands."""
    try:
        yield
    except UserError as error:
        problem = f"{error.where}: {error.what}" if error.where else error.what
        raise UserError(
            f"the adapter belongs on {adapter_base(source)[0]!r}: {problem}",
            where=str(Path(source.location) / "adapter_config.json"),
            expected=error.expected,
            mend=f"{error.mend + '; ' if error.mend else ''}where the base lies elsewhere by now, name its place there, as "
            '"base_model_name_or_path"',
        ) from error


def load_adapter(model: PreTrainedModel, source: ModelSource, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model. Only safetensors are read.

    Raises:
        UserError: no safetensors, damaged, or made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if has_weights_in_parts(source.location):
        return _adapter_from_parts(model, source, is_trainable=is_trainable)
    weights = Path(source.location) / "adapter_model.safetensors"
    if not weights.is_file():
        is_pickled = weights.with_suffix(".bin").is_file()
        raise UserError(
            f"the adapter's weights are {'there only as a pickle, which is never opened' if is_pickled else 'missing'}",
            where=source.location,
            expected=weights.name,
        )
    try:
        shapes = _tensor_shapes(weights)
        _grow_embeddings(model, shapes, _trained_tokens(read_json(Path(source.location) / "adapter_config.json")))
        adapted = PeftModel.from_pretrained(model, source.location, is_trainable=is_trainable)
    except Exception as error:  # PEFT raises as many kinds as transformers
        raise explain_failure(error, source, part="adapter") from error
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - shapes.keys())
    if missing:
        raise UserError(
            f"the adapter does not fit its base model: {len(missing)} of its tensors are missing, {missing[0]} first",
            where=source.location,
            mend="load it on the model it was trained on (base_model_name_or_path in adapter_config.json)",
        )
    return adapted


def _adapter_from_parts(model: PreTrainedModel, source: ModelSource, *, is_trainable: bool) -> PeftModel:
    """The adapter of a checkpoint that several processes have written, each its parts."""
    from peft import PeftConfig, get_peft_model

    settings = PeftConfig.from_pretrained(source.location)
    settings.inference_mode = False
    _grow_embeddings(model, shapes_of_parts(source.location), _trained_tokens(read_json(Path(source.location) / "adapter_config.json")))
    adapted = get_peft_model(model, settings)
    read_parts({name: weight.detach() for name, weight in adapted.named_parameters() if weight.requires_grad}, source.location)
    return adapted if is_trainable else adapted.requires_grad_(False)


def set_generation(model: PeftModel, folder: Path) -> None:
    """Let the model end its answers where the adapter's folder says; its base may know nothing of the end of a turn."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.get_base_model().generation_config = model.generation_config = GenerationConfig.from_pretrained(folder)


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict


def _grow_embeddings(model: PreTrainedModel, shapes: dict[str, list[int]], trained_tokens: set[int]) -> None:
    """Give the base as many rows as the embeddings, or the single rows, that came with the adapter: tokens were added before training."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    own = embeddings.weight.shape[0]
    needed = max(own, max(trained_tokens, default=-1) + 1)
    rows = shapes.get(f"base_model.model.{name}.weight", [needed])[0]
    if rows != own:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter's own rows replace them all


def _trained_tokens(config: Any) -> set[int]:
    """Ids whose rows an adapter's configuration says it holds."""
    given = config.get("trainable_token_indices") if isinstance(config, dict) else None
    lists = given.values() if isinstance(given, dict) else [given or []]
    return {int(token) for ids in lists for token in ids}


def check_names(wanted: Iterable[str], known: set[str], where: str) -> None:
    """Refuse a name that no layer or parameter ends in: PEFT takes it without a word as long as another one matches."""
    leaves = {name.rsplit(".", 1)[-1] for name in known}
    for name in wanted:
        if name != ALL_LINEAR and not any(one == name or one.endswith("." + name) for one in known):
            near = difflib.get_close_matches(name, leaves, n=1)
            raise UserError(
                f"the model has no {'parameter' if where == 'target_parameters' else 'layer'} {name!r}",
                where=where,
                expected=", ".join(sorted(leaf for leaf in leaves if not leaf.isdigit())),
                mend=f"did you mean {near[0]!r}?" if near else None,
            )
