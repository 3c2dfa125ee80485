"""Kernels that start before the previous one has ended read nothing by ways that may be early."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from _sources import read_texts

_WAITS = re.compile(r"\bwait_for_previous_kernel\(\);")
_LETS_THE_NEXT_START = re.compile(r"\ballow_next_kernel\(\);")
_EARLY = re.compile(
    r"\b__ldg\(|\bload_streaming\(|\bload8<|ld\.global\.nc|\bScaleReader<kDoubleQuant>"
)


def early_loads(texts: Mapping[str, str]) -> list[str]:
    """Return "file: load" for loads that the compiler may move across the wait."""
    return [
        f"{name}: {match.group()}"
        for name, text in sorted(texts.items())
        if _WAITS.search(text)
        for match in _EARLY.finditer(text)
    ]


def test_overlapping_kernels_load_behind_the_wait():
    texts = read_texts((".cu", ".cuh"))
    waiting = {name for name, text in texts.items() if _WAITS.search(text)}
    assert {"cuda/dequantize.cu", "cuda/gemm/gemm_mma.cuh", "cuda/gemv/gemv_mma.cuh"} <= waiting
    assert early_loads(texts) == []


def test_kernels_that_let_the_next_one_start_wait_themselves():
    """The next one's wait is for this one only, and for what this one has waited for."""
    texts = read_texts((".cu", ".cuh"))
    allowing = {name for name, text in texts.items() if _LETS_THE_NEXT_START.search(text)}
    assert len(allowing) >= 3
    assert [name for name in sorted(allowing) if not _WAITS.search(texts[name])] == []


@pytest.mark.parametrize(
    "load", ["__ldg(p.x)", "load_streaming(p.codes)", "const ScaleReader<kDoubleQuant> scales(p);"]
)
def test_an_early_load_is_found(load):
    source = {"cuda/a.cu": f"void f() {{ wait_for_previous_kernel();\n {load} }}"}
    assert len(early_loads(source)) == 1
    assert early_loads({"cuda/a.cu": load}) == []
