"""What a GPU's host would give out for one decoder layer, counted on a CPU: operators, bytes, copies.

    python benchmarks/launches.py [--out benchmarks/results/launches.json]

One layer of Qwen2.5-3B's shape in bf16, forward and backward, after masks and plans are made. Nothing is computed: tensors have shapes
and no numbers. An operator is what PyTorch dispatches, without views; its bytes are those of all tensors that it is given and gives back,
so what a kernel keeps in its cache counts as if it were memory. Kernels that a CPU does not have (`flex`, `varlen`) count as one operator
each way. The counts depend on no clock and no machine, and a test holds the document to them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from orpo.engine import attention, flex
from orpo.engine.layout import PackedLayout
from orpo.engine.shared import padded_rows

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 1,
    "vocab_size": 32, "max_position_embeddings": 8192,
}  # fmt: skip
MIXES = {"16 HH groups": ((148, 40, 51),) * 16, "4 UltraFeedback groups": ((190, 270, 270),) * 4, "a long group": ((2048, 256, 256),)}


class Launches(TorchDispatchMode):
    """Counts operators that are not views, and the bytes of what they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.num_bytes = self.copied_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(item.alias_info is not None and not item.alias_info.is_write for item in function._schema.returns):
            return result  # a view
        name = function.overloadpacket.__name__
        if name.startswith("empty") or name in ("detach", "_unsafe_view", "device"):
            return result
        self.names[name] += 1
        moved = sum(tensor.numel() * tensor.element_size() for tensor in _tensors((args, kwargs or {}, result)))
        self.num_bytes += moved
        if name in ("clone", "copy_", "cat", "index_select", "_to_copy", "repeat_interleave", "fill_", "zeros", "slice_backward"):
            self.copied_bytes += moved
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


@torch.library.custom_op("orpo_bench::kernel", mutates_args=())
def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stands for a kernel that takes the whole row."""
    return torch.zeros_like(query)


@torch.library.custom_op("orpo_bench::kernel_backward", mutates_args=())
def kernel_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward pass."""
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


kernel.register_fake(lambda query, key, value: torch.empty_like(query))
kernel_backward.register_fake(lambda grad, query, key, value: (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)))
kernel.register_autograd(
    lambda ctx, grad: kernel_backward(grad, *ctx.saved_tensors), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class _Extra:
    lse = None


def _flex(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Any:
    return kernel(query, key, value), _Extra()


def _varlen(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return kernel(query, key, value)


def decoder_layer() -> Any:
    """(the layer, its rotary embedding), in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen2", **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model.model.layers[0], model.model.rotary_emb


def packed(layer: nn.Module, rotary: nn.Module, layouts: Sequence[PackedLayout]) -> Callable[[], None]:
    """Forward and backward over each packed row."""
    rows = [layout.num_rows if layout.kernel != "flex" else padded_rows(layout.num_rows) for layout in layouts]
    hidden = [torch.zeros(1, count, SHAPE["hidden_size"], dtype=torch.bfloat16, requires_grad=True) for count in rows]
    places = [rotary(one, torch.arange(count)[None]) for one, count in zip(hidden, rows, strict=True)]

    def run() -> None:
        for layout, one, place in zip(layouts, hidden, places, strict=True):
            result = layer(one, position_embeddings=place, attention_mask=None, shared_layout=layout)
            (result if isinstance(result, Tensor) else result[0]).backward(one.detach())
        layer.zero_grad(set_to_none=True)

    return run


def counted(run: Callable[[], None]) -> dict[str, Any]:
    """What the second run dispatches; the first one makes masks."""
    run()
    with Launches() as launches:
        run()
    products = sum(count for name, count in launches.names.items() if name in ("mm", "addmm", "bmm"))
    inside = sum(count for name, count in launches.names.items() if "attention" in name or name.startswith("kernel"))
    return {
        "operators": sum(launches.names.values()), "products": products, "attention_calls": inside,
        "gb": round(launches.num_bytes / 1e9, 3), "copied_gb": round(launches.copied_bytes / 1e9, 3),
    }  # fmt: skip


def measure(mixes: Sequence[str] = tuple(MIXES)) -> dict[str, Any]:
    """Counts by mix and way."""
    results: dict[str, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        layer, rotary = decoder_layer()
        stack.enter_context(patch.object(attention, "BLOCK_DEVICES", ()))
        stack.enter_context(patch("torch.nn.attention.flex_attention.flex_attention", _flex))
        stack.enter_context(patch.object(flex, "block_mask", lambda *_: None))
        stack.enter_context(patch("torch.nn.attention.varlen.varlen_attn", _varlen))
        for mix in mixes:
            groups = MIXES[mix]
            ways = {"a micro-batch for each group, sdpa": [PackedLayout.of([group]) for group in groups]}
            ways |= {f"one packed row, {name}": [PackedLayout.of(groups, name)] for name in ("sdpa", "flex", "varlen")}
            results[mix] = {way: counted(packed(layer, rotary, layouts)) for way, layouts in ways.items()}
    return results


def table(results: dict[str, Any]) -> str:
    """As docs/performance.md shows it."""
    lines = [
        "| one layer, forward and backward | operators | of them attention's kernels | GB read and written | of them copies |",
        "|---|---|---|---|---|",
    ]
    for mix, ways in results.items():
        for way, found in ways.items():
            cells = (f"{mix}: {way}", found["operators"], found["attention_calls"], f"{found['gb']:.1f}", f"{found['copied_gb']:.2f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = measure()
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
