# `make demo` and `make test` each set up what they need, then do their work. Nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check fix fast bench docs clean

demo: $(STAMP)           ## train, convert, quantize, prove and compare on the embedded model
	$(BIN)/python -m models.demo

test: $(STAMP)           ## every test
	$(BIN)/python -m pytest -n 2

fast: $(STAMP)           ## the tests that take no more than a few seconds each
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: $(STAMP)          ## what CI checks besides the tests; writes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP)            ## let the linters write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)          ## measure against peers; see benchmarks/README.md
	$(BIN)/python -m benchmarks

docs: $(STAMP)           ## write docs/cli.md and docs/chat.md from the commands
	$(BIN)/python -m docs.generate

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'edgetune needs Python 3.10 or newer; set PYTHON=…')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:                   ## remove what the targets above made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
