# make demo | make test: each alone creates .venv, installs the pinned dependencies and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow check fmt reference clean

install: $(STAMP)

$(STAMP): pyproject.toml kernels/_native.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quantmill needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(STAMP)

demo: install
	$(BIN)/python -m examples.demo

# One thread for each process: tests start workers beside themselves, and threads that wait for a core spin.
test test-slow: export OMP_NUM_THREADS = 1

test: install
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

test-slow: install
	$(BIN)/python -m pytest -q -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

fmt: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes what docs/ says of recipes from the records in quant_spec/.
reference: install
	$(BIN)/python -m orchestrator.recipes.reference

clean:
	rm -rf $(VENV) build dist *.egg-info
