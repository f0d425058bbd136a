# One virtual environment, rebuilt only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= nano-flash

.PHONY: help install serve chat test check format bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rorqual needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --progress-bar on --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(PIP) install --progress-bar on --editable '.[test]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## prepare .venv with the rorqual command

serve: install ## serve MODEL (nano-flash) on HOST:PORT
	$(BIN)/rorqual serve $(MODEL) --host $(HOST) --port $(PORT)

chat: install ## talk to MODEL in the terminal
	$(BIN)/rorqual chat $(MODEL)

test: $(VENV)/.installed-test ## run every test
	$(BIN)/python -m pytest

check: $(VENV)/.installed-test ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-test ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-test ## speed and cache bytes beside transformers
	$(BIN)/python -m rorqual.bench.engine

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
