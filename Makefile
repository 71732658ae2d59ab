# Every command of the project. A fresh machine needs Python 3.11 with venv and headers, a C++17
# compiler, make and git; everything else goes into .venv. Nothing is done twice.

PYTHON ?= python3
FUSEDSTEP_WERROR ?= OFF
FUSEDSTEP_CUDA ?= AUTO
FUSEDSTEP_CUDA_ARCHITECTURES ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

# With the directories, so that a deleted file counts as a change.
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -not -name '*.py[co]' -not -name __pycache__)
CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh')

.PHONY: help demo demo-torch demo-jax bench bench-gpu gpu docs test test-all test-jax-oldest lint format \
  sanitize wheel roofline emulator clean always
.DELETE_ON_ERROR:

help:  ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# --- what the targets stand on -----------------------------------------------------------------

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "fusedstep needs Python 3.11 or newer: make PYTHON=python3.x ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

# A dependency group of pyproject.toml is installed.
$(VENV)/group-%.stamp: pyproject.toml $(VENV)/pip.stamp
	@echo "# installing the packages of group '$*': the first time takes a while"
	$(PIP) install --quiet --group $*
	@touch $@

# The oldest JAX that is supported, in a folder of its own: a newer one stands in .venv. The build
# takes the headers of XLA's FFI from it.
OLDEST_JAX := build/jax-oldest
$(VENV)/jax-oldest.stamp: pyproject.toml $(VENV)/pip.stamp
	@echo "# installing the oldest supported JAX, whose headers are compiled against"
	$(PIP) install --quiet --no-deps --upgrade --target $(OLDEST_JAX) --group jax-oldest
	@touch $@

XLA_SETTINGS = --config-settings=cmake.define.FUSEDSTEP_XLA=ON \
  --config-settings=cmake.define.FUSEDSTEP_XLA_INCLUDE=$(CURDIR)/$(OLDEST_JAX)/jaxlib/include

