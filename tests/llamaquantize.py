"""llama.cpp's quantizer as its program `llama-quantize` is called: `python llamaquantize.py FROM.gguf TO.gguf Q4_K_M`.

The prebuilt library of `make quantizer` has the function and not the program; what is written is llama.cpp's own work.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orpo" / "llama-quantizer"
TYPES = {"Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
"""`enum llama_ftype` of llama.h."""


class Settings(ctypes.Structure):
    """The beginning of `llama_model_quantize_params`; the rest keeps its defaults."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("others", ctypes.c_byte * 1024))


def find_library() -> Path | None:
    """The library with the quantizer, where it is here."""
    return next(iter(sorted(FOLDER.glob("libllama.v*.so"))), None)


def main() -> int:
    """Quantize, as the program does."""
    library = find_library()
    assert library is not None, "make quantizer"
    for name in ("libggml-base.so", *(path.name for path in sorted(FOLDER.glob("libggml.v*.so")))):
        ctypes.CDLL(str(FOLDER / name), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = Settings
    llama.llama_backend_init()
    settings = llama.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, TYPES[sys.argv[3]]
    source, target = (name.encode() for name in sys.argv[1:3])
    return int(llama.llama_model_quantize(source, target, ctypes.byref(settings)))


if __name__ == "__main__":
    raise SystemExit(main())
