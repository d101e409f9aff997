"""Which device to compute on, and whether bf16 is worth it there."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.system.version import VERSION

if TYPE_CHECKING:
    import torch

_REPORTED_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "datasets"),
    *("tokenizers", "safetensors", "numpy", "bitsandbytes"),
)

# Instruction sets that multiply bf16 matrices. Without one of them PyTorch emulates bf16 on a CPU, slower than fp32.
_CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best one of this machine: CUDA, then XPU, then MPS, then the CPU.

    Under a distributed launch (`LOCAL_RANK` set) each process takes its own GPU.

    Raises:
        UserError: the device asked for does not exist, or is not available here.
    """
    import torch

    if device is None:
        for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            if module.is_available():
                return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % module.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"no device is called {str(device)!r}", where="device", expected="cuda, cuda:1, xpu, mps or cpu") from error
    checks: dict[str, Any] = {"cuda": torch.cuda.is_available, "xpu": torch.xpu.is_available, "mps": torch.backends.mps.is_available}
    is_there = wanted.type not in checks or checks[wanted.type]()
    if not is_there:
        raise UserError(f"{wanted.type} is not available on this machine", where="device", mend="leave device unset, or set cpu")
    # Of several processes the CPU has an index, and a model that is moved to `cpu:0` is copied, out of the pages of its file.
    return torch.device("cpu") if wanted.type == "cpu" else wanted


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


def memory_facts(device: torch.device) -> dict[str, int | None]:
    """Total and free bytes of the device's memory; None where the system does not say."""
    import torch

    if device.type in ("cuda", "xpu"):
        free, total = torch.get_device_module(device).mem_get_info(device)
        return {"total_bytes": total, "free_bytes": free}
    if device.type == "mps":
        return {"total_bytes": torch.mps.recommended_max_memory(), "free_bytes": None}
    limit, used = _container_memory()
    return {
        "total_bytes": _smaller(_proc_bytes(Path("/proc/meminfo"), "MemTotal"), limit),
        "free_bytes": _smaller(_proc_bytes(Path("/proc/meminfo"), "MemAvailable"), None if limit is None else limit - used),
    }


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most of the device's memory that this process has held so far; None where the system does not say."""
    import torch

    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Linux counts ru_maxrss from the fork on: a small process started by a large one would show the large one's peak.
    own = _proc_bytes(Path("/proc/self/status"), "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return own or (peak if platform.system() == "Darwin" else peak * 1024)


def _proc_bytes(file: Path, name: str) -> int | None:
    """A line `NAME: number kB` of a file below /proc, in bytes; None where the system has no such file or line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(limit, used) of the container; /proc/meminfo shows the whole machine. Cached files count as free: the kernel gives them up."""
    try:
        limit = (root / "memory.max").read_text(encoding="utf-8").strip()
        used = int((root / "memory.current").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="utf-8").split("\n") if line)
    except (OSError, ValueError):
        return None, 0
    return (int(limit) if limit.isdigit() else None), used - int(stat.get("inactive_file", 0))


def _smaller(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return min(known) if known else None


def versions() -> dict[str, str]:
    """Python, platform and the versions of the packages that a result depends on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform(), "orpo": VERSION}
    for name in _REPORTED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a device is, as far as a result or its speed depends on it."""
    import torch

    facts: dict[str, Any] = {"type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory_bytes": properties.total_memory, "count": torch.cuda.device_count()}
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    if device.type == "cpu":
        facts |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
    return facts


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached at all, asked once.

    Its client asks six times over half a minute, for each file anew; a user without a network wants to hear of a misspelt name before that.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # offline mode, no such host, no route, no answer in time, a proxy that refuses
        return False
    return True


def own_version() -> str:
    """The version of this package: what the sources say, not what was recorded when a clone was installed, which a pull leaves behind."""
    return VERSION
