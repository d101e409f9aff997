"""What libraries below torch do with memory on a CPU: glibc with freed blocks, oneDNN with compiled kernels.

Where there is no glibc (musl, macOS, Windows) its functions do nothing and say so.
"""

from __future__ import annotations

import array
import ctypes
import itertools
import mmap
import os
from collections.abc import Iterable
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


def forget_file_pages(blocks: Iterable[tuple[int, int]]) -> int:
    """Let go of the pages of a mapped file that nobody has written to, for memory that will hardly be read again.

    A checkpoint is mapped, not read: its pages count as the process's own once they have been touched. Whatever reads them later finds
    them again, in the system's cache of files or in the file.

    Args:
        blocks: address and length in bytes of each.

    Returns:
        How many bytes are let go of: none where there is no `/proc/self/pagemap` (Linux has it).
    """
    madvise = _function("madvise")
    forgotten = 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for address, length in blocks:
                first, end = -(-address // mmap.PAGESIZE), (address + length) // mmap.PAGESIZE  # pages that are wholly within
                states = array.array("Q", os.pread(pagemap.fileno(), max(0, end - first) * 8, first * 8))
                for is_file, run in itertools.groupby(enumerate(states, first), lambda page: page[1] >> 61 == _PRESENT_OF_FILE):
                    pages = [number for number, _ in run] if is_file else []
                    if pages and not madvise(
                        ctypes.c_void_p(pages[0] * mmap.PAGESIZE), ctypes.c_size_t(len(pages) * mmap.PAGESIZE), mmap.MADV_DONTNEED
                    ):
                        forgotten += len(pages) * mmap.PAGESIZE
    except (OSError, TypeError, AttributeError):
        return forgotten
    return forgotten


_PRESENT_OF_FILE = 0b101
"""Upper three bits of a page's state (the kernel's admin-guide/mm/pagemap): present, not swapped, of a file. A page that was written to is
no longer the file's, and letting go of it would lose what was written."""


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
