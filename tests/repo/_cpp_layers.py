"""Which C++ file may include which: the layers of the core, from left to right."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import NamedTuple

PUBLIC = "cpp/include/qlora_native/"


class Layer(NamedTuple):
    """Files that may include each other and the files of layers further left."""

    name: str
    patterns: tuple[str, ...]
    """Globs; files that match one after a "!" are not of the layer."""
    not_from: tuple[str, ...] = ()
    """Layers further left that are out of bounds all the same."""


def _public(*stems: str) -> tuple[str, ...]:
    return tuple(f"{PUBLIC}{stem}.h" for stem in stems)


# The first layer with a matching pattern owns a file.
LAYERS = (
    Layer("base", _public("export", "dtype", "stream", "device", "error", "version", "json")),
    Layer("formats", _public("codebook", "views", "quantized", "safetensors", "quantized_matrix")),
    Layer(
        "operations",
        (
            *_public("quantize", "dequantize", "matmul", "grouped_matmul", "optimizer", "memory"),
            *_public("paged_optimizer", "dropout", "lora"),
        ),
    ),
    Layer("kernels", _public("kernels")),
    Layer("umbrella", _public("qlora_native")),
    Layer(
        "c_abi",
        (
            *_public("c_api", "c_api_grouped", "c_api_lora", "c_api_memory", "c_api_optimizer"),
            *_public("c_api_paged_optimizer"),
        ),
    ),
    Layer(
        "backend",
        (
            "cpp/src/kernel_table.h",
            "cpp/src/backend.h",
            "cpp/src/dropout_mask.h",
            "cpp/src/nearest_code.h",
            "cpp/src/optimizer_math.h",
            "cpp/src/paged_driver.h",
            "cpp/src/philox.h",
        ),
        not_from=("umbrella", "c_abi"),
    ),
    Layer("cpu", ("cpp/src/cpu/*",), not_from=("umbrella", "c_abi")),
    Layer("no_cuda", ("cpp/src/no_cuda/*",), not_from=("umbrella", "c_abi", "cpu")),
    Layer(
        "cuda_device",
        ("cuda/device/*",),
        not_from=("operations", "kernels", "umbrella", "c_abi", "backend", "cpu", "no_cuda"),
    ),
    Layer("cuda", ("cuda/*",), not_from=("umbrella", "c_abi", "cpu", "no_cuda")),
    Layer(
        "dispatch",
        ("cpp/src/*.h", "cpp/src/*.cpp", "!cpp/src/c_api_*"),
        not_from=("umbrella", "c_abi", "cpu", "no_cuda", "cuda_device", "cuda"),
    ),
    Layer(
        "c_abi_sources",
        ("cpp/src/c_api_*",),
        not_from=("umbrella", "backend", "cpu", "no_cuda", "cuda_device", "cuda"),
    ),
    Layer(
        "clients",
        ("cpp/bindings/*", "bench/*", "examples/*", "tests/install/*", "tests/c_abi/*"),
        not_from=(
            "backend",
            "cpu",
            "no_cuda",
            "cuda_device",
            "cuda",
            "dispatch",
            "c_abi_sources",
        ),
    ),
    Layer("tests", ("tests/*",)),
)

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
_ROOTS = ("cpp/include", "cpp/src", "cuda", "tests/cpp", "bench", "cpp/bindings")

# Headers of others, and the layers that may see them.
_FOREIGN = {
    "CUDA": (re.compile(r"^(cuda|cooperative_groups|cub/|thrust/|cublas|mma\.h)"),
             ("cuda", "cuda_device", "clients", "tests")),
    "Python": (re.compile(r"^(Python\.h|nanobind/|pybind11/)"), ("clients",)),
    "torch": (re.compile(r"^(torch/|ATen/|c10/)"), ()),
    "GoogleTest": (re.compile(r"^(gtest|gmock)/"), ("tests",)),
    "Google Benchmark": (re.compile(r"^benchmark/"), ("clients",)),
}  # fmt: skip


def layer_of(name: str) -> Layer | None:
    """Return the layer that owns a file."""
    for layer in LAYERS:
        without = (pattern[1:] for pattern in layer.patterns if pattern.startswith("!"))
        if any(fnmatch(name, pattern) for pattern in without):
            continue
        if any(fnmatch(name, pattern) for pattern in layer.patterns):
            return layer
    return None


def _resolve(includer: str, target: str, files: Collection[str]) -> str | None:
    beside = str(PurePosixPath(includer).parent / target)
    return next(
        (path for path in (beside, *(f"{root}/{target}" for root in _ROOTS)) if path in files), None
    )


def violations(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence per include that goes the wrong way, in the files {name: text}."""
    order = {layer.name: place for place, layer in enumerate(LAYERS)}
    for name, text in texts.items():
        layer = layer_of(name)
        if layer is None:
            yield f"{name} belongs to no layer"
            continue
        for bracket, target in _INCLUDE.findall(text):
            for owner, (pattern, allowed) in _FOREIGN.items():
                if pattern.match(target) and layer.name not in allowed:
                    yield f"{name} ({layer.name}) includes {target}, a header of {owner}"
            if bracket == "<":
                continue
            found = _resolve(name, target, texts)
            if found is None:
                yield f'{name} includes "{target}", which is no file of the project'
                continue
            included = layer_of(found)
            if included is None:
                continue
            if order[included.name] > order[layer.name] or included.name in layer.not_from:
                yield f"{name} ({layer.name}) includes {found} ({included.name})"
