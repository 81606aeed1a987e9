# `make demo` shows the main job; `make test` runs everything on a fresh clone; `make check` the fast tier; `make lint` formats, rules and types.
PYTHON ?= python3
PY := .venv/bin/python
TESTS ?= tests
# Test processes side by side.
JOBS ?= 2
# Tests compare numbers of tiny models: one thread is as fast as two, and the same bits every time.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Real data for the tests that want some; they say so and skip where there is none.
DATA := $(firstword $(wildcard $(CURDIR)/../shared/data $(CURDIR)/shared/data))
ifneq ($(DATA),)
export PALATE_TEST_DATA ?= $(DATA)
endif

.PHONY: demo install test check lint format bench docs clean
demo: .venv/palate
	.venv/bin/palate demo

install: .venv/installed

.venv/palate: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "palate needs Python 3.11 or newer; try make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	$(PY) -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed: .venv/palate
	$(PY) -m pip install --quiet -c constraints.txt -e . --group test
	touch $@

test: install
	@$(PY) -m pytest -n $(JOBS) --dist worksteal $(TESTS)

check: install
	@$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(TESTS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/pyrefly check

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install
	$(PY) benchmarks/dpo.py
	$(PY) benchmarks/generate.py --quick
	$(PY) benchmarks/scaling.py --quick

docs: install
	$(PY) docs/tables.py
	$(PY) docs/architectures.py

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis dist
