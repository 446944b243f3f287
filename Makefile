# Two commands matter: `make quickstart` and `make test`. Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs bench clean

help:  ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

quickstart: $(VENV)/.quickstart  ## set up, then train, score, serve and ask on this machine (offline after set-up)
	$(BIN)/banjoray quickstart

test: $(VENV)/.test  ## set up with what tests need, lint, run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test  ## write the generated files of docs: compatibility.md, job.schema.json
	$(BIN)/python -c 'from banjoray.training.compatibility import markdown; print(markdown(), end="")' > docs/compatibility.md
	$(BIN)/banjoray schema > docs/job.schema.json

bench: $(VENV)/.test  ## run the benchmarks; results go to benchmarks/results and the README
	$(BIN)/python -m benchmarks.train_throughput
	$(BIN)/python -m benchmarks.ray_share
	$(BIN)/python -m benchmarks.search_cost
	$(BIN)/python benchmarks/table.py

clean:  ## remove .venv and what tools cached; runs and registry stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(VENV)/bin/pip $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/pip $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
