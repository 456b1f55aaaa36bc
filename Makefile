# What can be done with a checkout of Volery. `make` alone lists it.
SHELL := /bin/sh
PYTHON := .venv/bin/python
VOLERY_HOME ?= /var/lib/volery
HOSTS ?= 3
YES ?=
TESTS ?=
WORKERS ?= 2
SEEDS ?= 200
SEED ?=
N ?= 30
VMS ?= 20000
MINUTES ?= 10
export VOLERY_HOME YES

.PHONY: help up down clean status test check sim lab lab-down bench fleet ha-trials docs fmt lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  VOLERY_HOME=$(VOLERY_HOME) is where an installation keeps everything."

up: ## set everything up and start it: one command to a running VM
	@VOLERY_TARGET=up deploy/bootstrap.sh run
	@$(PYTHON) -m volery.setup up

down: ## stop Volery; virtual machines run on
	@test ! -x $(PYTHON) || $(PYTHON) -m volery.setup down

clean: ## remove all that `make up` made, after asking (YES=1 answers)
	@test ! -x $(PYTHON) || $(PYTHON) -m volery.setup clean

status: ## what of this installation is running
	@test -x $(PYTHON) || { echo "Nothing is set up here: run make up."; exit 1; }
	@$(PYTHON) -m volery.setup status

# Hundreds of its processes are Python: none compiles again what another one has.
test: export PYTHONDONTWRITEBYTECODE :=
test: ## every test, two at a time (TESTS=tests/setup runs some; WORKERS=0: one after the other)
	@VOLERY_TARGET=test deploy/bootstrap.sh test
	@$(PYTHON) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=40 --durations-min=8 $(TESTS)

check: ## types, style, layering
	@deploy/bootstrap.sh venv
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports

sim: ## SEEDS=200 installations and their faults on virtual time (SEED=7 replays one, MUTANTS=1 each known mistake)
	@deploy/bootstrap.sh venv
	@$(PYTHON) -m sim $(if $(MUTANTS),--mutants,$(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) \
		$(if $(FOCUS),--focus '$(FOCUS)') $(if $(MUTANT),--mutant '$(MUTANT)'))

lab: ## HOSTS=3 hosts on this machine, connected to one control plane
	@VOLERY_TARGET=lab deploy/bootstrap.sh test
	@$(PYTHON) -m lab up --hosts $(HOSTS)

lab-down: ## end the lab
	@test ! -x $(PYTHON) || $(PYTHON) -m lab down

bench: ## measure; prints a table and writes bench/results.json
	@VOLERY_TARGET=bench deploy/bootstrap.sh test
	@$(PYTHON) -m bench

fleet: HOSTS := 1000
fleet: ## HOSTS=10000 VMS=200000 simulated agents, each on its own connection, against the real services; measured
	@VOLERY_TARGET=bench deploy/bootstrap.sh test
	@$(PYTHON) -m fleet --hosts $(HOSTS) --vms $(VMS) --minutes $(MINUTES)

ha-trials: ## N=30 times a host breaks in a lab, and its VM comes back elsewhere; measured (more than an hour)
	@VOLERY_TARGET=bench deploy/bootstrap.sh test
	@$(PYTHON) -m trials -n $(N)

docs: ## write the generated pages anew
	@deploy/bootstrap.sh venv
	@$(PYTHON) -m docs.generate

fmt: ## put the source in shape
	@deploy/bootstrap.sh venv
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

lock: ## write the lock files anew from pyproject.toml
	@deploy/bootstrap.sh venv
	@.venv/bin/uv pip compile -q pyproject.toml --extra all --group dev --python-version 3.11 --universal \
	  --generate-hashes --no-emit-index-url -o requirements-dev.lock
	@.venv/bin/uv pip compile -q pyproject.toml --extra all --python-version 3.11 --universal \
	  -c requirements-dev.lock --generate-hashes --no-emit-index-url -o requirements.lock
