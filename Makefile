# Every command here stands on its own; `make help` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
GROUP ?= all
BIN := .venv/bin
# The engine that tests and benchmarks run is built by the same role that builds it on hosts.
HERD := $(HOME)/.cache/llamaherd/loopback
RUN := . scripts/environment &&
export PATH := $(CURDIR)/$(BIN):$(PATH)
export LLAMAHERD_TEST_LIB_DIR := $(HERD)/llama.cpp/current/lib
export LLAMAHERD_TEST_BIN_DIR := $(HERD)/llama.cpp/current/bin
export LLAMAHERD_TEST_MODEL := $(HERD)/state/models/smollm2-135m-instruct.gguf
export LLAMA_CPP_LIB_PATH := $(LLAMAHERD_TEST_LIB_DIR)
export MTMD_CPP_LIB := $(LLAMAHERD_TEST_LIB_DIR)

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s%s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: ## Make the locked environment in .venv
	@scripts/bootstrap

.PHONY: demo
demo: ## Boot a host, deploy, tune, verify; print the table and a curl line; BUDGET=10m tunes longer
	@export DEMO_STARTED=$$(date +%s); scripts/bootstrap $$([ -e "$(HERD)/llama.cpp/current" ] || echo 2500) && \
	  $(RUN) exec $(BIN)/python -m demo up

.PHONY: demo-down
demo-down: ## Remove every trace of the demo but its caches
	@if [ -e $(BIN)/python ] || [ -e build/demo ] || [ -e /run/llamaherd-demo ]; then \
	  scripts/bootstrap && $(RUN) $(BIN)/python -m demo down; else echo "demo: there is nothing to remove"; fi

.PHONY: engine
engine: setup ## llama.cpp and a model for tests and benchmarks, built once
	@$(RUN) $(BIN)/ansible-playbook -i inventories/loopback playbooks/deploy.yml --tags llama_cpp,model
	@scripts/install-binding "$(HERD)/llama.cpp/current/wheel"

.PHONY: lint
lint: setup ## ruff, mypy --strict, ansible-lint, yamllint, shellcheck
	@$(RUN) scripts/lint

.PHONY: sanity
sanity: setup ## ansible-test sanity on the built collection
	@$(RUN) scripts/sanity

.PHONY: test
test: lint sanity engine ## Everything: lint, unit, server with the real model, load tests, lab
	@$(RUN) $(BIN)/pytest -n 2

.PHONY: pytest
pytest: setup ## Some tests, in the environment that they need: make pytest ARGS="tests/unit -k gguf"
	@$(RUN) $(BIN)/pytest $(ARGS)

.PHONY: test-fleet
test-fleet: setup engine ## The long tests on a fleet of lab hosts
	@$(RUN) $(BIN)/pytest -m fleet

.PHONY: bench
bench: setup engine ## All of bench/, or one: make bench GROUP=serving
	@$(RUN) $(BIN)/python -m bench $(GROUP)

.PHONY: terminal
terminal: setup ## Draw the README's terminal from the last `make demo` here: docs/images/demo.svg
	@$(RUN) $(BIN)/python -m scripts.terminal --record

.PHONY: docs
docs: setup ## The documentation as a site: build/docs/index.html
	@$(RUN) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: report-demo
report-demo: setup ## Make the tuning report from recorded data: build/report-demo.html
	@$(RUN) $(BIN)/python -m llamaherd_loadtest.report loadtest/recorded build/report-demo.html
