# Everything a newcomer needs: `make sweep`, `make test`. The environment is made once, in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
AUDIT := .audit
CONFIG ?= configs/quick.yaml
ROUNDS ?= 60

.PHONY: help install sweep plan deploy ui test chaos check bench bench-dask bench-overhead bench-front bench-quant audit lock browser clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "quee needs Python 3.11; name it with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/pip check
	@touch $@

install: $(INSTALLED) ## Create .venv with the pinned dependencies

sweep: $(INSTALLED) ## Run the sweep of CONFIG (configs/quick.yaml), then say where the report is
	$(BIN)/quee sweep $(CONFIG)

plan: $(INSTALLED) ## Say what the sweep of CONFIG would compute
	$(BIN)/quee plan $(CONFIG)

deploy: $(INSTALLED) ## Put the deployments on the Prefect server that PREFECT_API_URL names; ARGS="--pool NAME --gpus N"
	$(BIN)/python -m infra.deploy $(ARGS)

ui: $(INSTALLED) ## Start Prefect and MLflow on loopback, with the sweeps that there are; ARGS="--runs FOLDER ..."
	$(BIN)/python -m infra.ui $(ARGS)

check: $(INSTALLED) ## Linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

browser: # the report is tested in it, and it draws the front as PNG
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } || \
	  { echo "the tests need Debian's chromium: apt-get install chromium chromium-driver" >&2; exit 1; }

test: $(INSTALLED) browser check ## Linter, type checker and every test
	@# four processes, two of which often wait, the longest tests first; more threads would stand in their way
	OMP_NUM_THREADS=1 PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=180 \
	  $(BIN)/pytest -n 4 --dist loadgroup --no-loadscope-reorder

chaos: $(INSTALLED) ## Kill or hinder whatever a sweep needs, at random moments: ROUNDS=60, SEED=… to repeat them
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED))

bench: $(INSTALLED) ## Print the ratios that quee promises, and write them to benchmarks/results.json
	$(BIN)/python benchmarks/run.py

bench-dask: $(INSTALLED) ## Print how well two Dask workers share the grid, against one process
	$(BIN)/python benchmarks/dask_grid.py

bench-overhead: $(INSTALLED) ## Print what a sweep of 720 cells spends outside of computing
	$(BIN)/python benchmarks/overhead.py

bench-front: $(INSTALLED) ## Print the front against every baseline, over data sets and seeds; DATA_ROOT adds CIFAR-10
	$(BIN)/python benchmarks/front.py

bench-quant: $(INSTALLED) ## Print accuracy at 2 to 4 bits for every quantisation method; DATA_ROOT adds CIFAR-10
	$(BIN)/python benchmarks/quantization.py

audit: ## Check the pinned dependencies against PyPI's advisories; wants the internet, and says so where there is none
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit==2.10.1; }
	@$(AUDIT)/bin/python -m infra.audit requirements.lock

lock: ## Resolve the dependencies anew (pip-tools) after pyproject.toml has changed
	$(BIN)/pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --no-header --output-file requirements.lock pyproject.toml

clean: ## Remove the environment and caches; stores and runs stay
	rm -rf $(VENV) $(AUDIT) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
