# `make demo` and `make test` set everything up themselves, in .venv; see `make help`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Every pip that runs below, the one inside tools/detectron2_wheel.py included, keeps to the pinned
# versions. The path is relative because pip splits this variable at spaces, which a full path may hold.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup test test-all coverage demo docs types bench gpu gpu-pack lint clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train, evaluate and show results on the generated digits set"
	@echo "make test       run the tests, without those that take minutes (part: make test ARGS='-k losses')"
	@echo "make test-all   run every test, trainings of minutes included"
	@echo "make coverage   run make test, and print what the tests cover of each file"
	@echo "make docs       build the documentation into site/, and fail at a broken link"
	@echo "make types      check types with mypy"
	@echo "make bench      time the losses beside others' implementations, and whole training steps,"
	@echo "                into build/bench/ (it adds mmdet to $(VENV))"
	@echo "make gpu        check and time everything that needs a GPU, into results/gpu/ (eight minutes)"
	@echo "make gpu-pack   gather the wheels that make gpu needs on a machine without a network"
	@echo "make setup      only install, into $(VENV) (every target but gpu and clean does it too)"
	@echo "make lint       check style and formatting"
	@echo "make clean      remove caches and build output; distclean removes $(VENV) too"
	@echo "PYTHON=...      the Python that $(VENV) is made with, 3.10 to 3.13"

setup: $(READY)

$(READY): setup.cfg setup.py pyproject.toml constraints.txt $(wildcard ghm_d2/kernels/cpu*.[ch]) \
    tools/detectron2_wheel.py tools/detectron2.patch $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install pip setuptools
	$(BIN)/python -m pip install --editable '.[test]'
	$(BIN)/python tools/detectron2_wheel.py
	@touch $@
	@echo "Ready: $(BIN)/ghm --help"

# A virtual environment whose Python has gone, or half a one, is made anew.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	    echo "error: Python 3.10 to 3.13 is needed; '$(PYTHON)' is" \
	         "$$($(PYTHON) --version 2>/dev/null || echo 'not there')." \
	         "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# Two processes with one thread each get more done than one with two.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: setup
	$(BIN)/python -m pip install --quiet --editable '.[notebook]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Lines and branches that the tests run, in processes that they start too
coverage: setup
	rm -rf build/coverage; mkdir -p build/coverage
	OMP_NUM_THREADS=1 COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m pytest \
	    -n 2 --dist worksteal -m "not slow" --cov --cov-report=term $(ARGS)

docs: setup
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

types: setup
	$(BIN)/python -m mypy

demo: setup
	$(BIN)/ghm train --config configs/quick/retinanet_ghm.yaml --output runs/demo --overwrite --seed 1 \
	    SOLVER.MAX_ITER 400

# Of mmdet only the file with its GHM losses is used, which needs none of what mmdet requires.
bench: setup
	$(BIN)/python -m pip install --quiet --no-deps mmdet==3.3.0
	$(BIN)/python benchmarks/time_losses.py --output build/bench/losses.json $(ARGS)
	$(BIN)/python benchmarks/time_losses.py --output build/bench/growth.json --only GHM-C "torch BCE" \
	    --samples 100000 1000000 8000000 10000000 100000000
	$(BIN)/python benchmarks/time_steps.py --output build/bench/steps.json
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 \
	    benchmarks/time_sync.py --device cpu --output build/bench/sync.json

# On a machine without a network there is no $(VENV), and PYTHON has what make gpu-pack gathered.
gpu:
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --output results/gpu $(ARGS)

gpu-pack: setup
	$(BIN)/python benchmarks/gpu_pack.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Runs, data sets and results are people's work: nothing here removes them.
clean:
	rm -rf build dist site .cache *.egg-info .pytest_cache .ruff_cache .mypy_cache .nox .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) ghm_d2/kernels/_cpu.*
