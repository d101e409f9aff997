"""FlexAttention's backward pass on a CPU: torch has the arithmetic and refuses the device; only the refusal is lifted."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from orpo.engine import flex


@contextmanager
def flex_trains_here() -> Iterator[None]:
    """Let the operator's own eager arithmetic, which writes out all scores, make gradients on a CPU."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        torch._dynamo.reset()  # eager it is traced all the same, and a process may trace one function eight times
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        yield


@contextmanager
def flex_as_on_a_gpu(backend: str = "eager") -> Iterator[None]:
    """Its call compiled for dynamic lengths as well, by a backend that a CPU has."""
    with flex_trains_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "COMPILED_DEVICES", ("cpu",))
        patch.setattr(flex, "_compiled", functools.partial(flex._compiled, backend))
        yield
