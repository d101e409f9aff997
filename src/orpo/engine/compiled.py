"""`torch_compile: true`: each decoder layer as one graph, with packed attention in it as one operator.

Not the whole model, as accelerate would compile it: the head is put in place for every micro-batch, and all layers of a kind share what was
compiled for the first. Lengths are dynamic, so that no micro-batch is compiled for by itself. A layer that is more than one graph is left
as it is, and the start says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orpo.engine.attention import LAYOUT_KEYWORD
from orpo.engine.opaque import announce
from orpo.engine.parallel import decoder_layers


@contextmanager
def compiled_layers(model: nn.Module, *, backend: str | None = None, mode: str | None = None) -> Iterator[int]:
    """The model's decoder layers compiled, at their first call, while the context lasts; gives their number.

    Args:
        backend, mode: as for `torch.compile`.
    """
    layers = decoder_layers(model)
    for layer in layers:
        compiled = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend=backend or "inductor", mode=mode)
        layer.forward = _announcing(compiled)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _announcing(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **keywords: Any) -> Any:
        if (layout := keywords.get(LAYOUT_KEYWORD)) is not None:
            announce(layout)
        return compiled(*inputs, **keywords)

    return run


def why_not(error: Exception) -> str:
    """The first lines of what Dynamo or a compiler says, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]
