# Every target makes what it needs: the virtual environment, the compiled cores.
# Not parallel: pip writes the same environment in several steps.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
CORES := $(wildcard $(foreach at,* */*,$(at)/_core.c $(at)/*.inc $(at)/include/*/*.h))

export PIP_ROOT_USER_ACTION := ignore
# `base` holds the flags with which Python.h is found: none, mostly.
EDITABLE = CPPFLAGS="$$(cat $(VENV)/base)" PYTHONWARNINGS=ignore \
    $(PIP) install --no-build-isolation --editable

.PHONY: help build demo demo-json demo-vm test check lint types layers format bench fuzz man deb docs clean

help: ## Say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

build: $(VENV)/cores ## Make the environment and compile the cores
	@echo "ready: $(BIN)/vbus"

demo: $(VENV)/cores ## Two guests and the host on one bus: traffic, hot plug, a table
	@$(BIN)/vbus demo $(ARGS)

demo-json: $(VENV)/cores ## The same as one JSON object
	@$(BIN)/vbus demo --json $(ARGS)

demo-vm: $(VENV)/cores ## Two virtual machines, a process and the host on one bus
	@$(BIN)/vbus demo --vm $(ARGS)

# Machines one after the other; 5 is pytest's word for "nothing of this kind was picked".
test: $(VENV)/cores $(VENV)/dev ## Run the tests; ARGS="-k name" picks some
	@$(BIN)/pytest -m 'not vm' -n auto --dist loadfile $(ARGS) || [ $$? = 5 ]
	@$(BIN)/pytest -m vm $(ARGS) || [ $$? = 5 ]

check: lint types layers ## Static checks: lint, format, types, layers

lint: $(VENV)/dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/cores $(VENV)/dev
	@$(BIN)/mypy

layers: $(VENV)/dev
	@$(BIN)/lint-imports

format: $(VENV)/dev ## Format the sources and sort their imports
	@$(BIN)/ruff check --fix --select I
	@$(BIN)/ruff format

bench: $(VENV)/cores $(VENV)/bench ## Measure beside the peers; ARGS="--only NAME --rounds 5"
	@$(BIN)/python -m bench $(ARGS)

fuzz: ## Fuzz the virtqueue parser for ten minutes; needs clang
	@scripts/fuzz-virtqueue 600

man: $(VENV)/cores ## Write manual pages and completions into build/man
	@$(BIN)/python -m vbus.cli.manual build/man

deb: ## Build the Debian package into build/deb
	@packaging/build-deb build/deb

docs: $(VENV)/cores $(VENV)/docs ## Build the documentation into build/docs
	@$(BIN)/sphinx-build -W --keep-going -q docs build/docs
	@echo "ready: build/docs/index.html"

clean: ## Remove everything that was built, the environment too
	rm -rf $(VENV) .cache build dist *.egg-info
	find . -name '_core*.so' -o -name __pycache__ -prune | xargs rm -rf

# An environment with a current pip and setuptools; the rest is built with those.
$(VENV)/base: scripts/python-ready
	@mkdir -p $(VENV)
	@scripts/python-ready $(PYTHON) $(VENV)/headers >$@
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=24' 'setuptools>=77'

$(VENV)/runtime: $(VENV)/base pyproject.toml setup.py
	@$(EDITABLE) .
	@touch $@

$(VENV)/cores: $(VENV)/runtime $(CORES)
	@CPPFLAGS="$$(cat $(VENV)/base)" \
	    $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/dev $(VENV)/bench $(VENV)/docs: $(VENV)/runtime
	@echo "installing the packages of '$(@F)' ..."
	@$(EDITABLE) '.[$(@F)]'
	@touch $@
