# One command each; `make help` lists them. PYTHON is the interpreter that creates .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Without labmaze, which Python 3.13 lacks (setup.cfg); already there on older ones.
OGBENCH := $(INSTALL) --no-deps --no-warn-conflicts ogbench dm_control

.PHONY: help demo rl-demo test quick lint clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## a flow in the plane and handwritten digits, tilted, in two minutes
	$(BIN)/python -m applications.toy2d demo $(DEMO)

rl-demo: $(VENV)/.rl  ## an agent for a point maze, from data to pictures, in minutes
	$(BIN)/python -m applications.rl demo $(DEMO)

test: $(VENV)/.test  ## all tests, in as many processes as there are cores
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)

quick: $(VENV)/.test  ## the tests that are not slow, in a minute and a half of one core
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not slow" $(PYTEST)

lint: $(VENV)/.test  ## format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and alone: its pinned version has a CPU build, which the other packages then accept.
$(VENV)/.demo: setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) torch
	$(INSTALL) --editable .
	touch $@

$(VENV)/.rl: $(VENV)/.demo
	$(INSTALL) --editable '.[rl]'
	$(OGBENCH)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --editable '.[test]'
	$(OGBENCH)
	touch $@

clean:  ## remove the environment, outputs and caches
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
