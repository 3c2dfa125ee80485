"""find_package: its components, what it says when one is missing, and the targets it makes."""

from __future__ import annotations

import re

import pytest

from _prefix import (
    ABI,
    LIBRARIES,
    LIMIT_S,
    VERSION,
    attempt,
    build_project,
    configure,
    environment,
    linked_libraries,
    need,
    run,
)

pytestmark = pytest.mark.timeout(LIMIT_S)

MAJOR, MINOR, _ = VERSION.split(".")
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES {languages})
find_package(qlora_native {arguments})
if(qlora_native_FOUND)
  get_target_property(target qlora_native::qlora_native ALIASED_TARGET)
  message(STATUS "target=${{target}} cuda=${{qlora_native_cuda_FOUND}} "
                 "abi=${{qlora_native_ABI_VERSION}} version=${{qlora_native_VERSION}}")
  add_executable(consumer consumer.{suffix})
  target_link_libraries(consumer PRIVATE qlora_native::qlora_native)
else()
  message(STATUS "not found: ${{qlora_native_NOT_FOUND_MESSAGE}}")
endif()
"""
# Uses what a static library pulls in: exceptions, threads, the standard library.
PROGRAM = """
#include <qlora_native/c_api.h>
#include <string.h>
int main(void) {
  int64_t count = 0;
  qn_status status = qn_kernel_count(&count);
  if (status != QN_OK || count < 6) return 1;
  status = qn_force_kernel(QN_MATMUL_4BIT, QN_CPU, "no such kernel");
  return status == QN_INVALID_ARGUMENT && strstr(qn_last_error_message(), "scalar") ? 0 : 2;
}
"""


@pytest.fixture
def consumer(tmp_path, prefix):
    """Return a function that writes a project and gives its configuring."""

    def write(arguments: str, languages: str = "CXX", **where):
        source = tmp_path / "source"
        source.mkdir()
        suffix = "cpp" if languages == "CXX" else "c"
        text = PROJECT.format(arguments=arguments, languages=languages, suffix=suffix)
        (source / "CMakeLists.txt").write_text(text)
        (source / f"consumer.{suffix}").write_text(PROGRAM)
        return source, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={where.get('at', prefix)}"

    return write


def words(text: str) -> str:
    """Undo CMake's line breaks."""
    return " ".join(text.split())


@pytest.mark.parametrize("languages", ["C", "CXX"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_component_is_the_library_that_is_linked(consumer, library, languages):
    source, build, where = consumer(f"REQUIRED COMPONENTS {library}", languages)
    build_project(source, build, where)
    run(build / "consumer")
    assert ("qlora_native" in linked_libraries(build / "consumer")) == (library == "shared")


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ("REQUIRED", "shared"),
        ("REQUIRED COMPONENTS static", "static"),
        ("REQUIRED COMPONENTS static shared", "shared"),
        (f"{MAJOR}.{MINOR} REQUIRED OPTIONAL_COMPONENTS cuda", "shared"),
    ],
)
def test_the_target_is_that_of_the_component(consumer, arguments, target):
    result = configure(*consumer(arguments))
    assert result.returncode == 0, result.stderr
    assert f"target=qlora_native::{target} " in result.stdout
    facts = rf"cuda=(OFF|FALSE) abi={ABI} version={re.escape(VERSION)}$"
    assert re.search(facts, result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        ("COMPONENTS cuda", ["lacks the component 'cuda'", "-DQLORA_NATIVE_CUDA=ON"]),
        ("COMPONENTS shard", ["lacks the component 'shard'", "only shared, static and cuda"]),
        ("COMPONENTS static cuda shard", ["component 'cuda'", "component 'shard'"]),
        (f"{MAJOR}.{int(MINOR) + 1}", [f"version: {VERSION}"]),
    ],
)
def test_what_is_missing_is_said(consumer, prefix, arguments, reasons):
    name, _, components = arguments.partition("COMPONENTS")
    required = f"{name} REQUIRED {'COMPONENTS' + components if components else ''}"
    result = configure(*consumer(required))
    assert result.returncode != 0
    for reason in [*reasons, str(prefix)]:
        assert reason in words(result.stderr)


def test_what_is_missing_but_not_required_is_said_too(consumer):
    result = configure(*consumer("COMPONENTS cuda"))
    assert result.returncode == 0
    assert f"not found: qlora_native {VERSION} in " in result.stdout


def test_a_prefix_with_one_library_has_that_one(core, consumer, tmp_path):
    prefix = tmp_path / "static only"
    run("cmake", "--install", core, "--prefix", prefix)
    package = prefix / "lib" / "cmake" / "qlora_native"
    for file in [*package.glob("*shared*"), *(prefix / "lib").glob("*.so*")]:
        file.unlink()
    source, build, where = consumer("REQUIRED", at=prefix)
    build_project(source, build, where)
    run(build / "consumer")
    assert "qlora_native" not in linked_libraries(build / "consumer")
    listing = source / "CMakeLists.txt"
    listing.write_text(listing.read_text().replace("REQUIRED", "REQUIRED COMPONENTS shared"))
    result = configure(source, tmp_path / "other build", where)
    assert "-DQLORA_NATIVE_BUILD_SHARED=ON" in words(result.stderr)


def test_pkg_config_links_the_static_library_too(prefix, tmp_path):
    need("gcc", "pkg-config")
    source = tmp_path / "consumer.c"
    source.write_text(PROGRAM)
    at = environment(PKG_CONFIG_PATH=str(prefix / "lib" / "pkgconfig"))
    asked = ("pkg-config", "--static", "--cflags", "--libs", "qlora_native")
    flags = run(*asked, env=at).replace("-lqlora_native", "-l:libqlora_native.a").split()
    run("gcc", source, *flags, "-o", tmp_path / "consumer")
    run(tmp_path / "consumer")
    assert "qlora_native" not in linked_libraries(tmp_path / "consumer")
    assert run("pkg-config", "--modversion", "qlora_native", env=at).strip() == VERSION


def test_a_build_needs_one_of_the_libraries(core, tmp_path):
    off = [f"-DQLORA_NATIVE_BUILD_{library.upper()}=OFF" for library in LIBRARIES]
    source = str(core.parents[1])
    result = attempt("cmake", "-S", source, "-B", tmp_path, "-DQLORA_NATIVE_CUDA=OFF", *off)
    assert result.returncode != 0
    assert "QLORA_NATIVE_BUILD_SHARED and QLORA_NATIVE_BUILD_STATIC are both OFF" in result.stderr


def test_a_project_that_contains_this_one_builds_its_own_settings(core, tmp_path):
    """As a subproject: no install, no packages, no build type that the parent did not choose."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(parent LANGUAGES CXX)\n"
        f"set(QLORA_NATIVE_CUDA OFF)\nadd_subdirectory({core.parents[1]} qlora_native)\n"
        "get_target_property(target qlora_native::qlora_native ALIASED_TARGET)\n"
        'message(STATUS "target=${target} type=(${CMAKE_BUILD_TYPE})")\n'
    )
    result = configure(tmp_path, tmp_path / "build")
    assert result.returncode == 0, result.stderr
    assert "target=qlora_native_shared type=()" in result.stdout
    assert not (tmp_path / "build" / "CPackConfig.cmake").exists()
    installed = (tmp_path / "build" / "qlora_native" / "cmake_install.cmake").read_text()
    assert "libqlora_native" not in installed
