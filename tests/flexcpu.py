"""FlexAttention's backward pass on a CPU: torch has the arithmetic and refuses the device; only the refusal is lifted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def flex_trains_here() -> Iterator[None]:
    """Let the operator's own eager arithmetic, which writes out all scores, make gradients on a CPU."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        torch._dynamo.reset()  # eager it is traced all the same, and a process may trace one function eight times
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        yield
