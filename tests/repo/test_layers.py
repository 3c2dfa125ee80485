"""A file includes or imports only what is further left, and backends are twins."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath

import pytest

import _cpp_layers
import _python_layers
from _sources import CPP_SUFFIXES, all_files, read_texts

# Sources of one backend that have no twin by name in the other, and why.
WITHOUT_TWIN = {
    "cpu_features": "which instructions a CPU has; the GPU's counterpart is cuda/host/device_info",
    "parallel": "the thread pool; a GPU has its own",
    "matmul": "the CUDA matmul is in two folders, gemv and gemm",
}
_VARIANT = re.compile(r"_(scalar|avx2|avx512|amx|simt|sm80|sm90|sm90a)$")


def missing_twins(names: Collection[str]) -> list[str]:
    """Return the stems of CPU sources without a CUDA source of the same stem."""

    def stems(folder: str) -> set[str]:
        paths = [PurePosixPath(name) for name in names if name.startswith(folder)]
        return {_VARIANT.sub("", path.stem) for path in paths if path.suffix in (".cpp", ".cu")}

    return sorted(stems("cpp/src/cpu/") - stems("cuda/") - set(WITHOUT_TWIN))


def test_cpp_files_include_only_from_the_left():
    assert list(_cpp_layers.violations(read_texts(CPP_SUFFIXES))) == []


BASE = {
    "cpp/include/qlora_native/dtype.h": "",
    "cpp/include/qlora_native/c_api.h": "",
    "cpp/src/backend.h": "",
    "cpp/src/validate.h": "",
    "cpp/src/c_api_guard.h": "",
    "cpp/src/cpu/gemm.h": "",
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "cpp/include/qlora_native/views.h",
            '#include "../../src/backend.h"\n#include "backend.h"',
        ),
        ("cuda/gemm/gemm.cu", '#include "cpu/gemm.h"'),
        ("cuda/device/decode.cuh", '#include "backend.h"'),
        ("cpp/src/matmul.cpp", '#include "cpu/gemm.h"'),
        ("cpp/src/c_api_queries.cpp", '#include "backend.h"'),
        ("cpp/src/matmul.cpp", '#include "c_api_guard.h"'),
        ("cpp/src/validate.cpp", '#include "qlora_native/c_api.h"'),
        ("tests/c_abi/main.c", '#include "validate.h"'),
        ("cpp/bindings/module.cpp", '#include "backend.h"'),
        ("bench/bench.cpp", '  #  include "backend.h"'),
        ("cpp/src/cpu/gemm.cpp", "#include <cuda_runtime.h>"),
        ("cpp/include/qlora_native/views.h", "#include <torch/torch.h>"),
        ("cpp/src/registry.cpp", "#include <Python.h>"),
        ("cpp/src/registry.cpp", '#include "nowhere.h"'),
        ("somewhere/else.cpp", ""),
    ],
)
def test_a_wrong_include_is_found(name, text):
    assert list(_cpp_layers.violations({**BASE, name: text}))


def test_a_right_include_is_not_found():
    texts = {
        **BASE,
        "cpp/src/cpu/gemm.cpp": '#include "cpu/gemm.h"\n#include "backend.h"',
        "cpp/src/c_api_queries.cpp": '#include "qlora_native/c_api.h"\n#include "validate.h"',
        "tests/c_abi/main.c": '#include "qlora_native/c_api.h"',
    }
    assert list(_cpp_layers.violations(texts)) == []


def test_every_cpu_source_has_a_cuda_twin():
    assert missing_twins(all_files()) == []


def test_the_list_of_sources_without_a_twin_is_current():
    stems = {PurePosixPath(name).stem for name in all_files() if name.startswith("cpp/src/cpu/")}
    assert set(WITHOUT_TWIN) <= stems


def test_a_missing_twin_is_found():
    names = [
        "cpp/src/cpu/optimizer_avx2.cpp",
        "cpp/src/cpu/gemv_avx512.cpp",
        "cuda/gemv/gemv_simt.cu",
    ]
    assert missing_twins(names) == ["optimizer"]


def test_python_modules_import_only_from_the_left():
    texts = read_texts((".py",), ("python/qlora_native/",))
    assert list(_python_layers.violations(texts)) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("_checks", "from qlora_native import functional"),
        ("_checks", "from qlora_native.functional import linear_4bit"),
        ("functional", "import qlora_native as qn"),
        ("functional", "from qlora_native import quantize_4bit"),
        ("nn/linear", "from ..convert import quantize_model"),
        ("nn/linear", "def f():\n    from qlora_native.hf import load"),
        ("functional", "import torch.library"),
        ("stray", "import math"),
        ("hf/load", "from qlora_native.cli.options import Options"),
    ],
)
def test_a_wrong_import_is_found(module, text):
    assert list(_python_layers.violations({f"python/qlora_native/{module}.py": text}))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("functional", "from qlora_native import _checks, _library"),
        ("nn/__init__", "from .linear import Linear4bit"),
        ("nn/linear", "from ..functional import linear_4bit"),
        ("cli/doctor", "import qlora_native as qn"),
        ("__init__", "from qlora_native.convert import quantize_model"),
    ],
)
def test_a_right_import_is_not_found(module, text):
    assert list(_python_layers.violations({f"python/qlora_native/{module}.py": text})) == []
