"""Report this machine: devices, how fast bf16 is here, versions, and what is missing for which feature."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.system.installing import BUNDLED_WHEEL, bundled_line, pip_line

if TYPE_CHECKING:
    import torch

NAME = "doctor"
HELP = "report this machine: devices, bf16 speed, versions, missing packages"


# feature -> (modules it needs, the extra that brings them)
FEATURES: dict[str, tuple[tuple[str, ...], str]] = {
    "reading and writing GGUF files": (("gguf",), "gguf"),
    "4-bit and 8-bit base models": (("bitsandbytes",), "qlora"),
    "orpo audit: near duplicates, shortcuts": (("datasketch", "sklearn"), "audit"),
    "charts in pages": (("plotly",), "report"),
    "orpo eval --tasks ifeval": (("lm_eval", "nltk", "langdetect"), "ifeval"),
    "orpo eval --tasks alpacaeval, length-controlled": (("alpaca_eval",), "alpaca"),
    "orpo completion": (("shtab",), "completion"),
    "orpo chat --web": (("starlette", "uvicorn"), "web"),
    "notebooks": (("nbclient", "ipykernel"), "notebook"),
    "the project's own tests": (("pytest", "hypothesis", "trl"), "test"),
}
_MEASURED_SIZE = 1024
_MEASURED_S = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="do not measure speed")


def matmul_flops(device: torch.device, dtype: torch.dtype, *, limit_s: float = _MEASURED_S) -> float | None:
    """Floating-point operations per second of matrix products on a device, measured; None where the dtype is not supported."""
    import torch

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    size = _MEASURED_SIZE if device.type == "cpu" else 4 * _MEASURED_SIZE
    try:
        left = torch.ones(size, size, device=device, dtype=dtype)
        right = torch.ones(size, size, device=device, dtype=dtype)
        torch.mm(left, right)
    except (RuntimeError, NotImplementedError):
        return None
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < limit_s:
        torch.mm(left, right)
        wait()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def gather(*, is_quick: bool = False) -> dict[str, Any]:
    """Everything the command reports, as plain values."""
    import torch

    from orpo.data.stored.tokencache import TokenCache, default_folder
    from orpo.system.machine import bf16_is_fast, choose_device, describe_device, memory_facts, versions

    device = choose_device()
    speeds = {}
    if not is_quick:
        for name in ("float32", "bfloat16"):
            flops = matmul_flops(device, getattr(torch, name))
            speeds[name] = None if flops is None else round(flops / 1e9, 1)
    free_disk = shutil.disk_usage(Path.cwd()).free
    return {
        "versions": versions(),
        "device": {**describe_device(device), "memory": memory_facts(device)},
        "bf16_is_chosen": bf16_is_fast(device),
        "matmul_gflops": speeds,
        "disk_free_bytes": free_disk,
        "token_cache": TokenCache(default_folder()).facts(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"},
        "bundled_model": _bundled(),
        "features": {feature: _feature(modules, extra) for feature, (modules, extra) in FEATURES.items()},
    }


def _feature(modules: tuple[str, ...], extra: str) -> dict[str, Any]:
    """Whether a feature can be used on this machine, and the packages that it lacks."""
    missing = _missing(modules)
    return {"is_ready": not missing, "missing": missing, "get": pip_line(extra)}


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _bundled() -> dict[str, Any]:
    from orpo.models.bundled import BUNDLED_ALIAS, find_bundled_gguf

    try:
        version: str | None = importlib.metadata.version(BUNDLED_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"alias": BUNDLED_ALIAS, "is_ready": find_bundled_gguf() is not None, "wheel_version": version}


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 always, since an incomplete machine is no error."""
    from orpo.system.console import human_bytes, print_json, report_console, say

    facts = gather(is_quick=args.quick)
    if args.json:
        print_json(facts)
        return 0
    console = report_console(is_json=False)
    device, memory = facts["device"], facts["device"]["memory"]
    name = device.get("name") or f"cores {device.get('cores', '?')}, threads {device.get('threads', '?')}, {device.get('capability', '')}"
    say(console, f"device       {device['type']}: {name}")
    known = [f"{human_bytes(memory[key])} {word}" for key, word in (("total_bytes", "in all"), ("free_bytes", "free")) if memory[key]]
    say(console, f"memory       {', '.join(known) or 'unknown'}")
    say(console, f"disk         {human_bytes(facts['disk_free_bytes'])} free here")
    cache = facts["token_cache"]
    size = f"{cache['num_sets']} sets, {human_bytes(cache['num_bytes'])}; may be removed at any time" if cache["num_sets"] else "empty"
    say(console, f"cache        tokenised rows in {cache['folder']} ({size})")
    for dtype, gflops in facts["matmul_gflops"].items():
        say(console, f"{dtype:<12} " + (f"{gflops:,.0f} GFLOP/s in matrix products" if gflops else "not supported"))
    chosen = "bfloat16" if facts["bf16_is_chosen"] else "float32"
    say(console, f"compute      {chosen} where bf16 is not set")
    say(console, "versions     " + "  ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    bundled = facts["bundled_model"]
    how = f"missing: {bundled_line()}"
    say(console, f"model        {bundled['alias']}: {'ready' if bundled['is_ready'] else how}")
    for feature, state in facts["features"].items():
        mend = f": {state['get']}" if state["get"] else ""
        ready = "ready" if state["is_ready"] else f"missing {', '.join(state['missing'])}{mend}"
        say(console, f"feature      {feature}: {ready}")
    if facts["hub_offline"]:
        say(console, "hub          offline (HF_HUB_OFFLINE is set)")
    return 0
