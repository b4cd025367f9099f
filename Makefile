# Everything here works on a machine that has Python (3.11 or newer) and make, without root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo and test models are tiny: threads that wait for each other cost more than they give.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-integration test-cluster lint format bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/installed  ## Install, then run the whole loop on the demo model: ingest, round, serve, ask
	$(BIN)/python -m demo.run

test: $(VENV)/installed-dev  ## Unit, contract and Ray tests
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/contract
	$(BIN)/python -m pytest tests/ray

test-integration: $(VENV)/installed-dev  ## The whole loop against real services (S3 server); skips what is missing
	$(BIN)/python -m pytest tests/integration

test-cluster: $(VENV)/installed-dev  ## Rounds on several nodes: a cut link (needs root; skipped without), a node that joins
	$(BIN)/python -m pytest tests/cluster

lint: $(VENV)/installed-lint  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-lint  ## Rewrite the sources as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed  ## Seconds per edit of a round on the demo, by phase
	$(BIN)/python -m benchmarks.round_phases

clean:  ## Remove the virtual environment and the demo's store
	rm -rf $(VENV) .wiseline

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wiseline needs Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-lint: $(VENV)/bin/python requirements-lint.txt constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -r requirements-lint.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/installed-lint $(VENV)/installed
