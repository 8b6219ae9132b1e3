# Everything a person or CI types. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# Of tests that wait for a cluster most of the time.
WAITING ?= 5
PYTEST = $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
export PYTHONHASHSEED := 0

.PHONY: help setup demo test test-cluster test-e2e check generate cluster bench images clean \
  build/.cluster

help:  ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: .venv/.ready  ## A virtual environment with everything, pinned by constraints.txt

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	  --constraint constraints.txt --editable '.[operator,trainer,dev]'
	@touch $@

demo: setup  ## Seed, three experts, their mix and a dense baseline on real text; about 6 minutes
	$(BIN)/python examples/demo.py

test: setup build/.chromium $(if $(CI),build/.cluster)  ## Every test this machine can run; with CI=true a cluster's too
	$(PYTEST) -n $(WORKERS) --ignore=tests/cluster --ignore=tests/e2e/cluster tests
ifdef CI
	$(PYTEST) -n $(WAITING) tests/cluster
	@echo "tiers run: unit, e2e (one machine), cluster"
else
	@echo "tiers run: unit, e2e (one machine)"
	@echo "tier cluster left out: its parts take 10 minutes to build; CI=true make test"
endif
	@echo "tier e2e on Kubernetes left out: its two images take half an hour with it; make test-e2e"

build/.cluster: setup
	PYTHONPATH=tests $(BIN)/python -m cluster.binaries

build/.chromium:
	@mkdir -p build
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } \
	  || { echo 'make test needs chromium (installed by apt-get as root, or by you)'; exit 1; }
	@touch $@

test-cluster: setup  ## The tests on a real Kubernetes; builds it first (10 CPU minutes, once)
	$(PYTEST) -q -n $(WAITING) tests/cluster

test-e2e: setup  ## As root: both images, a real node, helm install, models in S3
	@test "$$(id -u)" = 0 || { echo 'make test-e2e needs root: buildah, network namespaces, mounts'; exit 1; }
	$(BIN)/python -m pytest -q tests/e2e/cluster

images: setup  ## The operator's and the trainer's image, with docker or (as root) buildah
	PYTHONPATH=tests $(BIN)/python -m cluster.images

cluster: setup  ## A real cluster until Ctrl-C, and its kubeconfig (as root with a real node)
	PYTHONPATH=tests $(BIN)/python -m cluster

check: setup  ## Lint, types, import rules, generated files, budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_layout.py tests/contract

generate: setup  ## Writes the CRD from btx_api, and what the chart has of it, of settings and values
	$(BIN)/python -m btx_api.schema crds
	$(BIN)/python -m btx_operator.cluster.chart_schema charts/btx-operator crds
	$(BIN)/python charts/write_readme.py charts/btx-operator

bench: bench-mix bench-prepare bench-s3 bench-train bench-operator  ## Every bench, and docs/performance.md
	$(BIN)/python benches/write_docs.py

bench-%: setup build/peers/.ready
	$(BIN)/python benches/bench_$*.py

build/peers/.ready: benches/peers.txt .venv/.ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/peers
	$(BIN)/uv pip install --quiet --python build/peers/bin/python --compile-bytecode \
	  --requirements benches/peers.txt
	@touch $@

clean:  ## Removes what was built; keeps .venv and .btx
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
