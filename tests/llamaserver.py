"""Serve one GGUF file with llama.cpp on a loopback port, until standard input ends; the address is the line printed.

A process of its own: llama.cpp ends its process where a file makes no sense to it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """`python llamaserver.py FILE`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # Keys and values in float32: in float16, as people run it, they round more than the weights of a float32 file.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.use_jinja = True
    params.fit_params = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
