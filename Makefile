# Each target makes .venv, installs what it needs, builds, runs. `make gpu` alone uses the Python it finds.
# Options: CUDA=AUTO|ON|OFF, CUDA_ARCHITECTURES="90-real", PYTHON=python3.12, PYTEST_ARGS="-k lora",
# BENCH_ARGS="--device cpu --quick" (peers.py), BENCH_CPP_ARGS="--device cpu --min-time 0.1" (qn_bench)

SHELL := /bin/bash
PYTHON ?= python3
CUDA ?= AUTO
CUDA_ARCHITECTURES ?=
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# The long name of -C, which the pip of a fresh virtual environment of Python 3.10 does not know.
define_ := --config-settings=cmake.define
cmake_defines := $(define_).QLORA_NATIVE_CUDA=$(CUDA) \
  $(if $(CUDA_ARCHITECTURES),$(define_).QLORA_NATIVE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)")

.PHONY: help bootstrap build test test-matrix lint format sanitize tsan demo bench gpu docs wheel clean

help:
	@echo "make test    build and run every test that needs no GPU"
	@echo "make test-matrix  the tests of the integrations with the oldest and newest libraries that we declare"
	@echo "make demo    train a small model, quantize it, fine-tune it, compare"
	@echo "make gpu     build and test on this machine's GPU, write bench/results/<gpu>.json"
	@echo "make bench   measure, alone and beside bitsandbytes and dense bf16; redraw README's figures"
	@echo "make lint    formatting and static checks (make format repairs)"
	@echo "make sanitize  the C and C++ tests under ASan and UBSan"
	@echo "make tsan    the C ABI's tests, of concurrent calls too, under the thread sanitizer"
	@echo "make docs    the manual and the API reference, in build/docs"
	@echo "make wheel   an sdist and a wheel, in dist"

bootstrap:
	@PYTHON=$(PYTHON) tools/bootstrap.sh

# One tree for the extension, the library, the C++ tests and the benchmarks: nothing is compiled twice.
build: bootstrap
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e . --config-settings=build-dir=build/python \
	  $(define_).QLORA_NATIVE_BUILD_TESTS=ON $(define_).QLORA_NATIVE_BUILD_BENCHMARKS=ON \
	  $(cmake_defines)

test: build
	$(BIN)/ctest --test-dir build/python --output-on-failure -j 2
	$(BIN)/pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

# The integrations' libraries as pyproject.toml declares them, oldest and newest, and something in
# between. Each set lies beside the packages of .venv, which it shadows. Only transformers brings
# what it depends on: the others depend on torch, of which .venv has the one to test with.
MATRIX ?= \
  transformers==5.10.1,peft==0.21.0,accelerate==1.10.0,trl==1.0.0 \
  transformers==5.17.0,peft==0.21.1,accelerate==1.12.0,trl==1.8.0 \
  transformers==5.23.0,peft==0.21.2,accelerate==1.15.0,trl==1.16.0
test-matrix: build
	for set in $(MATRIX); do \
	  folder=build/matrix/$$set; others=$${set#*,}; \
	  if [ ! -d $$folder ]; then \
	    rm -rf $$folder.part; \
	    $(BIN)/pip install --quiet --target $$folder.part $${set%%,*} && \
	    $(BIN)/pip install --quiet --target $$folder.part --no-deps $${others//,/ } && \
	    mv $$folder.part $$folder || exit 1; \
	  fi; \
	  echo "== $$set"; \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest tests/python \
	    -k "test_hf or test_cli_quantize or test_embedding or test_experts" $(PYTEST_ARGS) || exit 1; \
	done

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.c' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: bootstrap
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.c' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

sanitize: bootstrap
	$(BIN)/cmake --preset asan-ubsan
	$(BIN)/cmake --build --preset asan-ubsan
	$(BIN)/ctest --preset asan-ubsan -j 2

tsan: bootstrap
	$(BIN)/cmake --preset tsan
	$(BIN)/cmake --build --preset tsan
	$(BIN)/ctest --preset tsan

demo: build
	$(BIN)/python examples/demo/demo.py

# qn_bench is not there without Google Benchmark. The records of peers.py go to bench/results, from
# which README's figures are made.
bench: build
	@mkdir -p build/results
	program=build/python/bench/qn_bench; \
	if [ -x $$program ]; then \
	  for command in quantize dequantize "matmul --direction forward,transposed" lora optimizer paged; do \
	    $$program $$command --json build/results/$${command%% *}.json $(BENCH_CPP_ARGS) || exit 1; \
	  done; \
	fi
	$(BIN)/python bench/python/peers.py --save $(BENCH_ARGS)
	$(BIN)/python bench/render.py

gpu:
	$(PYTHON) tools/gpu.py $(GPU_ARGS)

docs: build
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

# From the sdist, as on any other machine. The tag says what the wheel runs on: this machine's glibc
# or a newer one.
wheel: bootstrap
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist $(cmake_defines) .
	$(BIN)/python -m auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

clean:
	rm -rf build
