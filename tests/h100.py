"""What an H100's compiler makes of a graph, on a machine without one: inductor is told of the card, Triton compiles, nothing is launched.

The graphs are traced from tensors on a CPU, handed to inductor as if they lay on CUDA, and computed by their own operators. What reaches
into torch and Triton is private and was written for torch 2.11 and Triton 3.6; hence a process of its own:

    python -m h100 flex bfloat16 64 2 None None False     # dtype, head size, key heads of 4, window, soft cap, sinks
    python -m h100 head bfloat16 None                     # dtype, soft cap

print a JSON object: graphs after each of several lengths, kernels with the shared memory that they ask for, what failed.
"""

from __future__ import annotations

import ast
import copy
import json
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch

SHARED_BYTES = 232_448
"""Shared memory that a block of an H100 may have."""
CARD = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0, regs_per_multiprocessor=65536, warp_size=32, gcnArchName="",
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 * 2**30,
)  # fmt: skip
kernels_made: list[dict[str, Any]] = []
failures: list[str] = []


class CompiledBackwardError(Exception):
    """Ends a backward pass whose kernels are there: computed by its operators on a CPU it takes minutes."""


class Driver:
    """Of Triton."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132})

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def pretend() -> None:
    """Tell torch and Triton of the card."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import compile_fx, config, scheduler, utils  # noqa: F401
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch.utils import _triton

    for name, value in {"get_device_properties": CARD, "get_device_capability": (9, 0), "current_device": 0, "device_count": 1}.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("is_tf32_supported", "is_bf16_supported"):
        setattr(torch.cuda, name, lambda *_, **__: True)

    answers = {
        "is_available": True,
        "is_triton_capable": True,
        "is_bf16_supported": True,
        "get_compute_capability": 90,
        "current_device": 0,
    }
    answers |= {"device_count": 1, "get_device_properties": CARD, "raise_if_triton_unavailable": None}
    methods = {name: staticmethod(lambda *_, value=value, **__: value) for name, value in answers.items()}
    worker = type(
        "Worker", (device_interface.CudaInterface.Worker,), {name: methods[name] for name in ("current_device", "get_device_properties")}
    )
    device_interface.get_interface_for_device("cpu")  # all are registered now
    device_interface.register_interface_for_device("cuda", type("Card", (device_interface.CudaInterface,), {**methods, "Worker": worker}))
    for module in [_triton, *(module for name, module in sys.modules.items() if name.startswith("torch._inductor"))]:
        if hasattr(module, "has_triton"):
            module.has_triton = lambda *_: True
    config.compile_threads, config.fx_graph_cache = 1, False
    triton_helpers.set_driver_to_gpu = lambda: None
    triton_heuristics.CachingAutotuner.precompile = _compiled_only
    triton.runtime.driver.set_active(Driver())


def _compiled_only(tuner: Any, *_: Any, **__: Any) -> None:
    for config in tuner.configs:
        name = str(tuner.inductor_meta.get("kernel_name"))
        try:
            kernel = tuner._precompile_config(config).kernel
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}"[:2000])
        else:
            kernels_made.append({"name": name, "shared": getattr(kernel, "shared", None)})


def backend(graph: Any, examples: Any) -> Any:
    """Inductor's, for `torch.compile`: compiles for the card, computes on the CPU."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, examples, inner_compile=_inner)


def _inner(graph: Any, examples: Any, **options: Any) -> Any:
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx_inner

    try:
        compile_fx_inner(_moved(graph), [_on_card(example) for example in examples], **options)
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}"[:2000])
    if options.get("is_backward"):
        raise CompiledBackwardError
    return make_boxed_func(graph.forward)


def _on_card(value: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")


def _moved(graph: Any) -> Any:
    moved = copy.deepcopy(graph)
    for part in [module for module in moved.modules() if isinstance(module, torch.fx.GraphModule)]:
        for node in part.graph.nodes:
            for key in {"val", "example_value"} & set(node.meta):
                node.meta[key] = torch.utils._pytree.tree_map(_on_card, node.meta[key])
            node.kwargs = {key: torch.device("cuda", 0) if isinstance(value, torch.device) else value for key, value in node.kwargs.items()}
        part.recompile()
    return moved


def flex(dtype: torch.dtype, width: int, kv: int, window: int | None, softcap: float | None, has_sinks: bool) -> list[int]:
    """Forward of the packed row for several lengths, and backward of the first; graphs after each."""
    from flexcpu import flex_as_on_a_gpu
    from orpo.engine import flex, kernels
    from orpo.engine.layout import PackedLayout
    from orpo.engine.rule import AttentionRule
    from packedrows import inputs

    counts = []
    with flex_as_on_a_gpu(backend):
        for lengths in [(150, 30, 40), (500, 20, 300)]:
            layout = PackedLayout.of([lengths, (5, 2)])
            rows = flex.padded_rows(layout.num_rows)
            leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs(rows, kv=kv, width=width)]
            sinks_H = torch.zeros(4, requires_grad=True) if has_sinks else None
            output = flex.attend(*leaves, layout, AttentionRule(0.3, window, softcap, sinks_H))
            if not counts:
                with suppress(CompiledBackwardError):
                    output.float().sum().backward()
            counts.append(kernels.num_compiled_graphs())
    return counts


def head(dtype: torch.dtype, softcap: float | None) -> list[int]:
    """The two passes over a chunk of logits."""
    from orpo.engine import kernels, logits

    rule, counts = logits.LogitRule(1.0, softcap), []
    first, second = (
        torch.compile(lambda *values, f=f: f(*values, rule), dynamic=True, backend=backend)
        for f in (logits.read_logps, logits.write_gradient)
    )
    for rows in (7, 30, 200):
        logits_CV, target_C = torch.randn(rows, 1000).to(dtype), torch.arange(rows)
        _, lse_C = first(logits_CV, target_C)
        second(logits_CV, target_C, torch.ones(rows), lse_C)
        counts.append(kernels.num_compiled_graphs())
    return counts


if __name__ == "__main__":
    kind, dtype, *rest = sys.argv[1:]
    pretend()
    graphs = {"flex": flex, "head": head}[kind](getattr(torch, dtype), *map(ast.literal_eval, rest))
    print(json.dumps({"graphs": graphs, "kernels": kernels_made, "failures": failures}))
