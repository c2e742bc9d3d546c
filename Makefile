PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.installed-extras
SITE := $(VENV)/.installed-site
# A worker per core, four at most: each loads PyTorch.
IN_PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-slow gpu conformance docs dist lint setup clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(EXTRAS): $(STAMP) requirements-extras.lock
	@echo "Installing the packages that the long tests try Hope with into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-extras.lock
	@touch $@

$(SITE): $(STAMP) requirements-docs.lock
	@echo "Installing what builds the site into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	@touch $@

setup: $(STAMP)  ## create .venv with the pinned packages

demo: $(STAMP)  ## train Hope on real text for about three minutes and generate from it
	@$(BIN)/nested-learning train --preset hope-tiny --data stdlib --lr 1e-2 --batch_size 8 --max_minutes 3 \
		--data.max_validation_blocks 64 --sample_tokens 400 --output runs/demo --overwrite

docs: $(SITE)  ## build the documentation site into site/, links checked; open site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "site/index.html"

dist:  ## wheel and sdist of the commit, each tried in an empty environment, into dist/
	@$(PYTHON) -m release build --output dist

lint: $(STAMP)  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint  ## lint, types and the tests that take seconds
	@$(BIN)/python -m pytest $(IN_PARALLEL)

test-slow: $(EXTRAS) lint  ## every test, the long ones too, with peft, TRL, torchao, lm-eval, ONNX and the notebooks
	@$(BIN)/python -m pytest $(IN_PARALLEL) -m "slow or not slow" --extras

gpu: $(STAMP)  ## on a machine with a CUDA device: its tests, then the table of speeds to runs/gpu/
	@$(BIN)/python -m benchmarks.gpu --check
	@$(BIN)/python -m pytest -m gpu
	@mkdir -p runs/gpu
	@$(BIN)/python -m benchmarks.gpu --json runs/gpu/speed.json

conformance: $(STAMP)  ## transformers' own common tests on Hope; TRANSFORMERS=FOLDER: a checkout, for those in no archive
	@$(BIN)/python -m tests.conformance $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS))

clean:  ## remove caches and runs, keep the virtual environment
	rm -rf runs .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
