# make demo | make cluster | make test | make docs: each alone creates .venv, installs the pinned dependencies and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

# Each process would else compile torch and diffusers anew (a second import takes 4 s, a first one 16), and tests start
# hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install torch extensions demo cluster bytecode test tests test-slow soak check format lint contracts types fmt reference docs clean

install: $(STAMP)

# Without compiling every module that is installed: Python compiles what is imported, once.
$(STAMP): pyproject.toml kernels/_native.c kernels/_rounding.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quantmill needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@$(MAKE) --no-print-directory --jobs=2 torch extensions
	$(PIP) "quantmill[dev]"
	@touch $(STAMP)

# At the same time: the one unpacks, the other compiles.
torch:
	$(PIP) "torch==2.13.0"

extensions:
	$(PIP) --no-deps -e .

# Apart from the others, because building the handbook is no part of the tests.
$(DOCS_STAMP): $(STAMP)
	$(PIP) "quantmill[docs]"
	@touch $(DOCS_STAMP)

demo: install
	$(BIN)/python -m examples.demo

# Postgres, an S3 store, a Ray cluster and two orchestrators, as docker-compose.yml says; Ctrl-C ends all of it.
cluster: install
	@$(BIN)/python -m deploy.cluster

# One thread for each process: tests start workers beside themselves, and threads that wait for a core spin.
tests test-slow soak: export OMP_NUM_THREADS = 1

# Imports, and so compiles, once, what each of the processes that the tests start at the same time would else compile
# for itself; and rewrites the tests' assertions.
bytecode: install
	@$(BIN)/python -m pytest --collect-only -q > /dev/null

# Everything that guards the code; CI runs this. The checks run beside the tests.
test: install
	@$(MAKE) --no-print-directory --jobs=2 check tests

# A file's tests run in one process, for what they share; in three processes, as those that start Ray mostly wait.
tests: install bytecode
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -q -m slow

# Random faults for hours: SEEDS=1:500, LEVEL=1 (schedulers in one process) or 2 (real processes, Ray, servers).
SEEDS ?= 1:500
LEVEL ?= 1
MINUTES ?= 600

soak: install
	$(BIN)/python -m tests.faults --seeds $(SEEDS) --level $(LEVEL) --minutes $(MINUTES)

check: format lint contracts types

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

contracts: install
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

fmt: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The schemas of recipes and searches, and the tables of docs/recipes.md, search.md, metrics.md and monitoring.md.
reference: install
	$(BIN)/python -m orchestrator.recipes.reference
	$(BIN)/python -m quant_spec.metrics_page docs/metrics.md
	$(BIN)/python -m orchestrator.monitoring.metrics docs/monitoring.md

# The handbook, in site/; a warning is an error.
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info
