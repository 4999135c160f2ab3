SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
LOCKS := locks/cpu.txt locks/dev.txt
TYPED := server tests benchmarks deploy

$(INSTALLED): pyproject.toml $(LOCKS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --no-deps $(addprefix -r ,$(LOCKS))
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: help setup serve check test bench lock clean

help: ## print this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(INSTALLED) ## install the locked packages and the project into .venv

serve: setup ## start the server; ARGS="--help" lists its options
	exec $(BIN)/tidegate serve $(ARGS)

check: setup ## format, lint, types, import contracts, and the names we rely on in vLLM
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/engine/test_contract.py

test: setup ## run the tests; ARGS="-m 'not engine'" leaves out the slow half
	$(BIN)/pytest $(ARGS)

bench: setup ## run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

lock: setup ## remake locks/*.txt from pyproject.toml; ARGS="--upgrade-package NAME" moves one
	locks/remake.sh $(ARGS)

clean: ## remove .venv, the caches and what a build leaves
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find server tests $(wildcard benchmarks) -name __pycache__ -prune -exec rm -rf {} +
