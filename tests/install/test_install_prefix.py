"""What lies in the prefix: names, versions, symbols, no path of the machine that built it."""

from __future__ import annotations

import re

import pytest

from _prefix import ABI, LIBRARIES, LIMIT_S, ROOT, VERSION, build_project, need, run

pytestmark = pytest.mark.timeout(LIMIT_S)

_VECTOR_KERNEL = re.compile(r"_(avx2|avx512|amx)\.cpp\.o:$")
# Of a symbol: its address, its kind (upper case: others see it) and its name.
_SYMBOL = re.compile(r"^[0-9a-f]+ (?P<kind>\w) (?P<name>.+)$")
_OURS = re.compile(r"(qlora_native::|^qn_|^DW\.ref\.)")


def listed_functions() -> list[str]:
    lines = (ROOT / "tests/repo/abi_symbols.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def members(archive_listing: str) -> dict[str, list[tuple[str, str]]]:
    """Return the defined symbols of each member of an archive, as nm prints them: kind and name."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in archive_listing.splitlines():
        symbol = _SYMBOL.match(line)
        if symbol:
            current.append((symbol["kind"], symbol["name"]))
        elif line.endswith(".o:"):
            current = found.setdefault(line.removesuffix(":"), [])
    return found


def shared_functions(symbols: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Return functions of vector kernels of which the linker may keep the copy for everybody."""
    return [
        f"{member}: {name}"
        for member, defined in symbols.items()
        if _VECTOR_KERNEL.search(f"{member}:")
        for kind, name in defined
        # Data may be shared (kind u and V); code that needs a newer processor may not.
        if kind == "W"
    ]


def foreign(symbols: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Return what could clash with a program's own: definitions that are neither weak nor ours."""
    return [
        f"{member}: {name}"
        for member, defined in symbols.items()
        for kind, name in defined
        if kind in "ABCDGRST" and not _OURS.search(name)
    ]


@pytest.fixture(scope="module")
def archive(prefix):
    need("nm")
    command = ("nm", "--demangle", "--defined-only", prefix / "lib" / "libqlora_native.a")
    return members(run(*command))


def test_the_shared_library_is_versioned(prefix):
    need("readelf")
    library = prefix / "lib" / "libqlora_native.so"
    header = (ROOT / "cpp/include/qlora_native/c_api.h").read_text()
    assert f"#define QN_ABI_VERSION {ABI}\n" in header
    assert f"Library soname: [libqlora_native.so.{ABI}]" in run("readelf", "-d", library)
    assert library.is_symlink()
    assert library.resolve().name == f"libqlora_native.so.{VERSION}"


def test_both_libraries_have_the_functions_of_the_c_abi(prefix, archive):
    exported = run("nm", "-D", "--defined-only", prefix / "lib" / "libqlora_native.so")
    in_shared = {line.split()[-1] for line in exported.splitlines()}
    in_static = {name for defined in archive.values() for kind, name in defined if kind == "T"}
    for found in (in_shared, in_static):
        assert sorted(name for name in found if name.startswith("qn_")) == listed_functions()


def test_the_static_library_defines_nothing_that_could_clash(archive):
    assert foreign(archive) == []


def test_vector_kernels_define_no_function_that_others_could_get(archive):
    assert len([member for member in archive if _VECTOR_KERNEL.search(f"{member}:")]) >= 2
    assert shared_functions(archive) == []


def test_breaches_are_found():
    listing = """
gemm_amx.cpp.o:
0000000000000000 W std::string::append(char const*)
0000000000000000 u qlora_native::kMap
0000000000000000 T qlora_native::cpu::gemm_amx(int)

version.cpp.o:
0000000000000000 W std::string::append(char const*)
0000000000000010 T helper(int)
0000000000000020 t local(int)
"""
    (found,) = shared_functions(members(listing))
    assert found == "gemm_amx.cpp.o: std::string::append(char const*)"
    assert foreign(members(listing)) == ["version.cpp.o: helper(int)"]


def test_every_public_header_is_installed(prefix):
    source = ROOT / "cpp" / "include"
    expected = sorted(path.relative_to(source) for path in source.rglob("*.h"))
    actual = sorted(path.relative_to(prefix / "include") for path in prefix.rglob("*.h"))
    assert actual == expected


def test_no_file_says_where_it_was_built_or_installed(core, prefix):
    places = [str(ROOT), str(core), str(prefix.parent)]
    named = [
        f"{path.relative_to(prefix)}: {place}"
        for path in prefix.rglob("*")
        if path.is_file()
        for place in places
        if place.encode() in path.read_bytes()
    ]
    assert named == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_c_abi_works_from_the_prefix(prefix, tmp_path, library):
    need("gcc", "cmake", "ctest")
    options = (f"-DCMAKE_PREFIX_PATH={prefix}", f"-DQLORA_NATIVE_COMPONENT={library}")
    build_project(ROOT / "tests" / "c_abi", tmp_path, *options)
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path)
