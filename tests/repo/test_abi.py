"""The C ABI is what is written down: its symbols, its functions in the header, its version."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from _library import built_library, exported_symbols
from _sources import ROOT

HEADER = ROOT / "cpp/include/qlora_native/c_api.h"
HEADERS = sorted(HEADER.parent.glob("c_api*.h"))
SYMBOLS = ROOT / "tests/repo/abi_symbols.txt"
_DECLARATION = re.compile(r"^QN_API [^;]*?\b(qn_\w+)\(", re.MULTILINE)
_CAN_FAIL = re.compile(r"^QN_API qn_status (qn_\w+)\(", re.MULTILINE)
_REFUSAL = re.compile(r"\bCHECK_REFUSED\(\s*(qn_\w+)\(")
# Functions that return a status, but take nothing that could be wrong.
TAKES_ANYTHING = {"qn_set_cpu_executor": "every address is a function, as far as C knows"}


def listed_symbols(text: str) -> list[str]:
    """Return the symbols of the list, which has comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def declared_functions(header: str) -> list[str]:
    """Return the functions that the C header declares."""
    return _DECLARATION.findall(header)


def differences(listed: Collection[str], actual: Collection[str], where: str) -> Iterator[str]:
    """Yield a sentence per symbol that only one of the two has."""
    for symbol in sorted(set(listed) - set(actual)):
        yield f"{symbol} is listed, but not {where}: removing a function breaks the ABI"
    for symbol in sorted(set(actual) - set(listed)):
        yield f"{symbol} is {where}, but not listed in {SYMBOLS.name}: add it"


def c_symbols(symbols: Collection[str]) -> list[str]:
    """Return those of a library's symbols that are the C ABI's."""
    return [symbol for symbol in symbols if symbol.startswith("qn_")]


def test_the_library_exports_the_listed_symbols():
    actual = c_symbols(exported_symbols(built_library()))
    assert list(differences(listed_symbols(SYMBOLS.read_text()), actual, "exported")) == []


def test_the_header_declares_the_listed_symbols():
    actual = [name for header in HEADERS for name in declared_functions(header.read_text())]
    assert list(differences(listed_symbols(SYMBOLS.read_text()), actual, "declared")) == []


def test_the_list_is_sorted_and_without_repetitions():
    listed = listed_symbols(SYMBOLS.read_text())
    assert listed == sorted(set(listed))


def test_a_missing_and_an_unlisted_symbol_are_found():
    actual = c_symbols(exported_symbols(built_library()))
    assert actual
    missing = list(differences([*actual, "qn_removed"], actual, "exported"))
    assert [sentence.split()[0] for sentence in missing] == ["qn_removed"]
    unlisted = list(differences(actual[1:], actual, "exported"))
    assert [sentence.split()[0] for sentence in unlisted] == [actual[0]]


def test_declarations_are_found():
    header = "QN_API const char* qn_a(void);\nQN_API qn_status qn_b(int x,\n    int y);\n"
    assert declared_functions(header + "typedef void (*qn_c)(int);\n") == ["qn_a", "qn_b"]


def without_refusals(headers: Iterable[str], tests: Iterable[str]) -> list[str]:
    """Return the functions that can fail and that no C test calls with a wrong argument."""
    can_fail = {name for header in headers for name in _CAN_FAIL.findall(header)}
    refusing = {name for test in tests for name in _REFUSAL.findall(test)}
    return sorted(can_fail - refusing - set(TAKES_ANYTHING))


def test_every_function_is_called_with_a_wrong_argument():
    headers = [header.read_text() for header in HEADERS]
    tests = [test.read_text() for test in sorted((ROOT / "tests/c_abi").glob("*.c"))]
    assert without_refusals(headers, tests) == []
    assert set(TAKES_ANYTHING) <= {name for text in headers for name in _CAN_FAIL.findall(text)}


def test_a_function_without_a_wrong_argument_is_found():
    header = "QN_API qn_status qn_a(int x);\nQN_API qn_status qn_b(int x,\n    int y);\n"
    header += "QN_API const char* qn_c(int x);\n"
    tests = ['CHECK_OK(qn_b(1, 2)); CHECK_REFUSED(\n  qn_a(-1), "-1");']
    assert without_refusals([header], tests) == ["qn_b"]


def abi_versions(header: str, version_header: str) -> tuple[int, int]:
    """Return the version that c_api.h states and that of the SONAME, the version's major number."""
    stated = re.search(r"#define QN_ABI_VERSION (\d+)", header)
    major = re.search(r'kVersion = "(\d+)\.', version_header)
    assert stated and major
    return int(stated[1]), int(major[1])


def test_the_abi_version_is_that_of_the_soname():
    version = (ROOT / "cpp/include/qlora_native/version.h").read_text()
    stated, major = abi_versions(HEADER.read_text(), version)
    assert stated == major
    assert "SOVERSION ${PROJECT_VERSION_MAJOR}" in (ROOT / "cmake/QnCore.cmake").read_text()


def test_a_wrong_abi_version_is_found():
    stated, major = abi_versions("#define QN_ABI_VERSION 1", 'kVersion = "2.0.0"')
    assert stated != major