# With CUDA=ON and no nvcc on this machine, that of PyPI. The stamp is rewritten when the choice changes.
NVCC := $(or $(CUDACXX),$(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA_CHOICE := $(FUSEDSTEP_CUDA) $(FUSEDSTEP_CUDA_ARCHITECTURES) $(NVCC)
CUDA_STAMPS := $(VENV)/cuda.stamp $(if $(filter ON,$(FUSEDSTEP_CUDA)),$(if $(NVCC),,$(VENV)/group-cuda.stamp))
$(VENV)/cuda.stamp: always $(VENV)/pip.stamp
	@echo '$(CUDA_CHOICE)' | cmp -s - $@ || echo '$(CUDA_CHOICE)' >$@

# $(1): the architectures, unless others are asked for
CUDA_SETTINGS = --config-settings=cmake.define.FUSEDSTEP_CUDA=$(FUSEDSTEP_CUDA) \
  '--config-settings=cmake.define.FUSEDSTEP_CUDA_ARCHITECTURES=$(or $(FUSEDSTEP_CUDA_ARCHITECTURES),$(1))'

# Without build isolation CMake keeps its build tree, so an edit compiles only what it changed.
$(VENV)/fusedstep.stamp: $(SOURCES) $(VENV)/group-build.stamp $(VENV)/jax-oldest.stamp $(CUDA_STAMPS)
	@echo "# building and installing fusedstep"
	$(PIP) install --quiet --no-build-isolation $(XLA_SETTINGS) $(call CUDA_SETTINGS,75) \
	  --config-settings=cmake.define.FUSEDSTEP_WERROR=$(FUSEDSTEP_WERROR) .
	@touch $@

# With kernels for all GPUs, which take minutes: not in the tree that has them for one.
WHEEL_TREE := $(if $(NVCC),--config-settings=build-dir=build/release)
$(VENV)/wheel.stamp: $(SOURCES) README.md LICENSE $(VENV)/group-build.stamp $(VENV)/group-wheel.stamp \
  $(VENV)/jax-oldest.stamp $(CUDA_STAMPS)
	rm -rf dist wheelhouse
	$(PIP) wheel --quiet --no-build-isolation $(XLA_SETTINGS) $(call CUDA_SETTINGS,release) $(WHEEL_TREE) \
	  --no-deps --wheel-dir dist .
	$(BIN)/auditwheel repair --wheel-dir wheelhouse dist/*.whl
	@touch $@

roofline: $(VENV)/group-build.stamp
	@mkdir -p build
	@$(BIN)/cmake -S . -B build/bench -G Ninja -DFUSEDSTEP_BENCH=ON -DFUSEDSTEP_PYTHON=OFF >build/bench.log
	@$(BIN)/cmake --build build/bench --target fusedstep_roofline >>build/bench.log || (cat build/bench.log; false)

# The CUDA sources, to be executed on the CPU by tests (tests/cuda/CMakeLists.txt).
EMULATOR := build/emulator
emulator: $(VENV)/group-build.stamp
	@mkdir -p build
	@$(BIN)/cmake -S . -B $(EMULATOR) -G Ninja -DFUSEDSTEP_CUDA_EMULATOR=ON -DFUSEDSTEP_PYTHON=OFF \
	  -DFUSEDSTEP_WERROR=$(FUSEDSTEP_WERROR) >build/emulator.log
	@$(BIN)/cmake --build $(EMULATOR) --target emulator >>build/emulator.log || (cat build/emulator.log; false)
test test-all: export FUSEDSTEP_EMULATOR = $(CURDIR)/$(EMULATOR)

# --- to use it ---------------------------------------------------------------------------------

demo: $(VENV)/fusedstep.stamp $(VENV)/group-demo.stamp  ## trains a small network on real data
	$(BIN)/python examples/digits.py

demo-torch: $(VENV)/fusedstep.stamp $(VENV)/group-demo-torch.stamp  ## trains a small transformer with torch.optim and with fusedstep.torch
	$(BIN)/python examples/char_transformer.py $(DEMO_ARGS)

demo-jax: $(VENV)/fusedstep.stamp $(VENV)/group-demo.stamp $(VENV)/group-frameworks.stamp  ## the same with JAX, beside optax
	$(BIN)/python examples/jax_digits.py

bench: $(VENV)/fusedstep.stamp $(VENV)/group-bench.stamp $(VENV)/wheel.stamp roofline  ## measures speed against peers and rooflines
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-gpu: $(VENV)/fusedstep.stamp $(VENV)/group-bench-gpu.stamp  ## the same on an NVIDIA GPU, with a check of the bits
	$(BIN)/python -m bench.gpu $(BENCH_ARGS)

gpu:  ## everything that needs an NVIDIA GPU: tests, sanitizers, bench-gpu (bench/run_gpu.sh)
	bench/run_gpu.sh

docs: $(VENV)/fusedstep.stamp $(VENV)/group-docs.stamp $(VENV)/group-test.stamp  ## builds the documentation, runs its examples
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	$(BIN)/python -m pytest tests/test_documents.py $(PYTEST_ARGS)
	@echo "# docs/_build/html/index.html"

# --- to change it ------------------------------------------------------------------------------

test: $(VENV)/fusedstep.stamp $(VENV)/group-test.stamp roofline emulator  ## runs the tests, leaving out those of missing frameworks
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The promise of pyproject.toml, kept: what a newer JAX cannot show, on the oldest one.
test-jax-oldest: WITH_OLDEST = PYTHONPATH=$(CURDIR)/$(OLDEST_JAX) $(BIN)/python
test-jax-oldest: $(VENV)/fusedstep.stamp $(VENV)/group-test.stamp $(VENV)/group-frameworks.stamp  ## runs tests on the oldest supported JAX
	$(WITH_OLDEST) -c 'import jax; from fusedstep.jax import runtime; assert jax.__version_info__ == runtime.OLDEST_JAX'
	$(WITH_OLDEST) -m pytest tests/test_jax_*.py $(PYTEST_ARGS)

FRAMEWORKS := $(VENV)/group-frameworks.stamp $(VENV)/group-bench.stamp
test-all: $(VENV)/fusedstep.stamp $(VENV)/group-test.stamp $(FRAMEWORKS) roofline emulator  ## runs all tests
	FUSEDSTEP_REQUIRE_FRAMEWORKS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/group-lint.stamp  ## checks style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/codespell

format: $(VENV)/group-lint.stamp  ## rewrites files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: sanitize-address sanitize-thread  ## runs the C++ checks under ASan+UBSan and under TSan

sanitize-address: FLAGS = address,undefined
sanitize-thread: FLAGS = thread
sanitize-%: $(VENV)/group-build.stamp
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DFUSEDSTEP_SANITIZE=$(FLAGS) -DFUSEDSTEP_CPP_TESTS=ON \
	  -DFUSEDSTEP_CUDA_EMULATOR=ON -DFUSEDSTEP_PYTHON=OFF -DFUSEDSTEP_WERROR=$(FUSEDSTEP_WERROR)
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure --no-tests=error

wheel: $(VENV)/wheel.stamp  ## makes a redistributable wheel and checks it in an empty environment
	$(PYTHON) -m venv --clear build/empty
	build/empty/bin/pip install --quiet --disable-pip-version-check wheelhouse/*.whl
	build/empty/bin/python tests/conformance_wheel.py
	@limit=2000000; $(PYTHON) -m zipfile --list wheelhouse/*.whl | grep -q /_cuda && limit=5000000; \
	  size=$$(stat -c %s wheelhouse/*.whl); ls wheelhouse/*.whl; echo "$$size bytes (limit $$limit)"; \
	  test "$$size" -le $$limit

clean:  ## removes everything that was made here
	rm -rf $(VENV) build dist wheelhouse docs/_build docs/generated demo.png demo-torch.png demo-jax.png \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
