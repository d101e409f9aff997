"""What libraries below torch do with memory on a CPU: glibc with freed blocks, oneDNN with compiled kernels.

Where there is no glibc (musl, macOS, Windows) its functions do nothing and say so.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system after every large tensor.

    By default each tensor above 32 MiB is mapped afresh and its pages are faulted in again on every use: converting 11 million numbers
    took 11.1 ms with it and 1.2 ms without (docs/performance.md). Affects the process, so only a trainer that owns the step asks for it.

    Returns:
        Whether the allocator took the setting (glibc only).
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(m_mmap_threshold, 2**30) and mallopt(m_trim_threshold, 2**31 - 1))


def map_large_blocks() -> bool:
    """Let glibc map every block above 1 MiB by itself, so that freeing it gives it back: where weights come and go, as in a sharded run.

    By default it learns from the first large blocks that are freed to keep blocks of up to 32 MiB, which then lie in pieces between others.

    Returns:
        Whether the allocator took the setting (glibc only).
    """
    m_mmap_threshold = -3
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(m_mmap_threshold, 2**20))


def return_freed_memory() -> bool:
    """Give back to the system what is freed but still held: after work that is not repeated, such as the comparison of the engines.

    glibc keeps freed blocks below 32 MiB for later. The tensors of a comparison are of other shapes than those of the steps that follow,
    so its memory would lie there to the end: 2.7 GB of 3.8 in a LoRA run on short rows (docs/performance.md).

    Returns:
        Whether anything was given back (glibc only).
    """
    malloc_trim = _function("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(0))


KERNEL_CACHE_VARIABLE, KERNEL_CACHE_SIZE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"


def limit_kernel_cache() -> None:
    """Keep oneDNN from holding more compiled kernels than a few steps need, unless the user has set a limit.

    It compiles one for every shape of a bf16 product, 0.6 MB each, and holds 1,024. Packed rows hardly ever have the same length twice, so
    all but the newest are never used again. Read by the library at its first product of that kind: call it before.
    """
    os.environ.setdefault(KERNEL_CACHE_VARIABLE, KERNEL_CACHE_SIZE)


def _function(name: str) -> Any:
    """A function of the C library, or None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
