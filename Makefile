# Two commands: `make run` sets up and shows the household; `make test` sets up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
API ?= 127.0.0.1:8642
DEVICES ?= 3

.PHONY: run test lab lab-share check bench soak soak-stalls architectures clean

run: $(VENV)/run.stamp
	$(BIN)/peerllm demo --devices $(DEVICES) --api $(API)

# All but the tests marked `lab` or `slow`.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

# Those, each at the size that it has in `test`.
lab-share: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m 'lab or slow'

# Everything at full size: all fuzz inputs, all cuts, the namespace laboratory. The last output is kept in docs/lab.txt.
lab: SHELL := /bin/bash
lab: $(VENV)/dev.stamp
	set -o pipefail; PEERLLM_FULL=1 PEERLLM_FUZZ_INPUTS=60000 $(BIN)/python -m pytest -m '' -o console_output_style=count 2>&1 | tee docs/lab.txt

check: $(VENV)/dev.stamp
	$(BIN)/ruff check peerllm tests benchmarks
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

# Ten minutes of a fixed load: does anything grow?
soak: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.soak --minutes 10

# Thirty minutes of it, while devices stand still for half a second now and then: is one taken for dead?
soak-stalls: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.soak --minutes 30 --stalls

architectures: $(VENV)/dev.stamp
	$(BIN)/python -m tests.engine.architectures --write docs/architectures.md

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("peerllm needs Python 3.11 or newer; make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable '.[torch,test,check,bench]'
	touch $@ $(VENV)/run.stamp
