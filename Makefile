# The same targets everywhere: here, in .ci/run and in docker/. Every target sets up .venv first (a second when it is).
SHELL := /bin/bash
VENV ?= .venv
PORT ?= 8000
HOST ?= 127.0.0.1
DATA_DIR ?= ./data
PYTEST_ARGS ?=
export VENV
BIN := $(VENV)/bin

.PHONY: help setup serve test check format bench quality certify lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: ## make .venv ready (PYTHON, RAGBLEND_DEVICE, TORCH_INDEX: see scripts/setup.sh)
	@scripts/setup.sh

serve: setup ## serve the demo model and collection on HOST:PORT, data in DATA_DIR
	$(BIN)/ragblend serve --demo --host $(HOST) --port $(PORT) --data-dir $(DATA_DIR)

test: setup ## all tests (PYTEST_ARGS="-m 'not slow'" for the fast ones)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup ## format, lint, types, import rules, Dockerfiles
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint --config docker/hadolint.yaml docker/Dockerfile.cpu docker/Dockerfile.cuda

format: setup ## rewrite files the way `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## time to first token of full prefill, reuse and blending on a synthetic model
	$(BIN)/ragblend bench ttft --synthetic

quality: setup ## answers of the demo model under full prefill, reuse and each selector
	$(BIN)/ragblend eval quality

certify: setup ## prove the demo model anew, in the dtype of each engine (auto blends certified models only)
	$(BIN)/ragblend certify --engine transformers --dtype float32 --into-model --data-dir $(DATA_DIR)
	$(BIN)/ragblend certify --engine auto --dtype bfloat16 --into-model --data-dir $(DATA_DIR)

lock: ## resolve requirements/*.txt anew (needs uv)
	@scripts/lock.sh

clean: ## remove what can be made again (keeps .venv and DATA_DIR)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
