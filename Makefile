# Each target makes .venv, installs what it needs, builds, runs. `make gpu` alone uses the Python it finds.
# Options: CUDA=AUTO|ON|OFF, CUDA_ARCHITECTURES="90-real", PYTHON=python3.12, PYTEST_ARGS="-k lora"

SHELL := /bin/bash
PYTHON ?= python3
CUDA ?= AUTO
CUDA_ARCHITECTURES ?=
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

cmake_defines := -Ccmake.define.QLORA_NATIVE_CUDA=$(CUDA) \
  $(if $(CUDA_ARCHITECTURES),-Ccmake.define.QLORA_NATIVE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)")

.PHONY: help bootstrap build test lint format sanitize demo bench gpu clean

help:
	@echo "make test    build and run every test that needs no GPU"
	@echo "make demo    train a small model, quantize it, fine-tune it, compare"
	@echo "make gpu     build and test on this machine's GPU, write bench/results/<gpu>.json"
	@echo "make bench   measure beside bitsandbytes and dense bf16"
	@echo "make lint    formatting and static checks (make format repairs)"
	@echo "make sanitize  the C++ tests under ASan and UBSan"

bootstrap:
	@PYTHON=$(PYTHON) tools/bootstrap.sh

# One tree for the extension, the library, the C++ tests and the benchmarks: nothing is compiled twice.
build: bootstrap
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e . -Cbuild-dir=build/python \
	  -Ccmake.define.QLORA_NATIVE_BUILD_TESTS=ON -Ccmake.define.QLORA_NATIVE_BUILD_BENCHMARKS=ON \
	  $(cmake_defines)

test: build
	$(BIN)/ctest --test-dir build/python --output-on-failure -j 2
	$(BIN)/pytest $(PYTEST_ARGS)

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: bootstrap
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

sanitize: bootstrap
	$(BIN)/cmake --preset asan-ubsan
	$(BIN)/cmake --build --preset asan-ubsan
	$(BIN)/ctest --preset asan-ubsan -j 2

demo: build
	$(BIN)/python examples/demo/demo.py

bench: build
	$(BIN)/python bench/python/peers.py

gpu:
	$(PYTHON) tools/gpu.py $(GPU_ARGS)

clean:
	rm -rf build
