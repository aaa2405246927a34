# make test | demo | lint | clean.   Variables: VENV (environment to create), PYTHON (3.10 or newer), PYTEST_ARGS,
# TEST_PROCESSES (that share the tests, a file at a time, with one thread each), DEMO_ARGS (nnunet_diffext demo --help).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
TEST_PROCESSES ?= auto
# Replaces an earlier demo, never a folder with anything else in it.
DEMO_ARGS ?= --overwrite

BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check --editable
SETUP := pyproject.toml setup.py

.PHONY: test demo lint clean

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

demo: $(VENV)/.installed
	$(BIN)/nnunet_diffext demo $(DEMO_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of dependencies: nothing is installed again until the packaging changes.
$(VENV)/.installed: $(SETUP) | $(BIN)/python
	$(PIP) .
	touch $@

$(VENV)/.installed-%: $(SETUP) | $(BIN)/python
	$(PIP) '.[$*]'
	touch $@
