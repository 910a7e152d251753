# One command each. PYTHON chooses the interpreter that creates .venv, EXTRAS what is installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Without labmaze, which Python 3.13 lacks (setup.cfg); already there on older ones.
OGBENCH := $(INSTALL) --no-deps --no-warn-conflicts ogbench dm_control

.PHONY: demo rl-demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m applications.toy2d demo $(DEMO)

rl-demo: $(VENV)/.rl
	$(BIN)/python -m applications.rl demo $(DEMO)

test: $(VENV)/.test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.test
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

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
