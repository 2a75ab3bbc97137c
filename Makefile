# Four verbs: demo, test, bench, check; `masked` and `wheel` are further parts of what CI runs; `versions` is for releases,
# as it installs gigabytes. Each makes the virtual environment first if it has to.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed
PYTEST := $(BIN)/python -m pytest -n auto --durations=15
# A CPU with AVX2 alone, as seen by oneDNN, by torch and its compiler, and by NumPy's OpenBLAS.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell

.DEFAULT_GOAL := help
.PHONY: help install demo test masked versions bench check wheel clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,trl]'
	@touch $@

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,trl,bench]'
	@touch $@

install: $(STAMP) ## make the virtual environment .venv and install the project into it

demo: $(STAMP) ## train a real model on real pairs on this machine, a few minutes on a CPU
	$(BIN)/python -m examples.demo

test: $(STAMP) ## run the tests, a worker for each core
	$(PYTEST)

masked: $(STAMP) ## run those that depend on the CPU's instruction set as on a CPU with AVX2 alone
	$(AVX2) $(PYTEST) -m cpu_units

versions: $(STAMP) ## run those of kernels and trainer with the newest and with the oldest packages that are allowed
	$(BIN)/nox

bench: $(PEERS) ## time, memory and error against the naive code and other kernels, on this machine
	$(BIN)/python -m pytest benchmarks/ --results outputs/benchmarks.json

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

wheel: $(STAMP) ## build the wheel into dist/, compare it with the source tree and import all of it from an empty folder
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .nox .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
