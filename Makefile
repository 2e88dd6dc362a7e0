# make help lists the targets. Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The oldest transformers that is served.
FLOOR ?= 5.18.0

# Processes that share the tests.
WORKERS ?= 2

# The plain `torch` wheel on Linux brings gigabytes of CUDA. Without a GPU, take the CPU build:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: demo test check fix docs matrix oracle fuzz bench accuracy clean help

demo: $(READY) ## answer three questions about a picture, with all 576 visual tokens and with 64; pictures go to demo-out/
	$(BIN)/foveate demo --out demo-out

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(READY) ## lint, format, types, layers, and that generated docs are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

fix: $(READY) ## repair what lint and format can repair by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## regenerate the tables in README.md and docs/
	$(BIN)/python docs/generate.py

matrix: $(READY) ## run the tests on the oldest transformers that is served, then on the current one
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/transformers-$(FLOOR) transformers==$(FLOOR)
	PYTHONPATH=$(VENV)/transformers-$(FLOOR) $(BIN)/python -m pytest -n $(WORKERS)
	$(BIN)/python -m pytest -n $(WORKERS)

oracle: $(READY) ## measure dropped against masked on every family, with both versions of transformers; results/oracle.csv
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/transformers-$(FLOOR) transformers==$(FLOOR)
	PYTHONPATH=$(VENV)/transformers-$(FLOOR):src:. $(BIN)/python -m tests.families.matrix
	PYTHONPATH=src:. $(BIN)/python -m tests.families.matrix
	$(BIN)/python docs/generate.py

fuzz: $(READY) ## draw 1,000 random families, methods, batches and ways of decoding; dropped against masked
	FOVEATE_FUZZ=1000 $(BIN)/python -m pytest tests/families/test_fuzz.py

bench: $(READY) ## measure speed and memory, write a CSV to results/
	$(BIN)/python -m foveate.lab.speed

accuracy: $(READY) ## measure the demo model's accuracy by method and budget, write a table to results/
	$(BIN)/python -m foveate.lab.accuracy

clean: ## remove what these targets made
	rm -rf $(VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

help: ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# torch goes first and alone, so that no other package asks pip for a build of its own choice.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "foveate needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,plot]'
	touch $@
