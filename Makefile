# make demo    the whole pipeline on built-in data and an embedded SSH board
# make test    the whole test suite
# make board-test  the tests on emulated boards: made of Debian packages, kept in ~/.cache/edgeprune/boards
# make long-test   the tests that take minutes, most of them converting to TFLite
# make lint    style, types, layers
# make bench   the benchmarks, quick versions (QUICK= for the long ones)
# Each sets up .venv by itself; what is already there is not installed again.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TORCH  := torch==2.13.0
QUICK  ?= --quick
BOARD_TESTS ?= board
WORKERS ?= 2

.PHONY: demo test long-test board-test lint bench clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/edgeprune demo

# By file, so that what a module sets up is set up once; the longest first (tests/conftest.py), so that no worker is left
# with them at the end.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

long-test: $(VENV)/.dev
	$(BIN)/python -m pytest -m long --timeout 1800

board-test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "$(BOARD_TESTS)" --timeout 1800

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	for bench in tools/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench $(QUICK) || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info

# --- the virtual environment: one stamp a step, so that an interrupted set-up goes on where it stopped

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "edgeprune needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# First and pinned: what is installed later must not bring another build of it.
$(VENV)/.torch: $(VENV)/.pip
	@echo "installing PyTorch: a few minutes on a slow line"
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[$*]"
	touch $@
