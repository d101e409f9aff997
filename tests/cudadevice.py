"""Where the tests marked `cuda` run: on a GPU, or with ORPO_CUDA_TESTS_ON=cpu on a CPU, with stand-ins for kernels that it does not have.

On a CPU they say nothing of a GPU's kernels, but a test that is wrong itself fails there first.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from flashcpu import varlen_runs_here
from flexcpu import flex_as_on_a_gpu
from orpo.engine import kernels, logits

DEVICE = os.environ.get("ORPO_CUDA_TESTS_ON", "cuda")
CUDA_TESTS = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
only_on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="asks CUDA itself")
compiler = {} if DEVICE == "cuda" else {"torch_compile_backend": "aot_eager"}


@contextmanager
def kernels_here() -> Iterator[None]:
    """Every kernel may be asked for. Torch's compiler starts anew: it goes through one function eight times and no more."""
    torch._dynamo.reset()
    with ExitStack() as stack:
        if DEVICE != "cuda":
            stack.enter_context(flex_as_on_a_gpu())
            stack.enter_context(varlen_runs_here())
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name, kernel in kernels.KERNELS.items():
                patch.setitem(kernels.KERNELS, name, dataclasses.replace(kernel, trains_on=None))
            patch.setattr(logits, "FUSED_DEVICES", (DEVICE,))
            patch.setattr(logits, "_compiled", lambda function, rule: functools.partial(function, rule=rule))
        yield
