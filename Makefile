# Needs Python 3.11 and make. Each target builds what it needs from an exact lock, once (tools/env.py).
#   make quickstart ARGS='stages.2.steps=20'     overrides of the recipe
#   make test-unit ARGS='-k recipe'              arguments for pytest

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done)
endif
ARGS ?=
ENGINE ?= embedded
MINUTES ?= 60
QUICKSTART = $(if $(filter sglang,$(ENGINE)),quickstart-sglang,quickstart)

# More threads than processes make small matrices slower, not faster.
export OMP_NUM_THREADS := 1
export PYTHONPATH := $(CURDIR)
export PYTHONNOUSERSITE := 1

# $(call in,NAME): the interpreter of environment NAME, built first where there is none.
in = py="$$($(PYTHON) tools/env.py $(1))" && "$$py"
genac = $(call in,cpu) -m genac_megatron
# Where servers are wanted: their environment, built first, and known to what follows.
serve = serve="$$($(PYTHON) tools/env.py serve)" && export GENAC_SERVE_PYTHON="$$serve" &&
# The same of other packages' environments.
theirs = theirs="$$($(PYTHON) tools/env.py environments)" && export GENAC_ENVIRONMENTS_PYTHON="$$theirs" &&
# Pins for GPUs are for Python 3.12, and made by tools/gpu_setup.sh, not by tools/env.py.
GENAC_GPU_PYTHON ?= $(shell $(PYTHON) tools/env.py cpu 2>/dev/null)
gpu = "$(GENAC_GPU_PYTHON)"
serving = $(if $(filter sglang,$(ENGINE)),$(serve))
# Long tests of what shorter ones cover too are left to test-extended; ALL=1 runs both.
pick = $(if $(ALL),,-m "not extended")

.PHONY: help
help: ## What each target does
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: python
python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 was not found as python3.11 or python3." >&2; \
		echo "  way out: install it, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }

.PHONY: quickstart
quickstart: python ## Train an actor and a generative critic on this machine (ENGINE=sglang: on real servers)
	@export GENAC_TYPED="make quickstart$(if $(filter sglang,$(ENGINE)), ENGINE=sglang)"; \
		$(serving) $(genac) run recipes/$(QUICKSTART).yaml $(ARGS)

.PHONY: quickstart-recorded
quickstart-recorded: python ## The same, its output with times in docs/quickstart-recorded.txt
	@$(PYTHON) tools/record.py docs/quickstart-recorded.txt -- $(MAKE) --no-print-directory quickstart

.PHONY: genac
genac: python ## Any command of genac, such as ARGS='report runs/quickstart'
	@export GENAC_TYPED="make genac"; $(genac) $(ARGS)

.PHONY: quickstart-sweep
quickstart-sweep: python ## The quickstart over seeds and processor kernels, into benchmarks/results (goes on where it was stopped)
	@$(call in,cpu) tools/quickstart_sweep.py $(ARGS)

.PHONY: test
# Three at a time, the longest first: Slurm's jobs and servers that hang are mostly waited for.
test: lint ## Everything that CI runs, logs in runs/test-logs
	@$(PYTHON) tools/areas.py --jobs 3 slurm serving distributed e2e conversion unit

.PHONY: test-unit
test-unit: python ## Fast tests without processes
	@$(call in,cpu) -m pytest -n 2 tests/unit $(ARGS)

.PHONY: test-distributed
test-distributed: python ## Layouts, checkpoints and publication over real processes (gloo)
	@$(call in,cpu) -m pytest tests/distributed $(pick) $(ARGS)

.PHONY: serve-env
serve-env: python ## Build the environment in which SGLang serves, and print its interpreter
	@$(PYTHON) tools/env.py serve

.PHONY: environments-env
environments-env: python ## Build the environment in which verifiers and textarena play, and print its interpreter
	@$(PYTHON) tools/env.py environments

.PHONY: test-serving
test-serving: python ## Engines that generate, with SGLang's servers on this machine
	@$(serve) $(call in,cpu) -m pytest tests/serving $(pick) $(ARGS)

.PHONY: test-conversion
test-conversion: python ## Hugging Face folders to checkpoints and back, on a real small model
	@$(call in,cpu) tools/fetch_smollm2.py >/dev/null
	@$(serve) $(call in,cpu) -m pytest tests/conversion $(pick) $(ARGS)

.PHONY: test-e2e
test-e2e: python ## Whole runs by the command line
	@$(theirs) $(call in,cpu) -m pytest tests/e2e $(pick) $(ARGS)

.PHONY: test-slurm
test-slurm: python ## Real jobs on a Slurm of two nodes on this machine (Debian's slurm-wlm and munge; in CI they are installed)
	@$(PYTHON) tools/slurm_packages.py
	@$(serve) $(call in,cpu) -m pytest tests/slurm $(pick) $(ARGS)

.PHONY: test-extended
test-extended: python ## What make test leaves out: long tests of what shorter ones cover too
	@$(serve) $(theirs) $(call in,cpu) -m pytest tests -m extended $(ARGS)

.PHONY: test-faults
test-faults: python ## Harm to real runs: killed ranks, full disks, damaged checkpoints, clocks (root mounts a small disk)
	@$(call in,cpu) -m pytest tests/faults $(ARGS)

.PHONY: soak
soak: python ## Quickstart steps under random kills for MINUTES=60
	@$(call in,cpu) tools/soak.py --minutes $(MINUTES) $(ARGS)

.PHONY: test-megatron-next
test-megatron-next: python ## The distributed tests on megatron-core 0.19 (an environment of its own)
	@$(call in,cpu-next) -m pytest tests/distributed $(ARGS)

.PHONY: test-gpu
test-gpu: ## What needs a GPU, by the interpreter GENAC_GPU_PYTHON (tools/gpu_setup.sh prints it)
	@$(gpu) -m pytest tests/gpu $(ARGS)

.PHONY: bench-gpu
bench-gpu: ## Every benchmark of benchmarks/gpu, into benchmarks/results/gpu/ (ARGS=--tiny: a try on a CPU)
	@for name in training accuracy logprobs publication joint_step memory; do \
		echo "== $$name"; $(gpu) -W ignore -m benchmarks.gpu.$$name $(ARGS) || exit 1; done

.PHONY: lint
lint: python ## Lint, format check and types
	@$(call in,cpu) -m ruff check .
	@$(call in,cpu) -m ruff format --check .
	@$(call in,cpu) -m mypy

.PHONY: format
format: python ## Format the code and mend what lint can mend
	@$(call in,cpu) -m ruff check --fix-only .
	@$(call in,cpu) -m ruff format .

.PHONY: doctor
doctor: python ## Versions of everything, what is missing and what that costs
	@$(genac) doctor

.PHONY: bench
bench: python ## Measure the figures that the README states
	@$(serve) py="$$($(PYTHON) tools/env.py cpu)" && for script in benchmarks/*.py; do \
		echo "== $$script"; "$$py" "$$script" $(ARGS) || exit 1; done

.PHONY: reference
reference: python ## Make docs/reference.md anew from the recipe's schema
	@$(call in,cpu) -m tools.recipe_reference

.PHONY: lock
lock: python ## Resolve requirements/cpu.lock and cpu-next.lock anew from pyproject.toml
	@$(PYTHON) tools/lock.py

.PHONY: clean
clean: ## Remove caches of tools from the clone (runs/ and environments stay)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
