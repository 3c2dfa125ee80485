"""The built library, and the names that a library exports."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest


def built_library() -> Path:
    """Return the library of the installed package, or skip the test."""
    # An editable installation has two folders: the sources and what was built.
    spec = importlib.util.find_spec("qlora_native")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = [Path(folder) / "lib" / "libqlora_native.so" for folder in folders]
    built = next((library for library in libraries if library.is_file()), None)
    if built is None:
        pytest.skip(f"the library is not built: none of {', '.join(map(str, libraries))}")
    return built


def exported_symbols(library: Path) -> list[str]:
    """Return the demangled names that a shared library defines for others."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    command = ["nm", "--dynamic", "--defined-only", "--demangle", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split(maxsplit=2)[2] for line in output.splitlines()]
