# Every target makes the virtual environment that it needs, once, under .venv/.
PYTHON ?= python3
VENV ?= .venv
AOT_TABLE ?= benchmarks/results/aot.md
RUN := $(VENV)/run
DEV := $(VENV)/dev

.PHONY: demo test lint aot aot-versions versions gpu clean

demo: $(RUN)/installed  ## train, score and picture a SegDeformer in a few minutes, on a CPU too
	$(RUN)/bin/segdeformer train landcover-demo
	$(RUN)/bin/segdeformer eval --json runs/demo-scores.json --picture runs/demo-validation.png

test: $(DEV)/installed  ## the whole test suite
	$(DEV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(DEV)/installed  ## style and types
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

aot: $(DEV)/installed  ## compile every Triton kernel for five kinds of cards
	$(DEV)/bin/python -m benchmarks.aot

aot-versions: $(DEV)/installed  ## the same with every Triton version we promise; writes benchmarks/results/aot.md
	$(DEV)/bin/python -m benchmarks.aot --versions --out $(AOT_TABLE)

versions:  ## the test suite with the oldest, the usual and the newest versions; writes docs/versions.md
	$(PYTHON) tools/tested_versions.py

gpu: $(RUN)/installed  ## check, tune and time the Triton kernels on this machine's GPU, in less than 9 minutes
	$(RUN)/bin/python -m benchmarks.gpu

$(RUN)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "segdeformer needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --editable .
	touch $@

$(DEV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
