"""Building the core, and programs against a prefix, as a user does on a command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where the core is built for these tests; kept, so that only what has changed is compiled again.
BUILD = ROOT / "build" / "install"
# Where `make test` has compiled the same core for Python.
PYTHON_BUILD = ROOT / "build" / "python"
# The first test that needs the core builds it, and may have to compile it.
LIMIT_S = 1800
LIBRARIES = ("shared", "static")
VERSION = re.search(
    r'kVersion = "([^"]+)"', (ROOT / "cpp/include/qlora_native/version.h").read_text()
)[1]
ABI = VERSION.split(".")[0]


def need(*programs: str) -> None:
    """Skip the test when a program is not there."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)}")


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without compilers that other tests may have set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    return kept | changes


def attempt(*command: object, **options) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever its exit code."""
    return subprocess.run(
        [str(word) for word in command],
        **{"env": environment(), "capture_output": True, "text": True, "check": False, **options},
    )


def run(*command: object, **options) -> str:
    """Run a command that has to succeed; return what it printed."""
    result = attempt(*command, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def compiled_objects() -> str:
    """Return the list of the core's objects of `make test`, brought up to date, or ""."""
    listing, cache = PYTHON_BUILD / "core_objects.cmake", PYTHON_BUILD / "CMakeCache.txt"
    if not listing.is_file() or "/no_cuda/backend.cpp" not in listing.read_text():
        return ""
    if not {"CMAKE_BUILD_TYPE:STRING=Release", "QLORA_NATIVE_SANITIZE:STRING="} <= set(
        cache.read_text().splitlines()
    ):
        return ""
    run("cmake", "--build", PYTHON_BUILD, "--target", "qlora_native_objects")
    return str(listing)


def build_core() -> Path:
    """Build both libraries, without CUDA; return the build folder."""
    need("cmake", "g++")
    options = ["-DQLORA_NATIVE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    options.append(f"-DQLORA_NATIVE_CORE_OBJECTS={compiled_objects()}")
    if not (BUILD / "CMakeCache.txt").is_file() and shutil.which("ninja"):
        options.append("-GNinja")
    run("cmake", "-S", ROOT, "-B", BUILD, *options)
    run("cmake", "--build", BUILD, "--parallel", os.cpu_count() or 1)
    return BUILD


def configure(source: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configure a project that finds an installed core."""
    return attempt("cmake", "-S", source, "-B", build, *options)


def build_project(source: Path, build: Path, *options: str) -> None:
    """Configure and build it."""
    result = configure(source, build, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    run("cmake", "--build", build)


def linked_libraries(program: Path) -> str:
    """Return the names of the shared libraries that a program asks for."""
    need("readelf")
    lines = run("readelf", "-d", program).splitlines()
    return " ".join(line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line)
