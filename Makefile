# What a person or CI does here. `make help` lists it.

.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from-pyproject

# Set on the command line only (`make demo PROMPT=...`): a shell's own PROMPT must not get in.
PROMPT := Explain quantum computing in simple terms
MODEL := smollm2-135m
WORKERS := 2
TENSOR_PARALLEL := 1
PORT := 8000
SEEDS := 1000
REPORT := gpu-report.md

# The tests start hundreds of processes, each of which would compile our own code again where nothing may be written.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Handed to recipes through the environment, unexpanded, so that quotes, spaces and dollar signs stay as typed.
export DEMO_PROMPT := $(value PROMPT)
export DEMO_MODEL := $(value MODEL)
export DEMO_WORKERS := $(value WORKERS)
export DEMO_TENSOR_PARALLEL := $(value TENSOR_PARALLEL)
export SERVE_PORT := $(value PORT)
export SIM_SEEDS := $(value SEEDS)
export GPU_REPORT := $(value REPORT)
export VENV_PYTHON := $(value PYTHON)
unexport PROMPT MODEL WORKERS TENSOR_PARALLEL PORT SEEDS REPORT

.PHONY: help venv demo serve test test-slow gpu-check test-programs sim lint bench clean

help:  ## list what there is
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP)  ## make .venv with everything pinned in pyproject.toml

$(STAMP): pyproject.toml
	@for candidate in "$$VENV_PYTHON" python3 python3.14 python3.13 python3.12 python3.11 python; do \
	  if [ -n "$$candidate" ] && command -v "$$candidate" >/dev/null 2>&1 && \
	     "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found="$$candidate"; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "Shardwright needs Python 3.11 or newer; `python3 --version 2>/dev/null || echo 'no python3'` was found." >&2; \
	  echo "Install one, or name it: make venv PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "Making $(VENV) with `"$$found" --version`"; \
	"$$found" -m venv $(VENV) || { \
	  echo "'$$found -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	$(BIN)/python -m pip install $$quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## answer PROMPT="..." with MODEL=smollm2-135m over WORKERS=2 processes of TENSOR_PARALLEL=1 ranks
	@$(BIN)/python -m shardwright generate --model "$$DEMO_MODEL" --local-workers "$$DEMO_WORKERS" \
	  --tensor-parallel "$$DEMO_TENSOR_PARALLEL" --summary -- "$$DEMO_PROMPT"

serve: $(STAMP)  ## serve MODEL=smollm2-135m cut over WORKERS=2 processes at http://127.0.0.1:PORT=8000, until Ctrl-C
	@exec $(BIN)/python -m shardwright serve --model "$$DEMO_MODEL" --local-workers "$$DEMO_WORKERS" \
	  --tensor-parallel "$$DEMO_TENSOR_PARALLEL" --port "$$SERVE_PORT"

test: $(STAMP)  ## run the tests, but for the slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)  ## run the slow tests; some need Node.js, Chromium (make test-programs) or Debian's packages
	$(PYTEST) -m "slow and not gpu"

gpu-check: $(STAMP)  ## test and measure on this machine's GPUs, and write REPORT=gpu-report.md (and .json)
	@$(BIN)/python tools/gpu_check.py --report "$$GPU_REPORT"

test-programs:  ## install Chromium for the dashboard's tests (Debian or Ubuntu, as root)
	@tools/install_test_programs.sh

sim: $(STAMP)  ## simulate SEEDS=1000 clusters with delays, aborts and lost workers
	@$(BIN)/python tests/sim/run.py --seeds "$$SIM_SEEDS"

lint: $(STAMP)  ## check format, style, types, imports between rooms, generated code
	@failed=0; check() { echo "$$*"; "$$@" || failed=1; }; \
	check $(BIN)/ruff format --check; \
	check $(BIN)/ruff check; \
	check $(BIN)/mypy; \
	check $(BIN)/lint-imports; \
	check $(BIN)/python tools/generate_proto.py --check; \
	exit $$failed

bench: $(STAMP)  ## measure against transformers, as a server, predictions, the cost of being watched; over an hour
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/serve_speed.py
	$(BIN)/python bench/prediction.py
	$(BIN)/python bench/observing.py
	$(BIN)/python bench/tensor_parallel.py

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
