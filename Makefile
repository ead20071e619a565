# Two commands do everything from a fresh clone with only Python installed:
#   make demo     environment, install, and the main job: slides in, generated tissue and a report out
#   make test     environment, install, and every check: ruff, mypy, tests, examples, docs
#
# Variables: PYTHON=python3.12   SLIDES=folder/of/slides (demo)   DEMO=where/the/demo/goes   VENV=.venv

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo
SLIDES ?=

BIN    := $(VENV)/bin
EXTRAS := dev,dicom,docs,eval,ray,shards,wandb

.PHONY: help demo test lint types tests docs clean

help:
	@sed -n '2,6s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pixcell needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: editing the list of dependencies installs again, editing code does not.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/pixcell demo $(DEMO) $(foreach slide,$(SLIDES),--slides $(slide))

test: lint types tests docs

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

tests: $(VENV)/installed-dev
	$(BIN)/python -m pytest

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
