# Every target sets up what it needs: `make demo` works right after a clone.
# PYTHON makes the virtual environment; with VENV=DIR an existing one is used as it is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.rag2-installed
ARGS ?=
N ?= 50

.PHONY: help demo test test-slow chaos kernels-check bench gpu-bench check format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	touch $@

demo: $(READY)  ## train and compare all arms on the built-in almanac (ARGS="--out DIR --seed N")
	$(BIN)/rag2 demo $(ARGS)

test: $(READY)  ## run the tests: CPU, no network, minutes (ARGS="-k name")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(READY)  ## run the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' $(ARGS)

chaos: $(READY)  ## kill joint runs N times and compare them with an undisturbed one (ARGS="--fault NAME")
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --kills $(N) $(ARGS)

# The triton that belongs to torch 2.11, beside that of constraints.txt.
OTHER_TRITON := $(VENV)/triton-3.6.0
$(OTHER_TRITON): | $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ triton==3.6.0

kernels-check: $(READY) $(OTHER_TRITON)  ## compile the Triton kernels for Hopper without a GPU and compare with golden.json
	PYTHONPATH=kernels $(BIN)/python kernels/check/sm90.py
	PYTHONPATH=$(OTHER_TRITON):kernels $(BIN)/python kernels/check/sm90.py

bench: $(READY)  ## time, memory and errors of every kernel operation on this CPU (ARGS="--op NAME")
	PYTHONPATH=kernels $(BIN)/python kernels/bench/run.py --suite cpu --seconds 1800 --out runs/bench $(ARGS)

gpu-bench:  ## the same on a GPU; installs nothing, needs torch, triton and einops
	PYTHONPATH=kernels $(PYTHON) kernels/bench/run.py --suite gpu --seconds 480 --out runs/gpu-bench $(ARGS)

check: $(READY)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## rewrite the sources in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
