"""Several adapters of one base in one model: its weights plus a multiple of each adapter's update.

The updates are added one after the other, each compared with what model and adapter compute together. That is a sum only where an update
does not depend on the weights it is added to: of plain LoRA and rsLoRA, on linear layers or experts, and of nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.errors import UserError
from orpo.models.adapters import adapter_base, load_adapter
from orpo.models.export import merge_checked
from orpo.models.find import ModelSource, find_source, read_json

_STARTS = (True, False, "gaussian", "orthogonal")
"""Ways to start an adapter that leave the base as it is; PiSSA and its like take a part of its weights into the adapter."""


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter and how much of it goes in."""

    name: str
    weight: float

    @classmethod
    def parse(cls, text: str) -> Part:
        """`runs/b=0.5`, or `runs/b` for the whole of it; a folder whose name ends like that is taken as the folder.

        Raises:
            UserError: the weight is none.
        """
        name, sign, number = text.rpartition("=")
        if not sign or Path(text).exists():
            return cls(text, 1.0)
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        return cls(name, check_weight(weight, number))


def check_weight(weight: float, text: str) -> float:
    """The weight itself.

    Raises:
        UserError: it is no number, or 0.
    """
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"{text!r} is no weight of an adapter", where="--also", expected="a number other than 0, as in --also runs/b=0.5")
    return weight


def find_parts(name: str, others: Sequence[Part], *, is_base_given: bool = False) -> list[ModelSource]:
    """Where the adapters are, the first one's name first; looked at before anything is loaded.

    Args:
        is_base_given: the user has named the base: it need not be the one that the adapters name.

    Raises:
        UserError: one is no plain LoRA adapter, or belongs to another base.
    """
    sources = [_source(one) for one in (name, *(other.name for other in others))]
    bases = [_base(source) for source in sources]
    odd = next((number for number, base in enumerate(bases) if base != bases[0]), None)
    if odd is not None and not is_base_given:
        raise UserError(
            f"belongs on {bases[odd]}, {name} on {bases[0]}",
            where=sources[odd].name,
            expected="adapters of one base",
            mend="name the base that both fit: --base MODEL",
        )
    return sources


def blend(model: Any, weight: float, others: Sequence[tuple[ModelSource, float]]) -> Any:
    """Put several adapters on one base; all but the last are merged into it, in place. The last is left for the export to merge.

    Args:
        model: the base with the first adapter on it.
        weight: of that adapter.
        others: the further ones with theirs.

    Raises:
        UserError: an adapter does not fit, or a merge is not what its parts compute.
    """
    _scale(model, weight)
    for source, part in others:
        model = load_adapter(merge_checked(model, is_in_place=True), source)
        _scale(model, part)
    return model


def _source(name: str) -> ModelSource:
    found = find_source(name)
    if found.kind != "adapter":
        raise UserError("is no adapter", where=name, expected="the folder of an adapter, or of a run that trained one")
    if reason := why_not_added(Path(found.location)):
        raise UserError(
            f"cannot be added to another adapter: {reason}",
            where=name,
            expected="plain LoRA or rsLoRA",
            mend="merge it alone (--to merged), and train the other one on the result",
        )
    return found


def why_not_added(folder: Path) -> str | None:
    """What makes an adapter's update more than a sum to add, or None."""
    from safetensors import safe_open

    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        return f"it is of the kind {config.get('peft_type')}"
    if config.get("use_dora"):
        return "DoRA changes with the weights it is put on"
    if config.get("init_lora_weights", True) not in _STARTS:
        return f"it began with a part of its base's weights ({config['init_lora_weights']})"
    if config.get("modules_to_save"):
        return f"it holds whole layers ({', '.join(config['modules_to_save'])})"
    if config.get("trainable_token_indices"):
        return "it holds rows for new tokens"
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
            other = next((key for key in file.keys() if not re.search(r"\.lora_(embedding_)?[AB]\b", key)), None)  # noqa: SIM118
    except (OSError, ValueError):
        return None  # whatever is wrong with the file is told when it is loaded
    return None if other is None else f"it holds weights of its own ({other})"


def _base(source: ModelSource) -> str:
    name, revision = adapter_base(source)
    place = Path(name).expanduser()
    return str(place.resolve()) if place.is_dir() else f"{name}@{revision}" if revision else name


def _scale(model: Any, weight: float) -> None:
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(weight)
