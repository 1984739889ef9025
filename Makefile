# Esper. `make run` and `make test` do all of their own set-up; both are safe to repeat.
# The work is in .ci/*.sh, one script a step.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast lint format proto clients baseline lock clean

CONFIG ?= configs/quickstart.yaml
ARGS ?=
PYTEST_ARGS ?=

help: ## show these commands
	@echo "make COMMAND"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

run: ## set up .venv, then train a network that grows (CONFIG=configs/quickstart.yaml, ARGS="--set a.b=c")
	@.ci/setup.sh python
	@.venv/bin/python train.py --config $(CONFIG) $(ARGS)

test: ## set up what the tests need, then lint, all tests and coverage (under half an hour)
	@.ci/setup.sh tests
	@.ci/test.sh all $(PYTEST_ARGS)

test-fast: ## the checks and tests that take at most three minutes
	@.ci/setup.sh python
	@.ci/test.sh fast $(PYTEST_ARGS)

lint: ## ruff, mypy, buf (lint, format, breaking changes), drift of generated code
	@.ci/setup.sh python
	@.ci/lint.sh

format: ## format Python and protobuf files in place
	@.ci/setup.sh python
	@.venv/bin/ruff check --quiet --fix-only .
	@.venv/bin/ruff format .
	@.venv/bin/buf format --write

setup: ## only the set-up of make test
	@.ci/setup.sh tests

proto: ## generate services/contracts from proto/
	@.ci/setup.sh python
	@.ci/generate.sh

clients: ## generate the clients in clients/ from proto/ (buf, with local plugins)
	@.ci/setup.sh tests
	@.ci/clients.sh

baseline: ## accept the contracts as they are: later breaking changes fail make lint
	@.ci/setup.sh python
	@.venv/bin/buf build --as-file-descriptor-set --exclude-source-info -o proto/baseline.binpb

lock: ## resolve requirements/*.in again into requirements/lock.txt
	@.ci/setup.sh python
	@.ci/lock.sh

clean: ## remove what set-up, tests and runs made (.venv and .tools too)
	rm -rf .venv .tools runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
