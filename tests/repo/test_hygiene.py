"""Sizes, paths, hosts, swallowed errors and prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

import pytest

from _sources import CPP_SUFFIXES, read_texts

MAX_LINES = 400
_SOURCES = (".h", ".c", ".cpp", ".cu", ".cuh", ".py", ".cmake", ".sh", "CMakeLists.txt", "Makefile")

# Files that may be longer, and why.
LONGER: dict[str, str] = {}

# Written in parts, so that this file is not a finding of its own.
_MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:" + "|".join(("work", "root", "home")) + r")/\w")
_REGISTRIES = (
    "pypi" + ".org", "python" + "hosted.org", "download." + "pytorch.org", "registry." + "npmjs",
    "ana" + "conda.org", "docker" + ".io", "ghcr" + ".io", "quay" + ".io", "proxy." + "golang.org",
    "arti" + "factory", "deb." + "debian.org", "archive." + "ubuntu.com",
)  # fmt: skip


def too_long(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield the sources with more lines than a file with one reason to change needs."""
    for name, text in texts.items():
        lines = text.count("\n")
        if name.endswith(_SOURCES) and lines > MAX_LINES and name not in LONGER:
            yield f"{name} has {lines} lines, more than {MAX_LINES}"


def machine_paths(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines that hold a path of somebody's machine."""
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if _MACHINE_PATH.search(line):
                yield f"{name}:{number}: {line.strip()}"


def registry_hosts(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines that name where packages come from: each machine has its own."""
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if any(host in line for host in _REGISTRIES):
                yield f"{name}:{number}: {line.strip()}"


def _is_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and statement.value.value is Ellipsis
    )


def swallowed_errors(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield the handlers that do nothing about the exception they catch."""
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and all(map(_is_nothing, node.body)):
                yield f"{name}:{node.lineno}: an exception is swallowed"


def prints(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield the calls of print."""
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            ):
                yield f"{name}:{node.lineno}: the library prints"


def cpp_output(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the core that print or end the process."""
    pattern = re.compile(
        r"\b(?:std::(?:cout|cerr|clog|abort|exit|terminate)|(?:f?printf|puts|abort|exit)\s*\()"
    )
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line.split("//")[0]):
                yield f"{name}:{number}: {line.strip()}"


def _library_modules() -> dict[str, str]:
    texts = read_texts((".py",), ("python/qlora_native/",))
    return {name: text for name, text in texts.items() if "/cli/" not in name}


def test_files_are_short():
    assert list(too_long(read_texts())) == []


def test_the_list_of_longer_files_is_current():
    texts = read_texts()
    assert [name for name in LONGER if texts.get(name, "").count("\n") <= MAX_LINES] == []


def test_no_file_holds_a_path_of_a_machine():
    assert list(machine_paths(read_texts())) == []


def test_no_file_names_a_registry():
    assert list(registry_hosts(read_texts())) == []


def test_no_handler_swallows_an_exception():
    assert list(swallowed_errors(read_texts((".py",)))) == []


def test_the_library_does_not_print():
    modules = _library_modules()
    assert "python/qlora_native/functional.py" in modules
    assert list(prints(modules)) == []


def test_the_core_does_not_print_or_exit():
    sources = read_texts(CPP_SUFFIXES, ("cpp/include/", "cpp/src/", "cuda/"))
    assert "cpp/src/quantize.cpp" in sources
    assert list(cpp_output(sources)) == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (too_long, "cuda/gemm.cu", "\n" * (MAX_LINES + 1)),
        (machine_paths, "README.md", "cd /" + "home/someone/qlora"),
        (machine_paths, "a.cmake", 'set(x "/' + 'work/main")'),
        (registry_hosts, "Makefile", "pip install -i https://" + "pypi" + ".org/simple torch"),
        (swallowed_errors, "a.py", "try:\n    f()\nexcept OSError:\n    pass"),
        (swallowed_errors, "a.py", "try:\n    f()\nexcept:\n    ..."),
        (prints, "a.py", "def f():\n    print('x')"),
        (cpp_output, "a.cpp", '  std::cerr << "x";'),
        (cpp_output, "a.cu", '  if (bad) printf("x");'),
        (cpp_output, "a.cpp", "  exit(1);"),
    ],
)
def test_a_breach_is_found(rule, name, text):
    assert len(list(rule({name: text}))) == 1


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (too_long, "README.md", "\n" * (MAX_LINES + 1)),
        (machine_paths, "a.md", "see /usr/local/cuda, build/work/x and $HOME/work/x"),
        (swallowed_errors, "a.py", "try:\n    f()\nexcept OSError:\n    found = None"),
        (prints, "a.py", "# print(x)\nreport.print()"),
        (cpp_output, "a.cpp", "snprintf(text, 3, x);  // never printf( here"),
    ],
)
def test_what_is_allowed_is_not_found(rule, name, text):
    assert list(rule({name: text})) == []
