# Every target makes the environment it needs: on a fresh clone `make test` alone works.
#
#   make setup   .venv with everything for development
#   make demo    trains, saves, kills, resumes: examples/demo/run.py
#   make test    lint, all tests, and the tests of the core where torch is not installed
#   make bench   measurements, ARGS="--cases large --rounds 5": benchmarks/run.py
#   make fuzz    fuzzing guided by coverage, SECONDS=600: fuzz/run.py
#   make faults  kills and failures at every system call, with their counts
#   make compare-faults  the same faults for torch's package and this one: faults/compare.py
#   make lint    ruff, mypy (strict), import-linter
#
# PYTHON=... picks the interpreter that the environments are made with.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
CORE := .venv-core
READY := $(VENV)/.ready
CORE_READY := $(CORE)/.ready
BIN := $(CURDIR)/$(VENV)/bin
WORKERS ?= 2
SECONDS ?= 600

# Tests of the torch-free core; they run in both environments.
CORE_TESTS := tests/test_cli.py tests/test_native_index.py tests/test_open.py \
	tests/test_open_hostile.py tests/test_sharding.py tests/test_tree.py tests/test_verify.py

# The first interpreter that is 3.11 or later and can make environments.
CANDIDATES := $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python
define FIND_PYTHON
for candidate in $(CANDIDATES); do \
	if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then python=$$candidate; break; fi; \
done; \
if [ -z "$${python:-}" ]; then \
	echo "No Python 3.11 or later (with venv and ensurepip) found among: $(CANDIDATES)" >&2; exit 1; \
fi
endef
INSTALL := -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help setup demo test test-all test-core bench fuzz faults compare-faults lint format clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(FIND_PYTHON); echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
	$(VENV)/bin/python $(INSTALL) -e '.[dev]'
	@touch $@

$(CORE_READY): pyproject.toml constraints.txt
	@$(FIND_PYTHON); echo "making $(CORE) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(CORE)
	$(CORE)/bin/python $(INSTALL) -e '.[zstd,cli]' pytest hypothesis
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo/run.py

test: lint test-all test-core

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

# With torch out of reach, not just out of sight.
test-core: $(CORE_READY)
	@$(CORE)/bin/python -c 'import importlib.util as u, sys; sys.exit("torch is installed in $(CORE)" if u.find_spec("torch") else 0)'
	$(CORE)/bin/python -c 'import shardpoint; print("shardpoint", shardpoint.__version__, "without torch")'
	$(CORE)/bin/python -m pytest -p no:cacheprovider $(CORE_TESTS)

bench: $(READY)
	@$(BIN)/python -c 'import torch_checkpointing' 2>/dev/null || $(BIN)/python $(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/run.py $(ARGS)

fuzz: $(READY)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python $(INSTALL) -e '.[fuzz]'
	$(BIN)/python fuzz/run.py --seconds $(SECONDS)

faults: $(READY)
	SHARDPOINT_ALL_FAULTS=1 $(BIN)/python -m pytest -s -p no:cacheprovider \
		tests/test_dcp_crashes.py tests/test_dcp_async_faults.py tests/test_dcp_integrity.py \
		tests/test_hugging_face_crashes.py tests/test_hugging_face_journal.py

compare-faults: $(READY)
	@$(BIN)/python faults/compare.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CORE) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
