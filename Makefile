# The commands of the README, and of development. Each target first installs what constraints.txt names into .venv, if
# that has changed.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-card memory bench ui repro docs lint install clean-state help
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## train three methods on two concepts, sample, score, compare, and write the report
	@$(BIN)/personalize demo

# The tests of a file may build on each other, so a file is not split between the two processes. That is why
# tests/every_method has one file per property.
test: $(INSTALLED)  ## run all tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# A session of its own, since the guard of the pretended card must be loaded before torch. Tests that share a training
# or a measurement stay in one process.
test-card: $(INSTALLED)  ## run all methods on a pretended graphics card; compare memory, waits and FLOPs with the record
	PYTEST_PLUGINS=tests.card.guard $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup tests/card

bench: $(INSTALLED)  ## measure training, sampling and scoring beside diffusers, PEFT and open_clip
	$(BIN)/python -m benchmarks.suite

memory: $(INSTALLED)  ## measure what each method takes of a card's memory: tests/card/costs.json and docs/memory.md
	$(BIN)/python -m tests.card.record

ui: $(INSTALLED)  ## start the Dagster UI on http://127.0.0.1:3000
	@$(BIN)/python -m pipelines ui

repro: $(INSTALLED)  ## run what is out of date with DVC
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro

lint: $(INSTALLED)  ## check formatting, types, the direction of imports, and that the pipeline's definitions load
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -W 'ignore:Function' -m dagster definitions validate

docs: $(INSTALLED)  ## the tables of methods in README.md and docs/methods.md, from the methods' recipes
	$(BIN)/python docs/generate.py

install: $(INSTALLED)  ## install the environment only

clean-state:  ## delete Dagster's history, unfinished trainings and searches; results and removed concepts stay
	rm -rf .dagster .tmp_dagster_home_*
	if [ -d data/.work ]; then find data/.work -mindepth 1 -maxdepth 1 ! -name removed -exec rm -rf {} +; fi

# setuptools comes first, pinned like the rest, so that building this package downloads no other version.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about two hundred packages, which takes some minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
