# `make` alone prints what there is. Everything that is downloaded or built goes into .venv/ here and into the user's
# cache folder (PRISM_CACHE, else XDG_CACHE_HOME/moe-prism, else ~/.cache/moe-prism); `make clean` removes the first,
# `make clean-cache` the second.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

UV_VERSION := 0.13.9
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLUSTER := $(BIN)/python -m tests.localcluster
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1
ARGS ?=
UV_COMPILE := $(BIN)/uv pip compile --quiet pyproject.toml --no-emit-index-url --no-header --no-annotate --python-version 3.11

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml requirements.lock
	@echo "Installing the Python environment into $(VENV): 5.5 GB (torch brings its CUDA libraries), 1 to 5 minutes."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "$(PYTHON) must be Python 3.11 to 3.13; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; run: apt-get install -y python3-venv" >&2; exit 1; }
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); }
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.lock -e '.[dev]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## Python environment in .venv/

.PHONY: serve
serve: install ## Serve the embedded model on this machine's CPU at 127.0.0.1:8000 (no root, no cluster)
	$(BIN)/prism-runtime serve examples/model/artifact --local-control --no-profile $(ARGS)

.PHONY: demo
demo: install ## From nothing to a result: cluster, operator, burst, comparison (ARGS=--fast: the short one)
	$(BIN)/python -m examples.demo $(ARGS)

.PHONY: test
test: install ## All tests, on a real local Kubernetes
	@echo "Tests: unit, property, sim and runtime take about 5 minutes; the cluster levels build Kubernetes and images on"
	@echo "first use (20 minutes, 30 GB of disk) and take about 8 minutes afterwards. Ctrl-C is safe; run it again to go on."
	@if [ "$$(id -u)" = 0 ]; then $(CLUSTER) doctor --install && $(CLUSTER) build; fi
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-fast
test-fast: install ## Tests that need no cluster
	$(BIN)/python -m pytest tests/unit tests/property tests/sim tests/runtime $(ARGS)

.PHONY: test-gpu
test-gpu: install ## The kernels on a GPU; skipped where there is none
	$(BIN)/python -m pytest tests/gpu $(ARGS)

.PHONY: lint
lint: install ## Style, types, layer contracts, generated files, chart
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m prism_api.crd --check crds helm/prism/files/crds
	$(BIN)/python -m prism_api.reference --check docs/api.md
	$(BIN)/python -m tests.lint

.PHONY: generate
generate: install ## CRDs and API reference from the typed resources
	$(BIN)/python -m prism_api.crd crds helm/prism/files/crds
	$(BIN)/python -m prism_api.reference docs/api.md

.PHONY: lock
lock: install ## Re-resolve the lock files (exact versions, no host names): all extras, and one for each image
	$(UV_COMPILE) --extra dev -o requirements.lock
	$(UV_COMPILE) --extra operator -c requirements.lock -o operator/requirements.lock
	$(UV_COMPILE) --extra runtime -c requirements.lock -o runtime/requirements.lock

.PHONY: cluster-up
cluster-up: install ## Local Kubernetes 1.37.2 with two nodes; prints the KUBECONFIG to export
	$(CLUSTER) up $(ARGS)

.PHONY: cluster-down
cluster-down: install ## Stop it; nothing is left behind
	$(CLUSTER) down $(ARGS)

.PHONY: bench-engine
bench-engine: install ## Step time of the engine at every operating point on this CPU
	$(BIN)/prism-runtime profile examples/model/artifact $(ARGS)

.PHONY: bench-runtime
bench-runtime: install ## CPU times of a layer and of the engine beside transformers' own (ARGS=--layer: the layer alone)
	$(BIN)/python -m evidence.runtime_bench $(ARGS)

.PHONY: bench-gpu
bench-gpu: install ## Time of an OLMoE layer on this machine's GPU at every budget, beside transformers' own
	$(BIN)/python -m prism_runtime.kernels.gpu_bench $(ARGS)

.PHONY: bench-refactor
bench-refactor: install ## Time to partition a layer of OLMoE's shape on this CPU, and what it grows with
	$(BIN)/python -m prism_runtime.refactor.bench $(ARGS)

.PHONY: bench-planner
bench-planner: install ## CPU time of one planner tick for 1,000 services (ARGS="--services 100 1000 --pods 10 100")
	$(BIN)/python -m prism_operator.plan_bench $(ARGS)

.PHONY: evidence-slice
evidence-slice: install ## Re-take every figure of evidence/slice.json (ARGS=--cold: from empty caches too)
	$(BIN)/python -m evidence.slice $(ARGS)

.PHONY: evidence-gpu
evidence-gpu: install ## Re-take evidence/gpu.json; needs a GPU
	$(BIN)/python -m prism_runtime.kernels.gpu_bench --json evidence/gpu.json

.PHONY: evidence-refactor
evidence-refactor: install ## Re-take every figure of evidence/refactor.json (ARGS=--smollm2: SmolLM2's too; ARGS=--ablation: what each ingredient is worth)
	$(BIN)/python -m evidence.refactor $(ARGS)

.PHONY: evidence-runtime
evidence-runtime: install ## Re-take every figure of evidence/runtime.json: CPU times, replays and a soak, an hour of a quiet machine
	$(BIN)/python -m evidence.runtime $(ARGS)

.PHONY: evidence-planner
evidence-planner: install ## Re-take every figure of evidence/planner.json: simulations, two hours of one core
	$(BIN)/python -m evidence.planner $(ARGS)

.PHONY: evidence-planner-ablation
evidence-planner-ablation: install ## What the parts of the planner are worth: one setting changed at a time, five minutes of one core
	$(BIN)/python -m evidence.planner_ablation $(ARGS)

.PHONY: evidence-planner-engine
evidence-planner-engine: install ## Compare the simulator with the engine on this CPU: ten minutes of one core
	$(BIN)/python -m evidence.planner_engine $(ARGS)

.PHONY: evidence-planner-cluster
evidence-planner-cluster: install ## Compare the simulator with the local cluster: three demos on a quiet machine, 15 minutes
	$(BIN)/python -m evidence.planner_cluster $(ARGS)

.PHONY: clean
clean: ## Remove .venv/ and build output of this checkout
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: clean-cache
clean-cache: install ## Remove built binaries and images from the user's cache folder
	$(CLUSTER) clean
