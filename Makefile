# One virtual environment, installed again when pyproject.toml or the C++ sources change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= nano-flash
MINUTES ?= 30

NATIVE := $(wildcard src/rorqual/kernels/cpu/*.cpp src/rorqual/kernels/cpu/*.h) \
	src/rorqual/kernels/cpu/CMakeLists.txt

.PHONY: help install serve chat test check format bench soak clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rorqual needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) install --progress-bar on --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(NATIVE) | $(BIN)/python
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

soak: $(VENV)/.installed-test ## MINUTES (30) of mixed load, hang-ups and malformed bodies
	$(BIN)/python -m rorqual.qualify.soak --minutes $(MINUTES)

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
