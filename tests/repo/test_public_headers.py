"""Public headers stand alone and are the same for every consumer; only our names are exported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from _library import built_library, exported_symbols
from _sources import ROOT, all_files

INCLUDE = "cpp/include"
HEADERS = [name for name in all_files() if name.startswith(INCLUDE) and name.endswith(".h")]
C_HEADERS = [name for name in HEADERS if "/c_api" in name]
# What the language and the system say; anything else would be a flag of some build.
_PLATFORM_MACROS = {"_WIN32", "__cplusplus", "defined"}
_CONDITION = re.compile(r"^[ \t]*#[ \t]*(?:el)?if(?:n?def)?\b(.*)$", re.MULTILINE)


def _compiler(*names: str) -> str:
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    if found is None:
        pytest.skip(f"there is no compiler: none of {', '.join(filter(None, names))} is on PATH")
    return found


def compile_errors(header: Path, include: Path, language: str = "c++") -> str:
    """Return what the compiler says to a source that includes the header twice and nothing else."""
    if language == "c":
        command = [_compiler(os.environ.get("CC", ""), "gcc", "cc"), "-std=c11"]
    else:
        command = [_compiler(os.environ.get("CXX", ""), "g++", "c++"), "-std=c++20"]
    command += ["-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{include}"]
    source = f'#include "{header}"\n' * 2
    result = subprocess.run(
        [*command, "-x", language, "-"], input=source, capture_output=True, text=True, check=False
    )
    return result.stderr


def build_flags(text: str) -> list[str]:
    """Return the macros, other than the platform's, that a header's conditionals ask for."""
    words = [
        word for line in _CONDITION.findall(text) for word in re.findall(r"[A-Za-z_]\w*", line)
    ]
    return [word for word in words if word not in _PLATFORM_MACROS]


@pytest.mark.parametrize("name", HEADERS)
def test_header_compiles_alone(name):
    assert compile_errors(ROOT / name, ROOT / INCLUDE) == ""


@pytest.mark.parametrize("name", C_HEADERS)
def test_c_header_compiles_as_c11(name):
    assert compile_errors(ROOT / name, ROOT / INCLUDE, "c") == ""


@pytest.mark.parametrize(
    "text",
    [
        "inline std::string f() { return {}; }",
        "inline int twice() { return 1; }",
        '#pragma once\n#include "qlora_native/no_such_header.h"',
    ],
    ids=["lacks an include", "lacks a guard", "includes nothing"],
)
def test_a_header_that_does_not_stand_alone_is_found(tmp_path, text):
    header = tmp_path / "bad.h"
    header.write_text(text)
    assert compile_errors(header, ROOT / INCLUDE) != ""


@pytest.mark.parametrize("name", HEADERS)
def test_header_is_the_same_for_every_build(name):
    assert build_flags((ROOT / name).read_text()) == []


def test_a_build_flag_is_found():
    assert build_flags("#ifdef QLORA_NATIVE_WITH_CUDA\n#endif") == ["QLORA_NATIVE_WITH_CUDA"]
    assert build_flags("  # if defined(__CUDACC__) && !defined(NDEBUG)") == ["__CUDACC__", "NDEBUG"]


def test_the_umbrella_includes_every_cpp_header():
    umbrella = (ROOT / INCLUDE / "qlora_native/qlora_native.h").read_text()
    others = {name.removeprefix(f"{INCLUDE}/") for name in HEADERS if name not in C_HEADERS}
    others.remove("qlora_native/qlora_native.h")
    assert set(re.findall(r'#include "([^"]+)"', umbrella)) == others


# ---- Exported symbols ----

_OURS = re.compile(
    r"^(qn_\w+|(?:(?:typeinfo|typeinfo name|vtable|guard variable) for )?qlora_native::.*)$"
)


def foreign(symbols: list[str]) -> Iterator[str]:
    """Yield the symbols that are not of this library."""
    for symbol in symbols:
        if not _OURS.match(symbol):
            yield symbol


def test_only_our_symbols_are_exported():
    symbols = exported_symbols(built_library())
    assert list(foreign(symbols)) == []
    assert any(symbol.startswith("qlora_native::quantize_4bit(") for symbol in symbols)


def test_internals_are_not_exported():
    symbols = exported_symbols(built_library())
    assert [s for s in symbols if re.search(r"qlora_native::(cpu|cuda|detail)::", s)] == []


def test_a_foreign_symbol_is_found(tmp_path):
    source = tmp_path / "leak.cpp"
    source.write_text(
        "#include <string>\nnamespace qlora_native { int ours() { return 1; } }\n"
        "int leaked() { return 2; }\n"
    )
    library = tmp_path / "libleak.so"
    compiler = _compiler(os.environ.get("CXX", ""), "g++", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert list(foreign(exported_symbols(library))) == ["leaked()"]
