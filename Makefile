# Everything a newcomer types. Each target first makes sure that .venv holds what constraints.txt says; when it does,
# that costs nothing.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test ui repro lint install clean-state help
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## learn two concepts by three methods, draw, score, compare and tell of them (a second time: nothing to do)
	@$(BIN)/personalize demo

# A file's tests may follow one another, so a file is not split between the two processes, which take the next file when
# they are done with one. What is true of every method is therefore several files, tests/every_method, one for each property.
test: $(INSTALLED)  ## every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

ui: $(INSTALLED)  ## the same steps in the Dagster UI, on the loopback address
	@$(BIN)/python -m pipelines ui

repro: $(INSTALLED)  ## the same steps by DVC: whatever params.yaml, data or sources have made out of date
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro

lint: $(INSTALLED)  ## formatting, lint, types, and whether the pipeline's definitions load
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -W 'ignore:Function' -m dagster definitions validate

install: $(INSTALLED)  ## only the environment

clean-state:  ## forget Dagster's history and unfinished training; results under data/ stay
	rm -rf .dagster .tmp_dagster_home_* data/.work

# setuptools comes first, pinned like the rest, so that building this package downloads nothing of its own choice.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about two hundred packages, some minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
