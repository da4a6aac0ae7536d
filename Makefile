# The menu; `make` alone prints it. Everything happens in .venv, which the first target makes.
# Needs python3 (3.11 or newer, with its venv module) and pip's configured package index; with g++
# the engine's own CPU kernels are built, without it torch serves.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
# A stamp each, so that the second run starts at once and a changed pyproject.toml installs again.
BASE := $(VENV)/.installed
SERVER := $(VENV)/.installed-server
DEV := $(VENV)/.installed-dev
# The version that everybody tests; make TORCH=torch takes the newest.
TORCH := torch==2.13.0
PORT := 8000

help: ## this menu
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(SERVER) ## serve a real model: fetch it, measure this machine, print the dashboard's address
	$(BIN)/tierline models fetch demo
	@$(BIN)/tierline gpus this-machine >/dev/null 2>&1 || $(BIN)/tierline calibrate
	$(BIN)/tierline serve demo --embedded --port $(PORT)

plan: $(BASE) ## plan a fleet for the bundled example trace; the report lands in out/example
	$(BIN)/tierline plan --model llama-3.1-70b --trace examples/chat.jsonl.gz \
	  --slo ttft_p99=2s,itl_p99=50ms -o out/example
	@echo "open out/example/report.html in a browser"

test: $(DEV) ## the fast tests (minutes); `.ci/run` also runs the slow ones
	$(BIN)/python -m pytest -m "not slow"

check: $(DEV) ## format, lint, types, import contracts, generated pages up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/docs.py --check

fix: $(DEV) ## format, and repair what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV) ## write docs/reference and the output of examples again, then check the examples
	$(BIN)/python tools/docs.py
	$(BIN)/python tools/docs.py --record
	$(BIN)/python tools/docs.py --examples

bench: $(DEV) ## every benchmark; one line of JSON each
	@for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

clean: ## remove the environment, caches and results
	rm -rf $(VENV) out dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 of 3.11 or newer with its venv module" >&2; \
	  echo "hint: install python3 and python3-venv, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(SERVER): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server]'
	@touch $@ $(BASE)

$(DEV): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(SERVER) $(BASE)

.PHONY: help run plan test check fix docs bench clean
