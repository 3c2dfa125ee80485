#!/usr/bin/env bash
# Makes .venv with everything that development needs, once for each state of pyproject.toml, and
# GTest, Google Benchmark and Doxygen from Debian's packages when run as root.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
stamp=.venv/.installed-$(cksum <pyproject.toml | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  if ! "$python" -m venv .venv; then
    echo "could not make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv python3-dev" >&2
    exit 1
  fi
  # pip before 25.1 cannot install a dependency group.
  .venv/bin/pip install --quiet --upgrade 'pip>=25.1'
  .venv/bin/pip install --quiet --group dev
  touch "$stamp"
fi

have_header() { echo "#include <$1>" | ${CXX:-g++} -E -x c++ - >/dev/null 2>&1; }
if ! have_header gtest/gtest.h || ! have_header benchmark/benchmark.h || ! command -v doxygen >/dev/null; then
  install_line="apt-get install -y libgtest-dev libbenchmark-dev doxygen"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && $install_line -qq; } >/dev/null 2>&1 ||
      echo "C++ tests, benchmarks or the manual are left out; to have them: $install_line"
  else
    echo "C++ tests, benchmarks or the manual are left out; to have them: sudo $install_line"
  fi
fi
