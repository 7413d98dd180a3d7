# make train    set everything up and train a flow on the default source; ends with a picture
# make test     set everything up and run the tests
# make bench    set everything up and measure against torchdiffeq, diffrax and zuko; BENCH_ARGS="training --rounds 3"
# make lint     ruff and clang-format; make format applies them
#
# Everything lives in .venv. TORCH=2.11.0 picks another torch, PYTHON=python3.12 another interpreter, SOURCE=digits other data.

PYTHON ?= python3
TORCH ?= 2.13.0
SOURCE ?= 8gaussians
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
PINNED := $(PIP) install -q -c $(VENV)/constraints.txt

TORCH_STAMP := $(VENV)/.torch-$(TORCH)
BUILD_STAMP := $(VENV)/.built-$(TORCH)
TRAIN_STAMP := $(VENV)/.train-tools
TEST_STAMP := $(VENV)/.test-tools
BENCH_STAMP := $(VENV)/.bench-tools
LINT_STAMP := $(VENV)/.lint-tools

SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: train test bench lint format build clean

train: build $(TRAIN_STAMP)
	$(BIN)/python -m pycnf train $(SOURCE)

test: build $(TRAIN_STAMP) $(TEST_STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

bench: build $(BENCH_STAMP)
	$(BIN)/python -m bench $(BENCH_ARGS)

lint: $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(LINT_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

build: $(BUILD_STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamp of another version goes, so that switching TORCH back and forth reinstalls.
$(TORCH_STAMP): | $(VENV)/bin/python
	rm -f $(VENV)/.torch-* $(VENV)/.built-*
	echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	$(PINNED) "torch==$(TORCH)" numpy "setuptools>=77" wheel "pybind11>=2.13" ninja "cmake>=3.22"
	touch $@

$(BUILD_STAMP): $(TORCH_STAMP) $(SOURCES)
	$(PINNED) --no-build-isolation -e .
	touch $@

$(TRAIN_STAMP): $(TORCH_STAMP)
	$(PINNED) matplotlib scikit-learn
	touch $@

$(TEST_STAMP): $(TORCH_STAMP)
	$(PINNED) pytest pytest-xdist hypothesis scipy torchdiffeq==0.2.5
	touch $@

# jax needs Python 3.11; without diffrax the benchmarks say so and go on.
DIFFRAX := $(foreach peer,diffrax==0.7.2 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8,"$(peer); python_version >= '3.11'")

$(BENCH_STAMP): $(TORCH_STAMP)
	$(PINNED) torchdiffeq==0.2.5 zuko==1.6.0 $(DIFFRAX)
	touch $@

$(LINT_STAMP): | $(VENV)/bin/python
	$(PIP) install -q ruff==0.17.5 clang-format==23.1.5
	touch $@

clean:
	rm -rf build pycnf/_C.*.so
