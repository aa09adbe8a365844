# make experiment NAME=quickstart [ARGS="--rounds 20 --seed 3"]    run an experiment; ARGS=--help explains
# make experiment                                                  list them, as make experiments does
# make report NAME=quickstart                                      results as report.html and LaTeX tables
# make bench [ARGS=--quick]                                        time training steps; see docs/speed.md
# make profile [ARGS="--method quped"]                            where a training step's time goes
# make data NAME=cifar10 [ARGS="--data-dir FOLDER"]                download and prepare a data set
# make demo [ARGS="--port 8000"]                                   a digits client's model as a web page, served
# make federation [ARGS="--nodes 4 --rounds 5"]                    nodes in processes of their own, by Flower
# make federation-tools                                            install Flower, in .venv-federation
# make export-tools                                                install what writes ONNX, Core ML, StableHLO
# make docs                                                        the documentation as a site, build/site
# make docs-tools                                                  install what builds that site
# make test                                                        run all tests
# make test-short PYTHON=python3.13 VENV=.venv-3.13                a few, of what compilers break
# make lint                                                        check the style of the code
# make setup [ACCELERATOR=cuda13]                                  install jax for cpu, cuda12, cuda13 or tpu
# make ... PYTHON=python3.12                                       with another Python, of 3.11 or later

PYTHON ?= python3
ACCELERATOR ?= cpu
VENV ?= .venv
BIN := $(VENV)/bin
# Flower asks for older versions of what the other tools use: it has an environment of its own.
FEDERATION ?= $(VENV)-federation
export PYTHONPATH := $(CURDIR)
COMMA := ,

# NAME is one word and ARGS are words, as a shell has them; neither make nor a shell runs what is in
# them: they are taken as typed, and reach Python through the environment.
override NAME := $(value NAME)
override ARGS := $(value ARGS)
override ACCELERATOR := $(value ACCELERATOR)
export NAME ARGS ACCELERATOR
define RUN
import os, shlex, sys
try:
  words = shlex.split(os.environ["ARGS"])
except ValueError as error:
  sys.exit(f"error: ARGS={os.environ['ARGS']}: {error}")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:], *words])
endef
export RUN
define NEW_ENOUGH
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "error: $(PYTHON) does not run, or is older than 3.11; name another with make PYTHON=python3.12" >&2; exit 2; }
endef
PIP := install --quiet --disable-pip-version-check --retries 2 --timeout 15
# Fills an environment, $(1), by pip's arguments $(2); an environment is whole once its mark, the
# target, is there.
define INSTALL
@$(1)/bin/pip $(PIP) $(2) 2> $(1)/log || \
  { echo "error: packages are not installed: $$(tail -n 1 $(1)/log)" >&2; exit 1; }
@touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help setup experiment experiments report test test-short bench profile lint data demo export-tools docs docs-tools federation federation-tools

help:
	@sed -n '/^# /!q; s/^# //p' Makefile

$(VENV): $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements.txt requirements/test.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL,$(VENV),--editable ".[test]")

setup: $(VENV)
	@case "$$ACCELERATOR" in \
	  cpu) ;; \
	  cuda12|cuda13|tpu) $(BIN)/pip $(PIP) \
	    "jax[$$ACCELERATOR]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')" ;; \
	  *) echo "error: ACCELERATOR=$$ACCELERATOR: allowed is cpu, cuda12, cuda13 or tpu" >&2; exit 2 ;; \
	esac
	@$(BIN)/python -c 'import jax; print("jax", jax.__version__, "on", jax.devices())'

experiment: $(VENV)
	@$(BIN)/python -c "$$RUN" experiments $${NAME:+"$$NAME"}

experiments: $(VENV)
	@$(BIN)/python -m experiments

# Results are in results/; reports of those that come with the repository go to results/reports/.
report: $(VENV)
	@test -n "$$NAME" || { echo "error: NAME is missing, as in make report NAME=quickstart" >&2; exit 2; }
	@if ! test -d "results/$$NAME" && test -d "experiments/results/$$NAME"; \
	then $(BIN)/python -m qupeD_jax report "experiments/results/$$NAME" "results/reports/$$NAME"; \
	else $(BIN)/python -m qupeD_jax report "results/$$NAME"; fi

test: $(VENV)
	$(BIN)/python -m pytest
	@test ! -e $(FEDERATION)/installed || $(FEDERATION)/bin/python -m pytest tests/federation_app

test-short: $(VENV)
	$(BIN)/python -m pytest --dist load -k "not ditto and not sampling" \
	  tests/engine/test_parallel.py tests/federation/test_aggregators.py

bench: $(VENV)
	@$(BIN)/python -c "$$RUN" benchmarks.steps

# Runs quickstart first where it has not run. The page's runtime is fetched by npm, once.
demo: export-tools
	@test -d results/quickstart/models || $(BIN)/python -m experiments quickstart
	@$(BIN)/python -m qupeD_jax export results/quickstart --client 0 --to web --out results/quickstart/web
	@$(BIN)/python -c "$$RUN" qupeD_jax serve results/quickstart/web

federation: federation-tools
	@$(FEDERATION)/bin/python -c "$$RUN" federation_app.loopback

federation-tools: $(FEDERATION)/installed

$(FEDERATION)/installed: pyproject.toml requirements.txt requirements/test.txt requirements/flower.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv $(FEDERATION)
	$(call INSTALL,$(FEDERATION),--editable ".[test$(COMMA)flower]")

export-tools: $(VENV)/exporting

$(VENV)/exporting: requirements/export.txt $(VENV)/installed
	$(call INSTALL,$(VENV),--editable ".[export]")

docs: docs-tools
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server -d build/site"

docs-tools: $(VENV)/documenting

$(VENV)/documenting: requirements/docs.txt $(VENV)/installed
	$(call INSTALL,$(VENV),--editable ".[docs]")

profile: $(VENV)
	@$(BIN)/python -c "$$RUN" benchmarks.profile

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# TensorFlow is needed to prepare images, not to read them: it gets an environment of its own. A name is
# looked up before anything is installed.
data: .known-name .venv-data/installed
	@.venv-data/bin/python -c "$$RUN" qupeD_jax data "$$NAME"

.known-name:
	@test -n "$$NAME" || { echo "error: NAME is missing, as in make data NAME=cifar10" >&2; exit 2; }
	$(NEW_ENOUGH)
	@$(PYTHON) qupeD_jax/data/catalog.py "$$NAME"

.venv-data/installed: requirements.txt | .known-name
	$(PYTHON) -m venv .venv-data
	$(call INSTALL,.venv-data,-r requirements.txt tensorflow-cpu)
