"""Which device to compute on, and whether bf16 is worth it there."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import UserError

if TYPE_CHECKING:
    import torch

# Instruction sets that multiply bf16 matrices. Without one of them PyTorch emulates bf16 on a CPU, slower than fp32.
_CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best one of this machine: CUDA, then MPS, then the CPU.

    Under a distributed launch (`LOCAL_RANK` set) each process takes its own GPU.

    Raises:
        UserError: the device asked for does not exist, or is not available here.
    """
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"no device is called {str(device)!r}", where="device", expected="cuda, cuda:1, mps or cpu") from error
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(wanted.type, True)
    if not is_there:
        raise UserError(f"{wanted.type} is not available on this machine", where="device", mend="leave device unset, or set cpu")
    return wanted


def bf16_is_fast(device: str | torch.device | None = None) -> bool:
    """Whether computing in bf16 is faster than in fp32 on this device.

    Decided by what the hardware says it can do, not by a stopwatch, so that two runs on one machine never differ: CUDA from compute
    capability 8.0 (Ampere), CPUs with AVX-512 BF16, AMX or Arm's BF16 instructions. Not on MPS, where autocast to bf16 gains little.
    """
    import torch

    place = choose_device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_capability(place)[0] >= 8
    return place.type == "cpu" and bool(cpu_flags() & _CPU_BF16_FLAGS)


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Names of the processor's instruction sets, as Linux spells them; empty where they cannot be told."""
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    flags = {name for name, value in capabilities.items() if value is True}
    if platform.system() == "Linux" and cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n"):
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                flags.update(value.split())
                break
    return frozenset(flags)
