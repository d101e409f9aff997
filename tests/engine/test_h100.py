"""What an H100 would be given, compiled on a machine without one (`h100.py`): kernels, their memory, and that lengths compile nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from h100 import SHARED_BYTES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or torch.version.cuda is None or not torch.__version__.startswith("2.11."),
        reason="needs Triton and a build of torch 2.11 for CUDA (make test-lowest)",
    ),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "call",
    [
        "flex float32 64 2 None None False",
        "flex float16 64 4 None None False",
        "flex bfloat16 64 2 40 None True",
        "flex bfloat16 96 4 None 0.7 False",
        "flex bfloat16 128 2 40 None False",
        "flex bfloat16 256 1 40 0.7 False",
        "flex float32 256 2 None None False",
        "head bfloat16 None",
        "head bfloat16 0.7",
        "head float32 None",
    ],
)
def test_every_kernel_compiles_and_fits_and_is_made_once(call: str, tmp_path: Path) -> None:
    """Of attention a kernel forward and one backward; of the head one for the log-probabilities and one for the gradient."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "h100", *call.split()], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["failures"]
    assert len(set(found["graphs"])) == 1, found["graphs"]
    assert max(kernel["shared"] for kernel in found["kernels"]) <= SHARED_BYTES
    names = {kernel["name"] for kernel in found["kernels"]}
    if call.startswith("flex"):
        assert {name.partition("fused_")[2].rstrip("_0123456789") for name in names if "_tem_" in name} == {
            "flex_attention", "flex_attention_backward_mul",
        }  # fmt: skip
    else:
        assert len(names) == 2, names
