# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first, and are quick when that is done.
#   make demo FINECF_CUDA=0     without the CUDA kernels          make demo PYTHON=python3.12     with another Python
PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
GPU_ARGS ?=
CMAKE_ARGS ?=
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export VENV FINECF_CUDA FINECF_CUDA_ARCHS FINECF_BUILD
BIN := $(VENV)/bin

.PHONY: demo test test-slow gpu-check lint format cmake setup clean

demo: setup
	$(BIN)/finecf demo $(DEMO_ARGS)

test: setup
	$(BIN)/python scripts/run_tests.py $(TEST_ARGS)

test-slow: setup
	$(BIN)/python -m pytest -q -m slow -n 2 $(TEST_ARGS) || [ $$? -eq 5 ] # 5: no test is marked slow

# On a machine with a GPU, with the running interpreter and what is installed there: docs/gpu.md.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(GPU_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# The build as CMake users would run it, apart from setup.py.
cmake: setup
	$(BIN)/cmake -S . -B build/standalone -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DFINECF_PYTHON=$(abspath $(BIN))/python -DFINECF_CUDA=$(or $(FINECF_CUDA),auto) $(CMAKE_ARGS)
	$(BIN)/cmake --build build/standalone --parallel 2

setup:
	@$(PYTHON) scripts/bootstrap.py

clean:
	rm -rf build dist *.egg-info finecf/*.so _finecf_emulated*.so $(VENV)/finecf-setup.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
