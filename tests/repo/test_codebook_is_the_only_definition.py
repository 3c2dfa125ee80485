"""Code values are written in codebook.h, and nowhere else but in tests that recompute them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping

import pytest

from _sources import CPP_SUFFIXES, ROOT, read_texts

CODEBOOK = "cpp/include/qlora_native/codebook.h"
_NUMBER = re.compile(r"(?<![\w.])(\d*\.\d+(?:[eE][-+]?\d+)?)")
_RELATIVE_DISTANCE = 2e-4


def _significant_digits(literal: str) -> int:
    mantissa = re.split("[eE]", literal)[0]
    return len(mantissa.replace(".", "").strip("0"))


def long_literals(text: str) -> Iterator[tuple[str, float]]:
    """Yield the float literals with four significant digits or more: no round number is one."""
    for literal in _NUMBER.findall(text):
        if _significant_digits(literal) >= 4:
            yield literal, float(literal)


def code_values() -> list[float]:
    """Return the values that codebook.h writes, ascending."""
    return sorted({value for _, value in long_literals((ROOT / CODEBOOK).read_text())})


def violations(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence per code value in the files {name: text}."""
    values = code_values()
    for name, text in texts.items():
        for literal, value in long_literals(text):
            place = bisect.bisect_left(values, value * (1 - _RELATIVE_DISTANCE))
            if place < len(values) and values[place] <= value * (1 + _RELATIVE_DISTANCE):
                yield f"{name} holds {literal}, a code value of codebook.h"


def test_no_other_source_holds_a_code_value():
    folders = ("cpp/", "cuda/", "python/", "bench/", "examples/", "tools/")
    texts = read_texts((*CPP_SUFFIXES, ".py", ".pyi", ".in"), folders)
    assert CODEBOOK in texts
    texts.pop(CODEBOOK)
    assert list(violations(texts)) == []


@pytest.mark.parametrize(
    "literal",
    [
        "-0.6961928009986877",
        "0.07958f",
        "0.33791524171829224",
        "0.0052083333",
        "0.2916667",
        "1.28125e-3",
    ],
)
def test_a_copied_code_value_is_found(literal):
    assert list(violations({"cuda/gemv.cu": f"constexpr float x = {literal};"}))


def test_ordinary_numbers_are_not_found():
    text = "x = 0.5 + 1.0 + 0.0001 + 3.14159 * 65536.0 - 0.25f + 1e-5 + 0.69314718"
    assert list(violations({"a.py": text})) == []
