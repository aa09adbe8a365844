# make experiment NAME=quickstart [ARGS="--rounds 20 --seed 3"]    run an experiment
# make experiments                                                 list them
# make report NAME=quickstart                                      results as report.html, table.tex
# make test                                                        run all tests
# make bench [ARGS=--quick]                                        time training steps; see docs/speed.md
# make data NAME=cifar10 [ARGS="--data-dir FOLDER"]                download and prepare a data set
# make demo [ARGS="--port 8000"]                                   a digits client's model as a web page, served
# make export-tools                                                install what writes ONNX, Core ML, StableHLO
# make setup ACCELERATOR=cuda13                                    install jax for cpu, cuda12, cuda13 or tpu

PYTHON ?= python3
ACCELERATOR ?= cpu
BIN := .venv/bin
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help setup experiment experiments report test bench lint data demo export-tools

help:
	@sed -n '/^# /!q; s/^# //p' Makefile

.venv: .venv/installed

.venv/installed: pyproject.toml requirements.txt requirements/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name another with make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

setup: .venv
	@case "$(ACCELERATOR)" in \
	  cpu) ;; \
	  cuda12|cuda13|tpu) $(BIN)/pip install --quiet --disable-pip-version-check \
	    "jax[$(ACCELERATOR)]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')" ;; \
	  *) echo "error: ACCELERATOR=$(ACCELERATOR): allowed is cpu, cuda12, cuda13 or tpu" >&2; exit 2 ;; \
	esac
	@$(BIN)/python -c 'import jax; print("jax", jax.__version__, "on", jax.devices())'

experiment: .venv
	@$(BIN)/python -m experiments $(or $(NAME),$(error NAME is missing; make experiments lists the names)) $(ARGS)

experiments: .venv
	@$(BIN)/python -m experiments

# Results are in results/; those that come with the repository are in experiments/results/.
report: .venv
	@test -n "$(NAME)" || { echo "error: NAME is missing, as in make report NAME=quickstart" >&2; exit 2; }
	@folder="results/$(NAME)"; \
	if ! test -d "$$folder" && test -d "experiments/$$folder"; then folder="experiments/$$folder"; fi; \
	$(BIN)/python -m qupeD_jax report "$$folder"

test: .venv
	$(BIN)/python -m pytest

bench: .venv
	@$(BIN)/python -m benchmarks.steps $(ARGS)

# Runs quickstart first where it has not run. The page's runtime is fetched by npm, once.
demo: export-tools
	@test -d results/quickstart/models || $(BIN)/python -m experiments quickstart
	@$(BIN)/python -m qupeD_jax export results/quickstart --client 0 --to web --out results/quickstart/web
	@$(BIN)/python -m qupeD_jax serve results/quickstart/web $(ARGS)

export-tools: .venv/exporting

.venv/exporting: requirements/export.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[export]"
	@touch $@

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# TensorFlow is needed to prepare images, not to read them: it gets an environment of its own.
data: .venv
	@test -n "$(NAME)" || { echo "error: NAME is missing, as in make data NAME=cifar10" >&2; exit 2; }
	@test -d .venv-data || { $(PYTHON) -m venv .venv-data && .venv-data/bin/pip install \
	  --quiet --disable-pip-version-check -r requirements.txt tensorflow-cpu || { rm -rf .venv-data; exit 1; }; }
	@.venv-data/bin/python -m qupeD_jax data $(NAME) $(ARGS)
