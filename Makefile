# Everything happens in .venv; nothing outside this folder is changed. `make help` lists the targets.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install
SOURCES := pyproject.toml constraints.txt hatch_build.py $(wildcard proto/hemacrypt/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format proto bench bench-engines peers study-quick study clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

# The demonstration needs no TensorFlow, so a first look costs a small download only.
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[client,service]'
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[client,service,training,dev]'
	@touch $@ $(VENV)/.demo

venv: $(VENV)/.dev ## set up .venv with everything: client, service, training, development tools

demo: $(VENV)/.demo ## the whole path on 180 real cells: serve, encrypt, predict, decrypt, compare
	$(BIN)/hemacrypt demo

test: lint ## linters, then all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev ## ruff, mypy, import-linter, freshness of the generated protobuf code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python hatch_build.py --check

format: $(VENV)/.dev ## let ruff format the code and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev ## generate the protobuf code again after a change of the contract
	$(BIN)/python hatch_build.py

bench: $(VENV)/.dev ## accuracy and time under encryption, on the embedded sample
	$(BIN)/python benchmarks/encrypted_accuracy.py

bench-engines: $(VENV)/.dev ## our engines and the installed peers side by side; FULL=1 for everything
	$(BIN)/python -m benchmarks.engines $(if $(FULL),--full) $(BENCH_OPTIONS)

peers: ## install the peers of bench-engines into build/peers: several GB, licences in benchmarks/peers/README.md
	PYTHON=$(PYTHON) benchmarks/peers/install.sh

study-quick: $(VENV)/.dev ## a reduced table of models in minutes; HEMACRYPT_DATA names the folder of C-NMC 2019
	$(BIN)/hemacrypt study run quick --out build/study-quick $(STUDY_OPTIONS)

study: $(VENV)/.dev ## the whole comparison, hours; STUDY_OPTIONS="--full-size" or "--final", see docs/studies.md
	$(BIN)/hemacrypt study run full --out build/study $(STUDY_OPTIONS)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache hemacrypt/v1/*_pb2*
