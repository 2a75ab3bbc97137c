# Four verbs: demo, test, bench, check. Each makes the virtual environment first if it has to.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test bench check clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

install: $(STAMP) ## make the virtual environment .venv and install the project into it

demo: $(STAMP) ## train a real model on real pairs on this machine, a few minutes on a CPU
	$(BIN)/python -m examples.demo

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest

bench: $(PEERS) ## time, memory and error against the naive code and other kernels, on this machine
	$(BIN)/python -m pytest benchmarks/ --results outputs/benchmarks.json

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
