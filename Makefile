# Commands of the project; `make` alone lists them. Everything runs from a virtual environment of its own.
.DEFAULT_GOAL := help
.PHONY: help run token smoke admin load-demo test faults soak fuzz check format bench env up down verify screenshot lock openapi asyncapi clean

# Compiled modules are kept, else every start would compile pandas anew.
export PYTHONDONTWRITEBYTECODE =

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
LOCAL := .venv/.local
DEVELOPMENT := .venv/.development
BENCH := .venv/.bench
PAGE := services/api_gateway/page/node_modules/.package-lock.json
RUN_PYTHON = $(or $(PYTHON),$(error Python 3.11 or later is needed, found $(shell python3 -V 2>&1); install one, or make PYTHON=/path/to/python))

.venv/.%: requirements/%.txt
	@$(RUN_PYTHON) local/install.py $*

# Without npm this says so and goes on: the page then has no chart.
$(PAGE): services/api_gateway/page/package-lock.json
	@$(RUN_PYTHON) local/install.py page

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

run: $(LOCAL) $(PAGE) ## the whole system on this machine, no Docker, no key; Ctrl-C stops it
	@exec $(BIN)/python -m local run

token: $(LOCAL) ## USER=demo: a bearer token for a user of `make run`
	@exec $(BIN)/python -m local token '$(if $(filter command,$(firstword $(origin USER))),$(USER),demo)'

smoke: $(LOCAL) ## URL=… TOKEN=…: ask a running system what may be wrong with it (default: `make run`'s)
	@exec $(BIN)/python -m local smoke $(if $(URL),--url '$(URL)') $(if $(TOKEN),--token '$(TOKEN)')

admin: $(LOCAL) ## ARGS="create-user carol --cash 5000": users, cash, positions, tokens and dead letters of `make run`
	@exec $(BIN)/python -m local admin $(or $(ARGS),--help)

load-demo: $(LOCAL) ## USERS=100 DAYS=90: fill `make run` with users and their history; USERS=0 deletes them
	@exec $(BIN)/python -m local load-demo $(if $(USERS),--users '$(USERS)') $(if $(DAYS),--days '$(DAYS)')

test: $(DEVELOPMENT) $(PAGE) ## all tests on real servers; BACKEND=external|containers|local, ARGS=… for pytest
	@exec $(BIN)/python -m pytest $(if $(filter external,$(BACKEND)),,-n 2 --dist loadgroup) \
		$(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

faults: $(DEVELOPMENT) ## FAULT=7: inject every fault of the table, or one, into a system of its own
	@exec $(BIN)/python -m tests.faults $(if $(FAULT),--fault '$(FAULT)') $(ARGS)

soak: $(DEVELOPMENT) ## MINUTES=5 SEED=1: kill and freeze everything at random for so long, and count what was lost
	@exec $(BIN)/python -m tests.faults --minutes '$(or $(MINUTES),5)' --seed '$(or $(SEED),1)' $(ARGS)

fuzz: $(DEVELOPMENT) ## wrong data at every door, 20 times as much as in the tests and new each time; ARGS=… for pytest
	@HYPOTHESIS_PROFILE=long exec $(BIN)/python -m pytest -n 2 $(if $(BACKEND),--backend $(BACKEND)) tests/fuzz $(ARGS)

check: $(DEVELOPMENT) ## format, lint, types, imports
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(DEVELOPMENT) ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(BENCH) ## measure the performance goals; ARGS="--quick", "--only snapshots", --help
	@exec $(BIN)/python -m bench $(ARGS)

env: .env ## write .env with random secrets, for docker compose; one that is there stays

.env:
	@umask 077 && ops/new-env > $@.unfinished && mv $@.unfinished $@ && echo "$@ made from .env.example, with secrets of its own"

up: .env ## the system in containers (PROFILE=demo adds the market simulator and demo portfolios)
	docker compose $(if $(PROFILE),--profile $(PROFILE)) up --build --detach --wait

down: .env ## stop the containers; the data stays
	docker compose --profile demo down

verify: $(DEVELOPMENT) ## build docker-compose.yml in a project of its own, ask it, remove it
	@exec $(BIN)/python -m pytest -n0 tests/end_to_end/verify_compose.py $(ARGS)

screenshot: $(DEVELOPMENT) $(PAGE) ## write docs/screenshots from a system of its own; needs Chromium
	@exec $(BIN)/python -m tests.end_to_end.take_screenshots

openapi: $(DEVELOPMENT) ## write docs/openapi.json from the response models
	@exec $(BIN)/python -m services.api_gateway.openapi > docs/openapi.json

asyncapi: $(DEVELOPMENT) ## write docs/asyncapi.yaml from the messages of the bus
	@exec $(BIN)/python -m shared.asyncapi > docs/asyncapi.yaml

lock: $(DEVELOPMENT) ## compile requirements/ from pyproject.toml
	@for name in services local bench development; do \
		group=$$([ $$name = services ] || echo --group $$name); \
		$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate \
			--python-version 3.11 $$group pyproject.toml -o requirements/$$name.txt; done

clean: ## remove the virtual environment; the data of `make run` stays
	rm -rf .venv
