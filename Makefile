# One virtual environment, installed again when pyproject.toml or the C++ sources change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= nano-flash
MINUTES ?= 30
JOBS ?= 2
RESULTS ?= docs/measurements
TO ?= 1M

NATIVE := $(wildcard src/rorqual/kernels/cpu/*.cpp src/rorqual/kernels/cpu/*.h) \
	src/rorqual/kernels/cpu/CMakeLists.txt

.PHONY: help install serve chat test test-tools test-sandbox sandbox-tools check format bench llama report soak \
	clients clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rorqual needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) install --progress-bar on --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) install --progress-bar on --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) install --progress-bar on --editable '.[bench]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## prepare .venv with the rorqual command

serve: install ## serve MODEL (nano-flash) on HOST:PORT
	$(BIN)/rorqual serve $(MODEL) --host $(HOST) --port $(PORT)

chat: install ## talk to MODEL in the terminal
	$(BIN)/rorqual chat $(MODEL)

test: test-tools ## run every test but the heavy sandbox ones, in JOBS (2) processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n $(JOBS) --dist loadgroup

test-sandbox: test-tools ## run the heavy sandbox tests: crash, leak, escape, gVisor
	@$(BIN)/rorqual sandbox install --tests || echo 'Going on without some of the tools.'
	$(BIN)/python -m pytest tests/sandbox -rs -m 'sandbox or not sandbox'

# Whatever is not there and cannot be installed here is a skipped test with a reason.
test-tools: $(VENV)/.installed-test ## install what tests use beside Python: sandboxes, browser, clients
	@$(BIN)/rorqual sandbox install || echo 'Going on without some of the sandbox tools.'
	@command -v chromium chromium-browser > /dev/null || apt-get install -qq chromium \
		|| echo 'Going on without Chromium.'
	@$(MAKE) --no-print-directory clients || echo 'Going on without Claude Code, Codex and OpenCode.'

sandbox-tools: $(VENV)/.installed-test ## install the Debian packages sandboxes use (as root)
	$(BIN)/rorqual sandbox install

check: $(VENV)/.installed-test ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-test ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench ## the engine's targets beside other engines, and TO (1M) tokens
	$(BIN)/rorqual bench engine --csv $(RESULTS)
	$(BIN)/rorqual bench long --to $(TO) --csv $(RESULTS) --plot $(RESULTS)/../long-nano-flash.svg

llama: $(VENV)/.installed-bench ## add llama.cpp to the other engines: compiles it, 10 to 20 minutes
	$(PIP) install --progress-bar on 'llama-cpp-python==0.3.36'

report: $(VENV)/.installed-bench ## write the tables of the documents again from RESULTS
	$(BIN)/python -m rorqual.bench.page --from $(RESULTS)

soak: $(VENV)/.installed-test ## MINUTES (30) of mixed load, hang-ups and malformed bodies
	$(BIN)/python -m rorqual.qualify.soak --minutes $(MINUTES)

CLIENTS := @anthropic-ai/claude-code@2.1.330 @openai/codex@0.169.0 opencode-ai@1.18.33

clients: .clients/.installed ## install Claude Code, Codex and OpenCode from npm into .clients

.clients/.installed: Makefile
	mkdir -p .clients
	test -f .clients/package.json || echo '{"private": true}' > .clients/package.json
	npm install --prefix .clients --no-audit --no-fund $(CLIENTS)
	@touch $@

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) .clients build .mypy_cache .ruff_cache .pytest_cache
