"""Where the package has the core for C and C++: needs none of the command line's dependencies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import qlora_native

# The folder of each option, within the package, and a file that is in it.
_FOLDERS = {
    "--include-dir": ("include", "qlora_native/qlora_native.h"),
    "--cmake-dir": ("lib/cmake/qlora_native", "qlora_nativeConfig.cmake"),
    "--pkgconfig-dir": ("lib/pkgconfig", "qlora_native.pc"),
}


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Return whether the command line is one of the options for folders, and nothing else."""
    return len(arguments) == 1 and arguments[0] in _FOLDERS


def find(option: str) -> Path:
    """Return the folder that an option names; raise FileNotFoundError where there is none."""
    folder, file = _FOLDERS[option]
    # An editable installation has two roots: the sources and what was built.
    for root in qlora_native.__path__:
        found = Path(root) / folder
        if (found / file).is_file():
            return found.resolve()
    roots = ", ".join(qlora_native.__path__)
    raise FileNotFoundError(
        f"{folder}/{file} is not in {roots}: the package was built over a core that is installed "
        "elsewhere; ask that one"
    )


def show(arguments: Sequence[str]) -> None:
    """Print the folder; exit with code 1 where there is none."""
    try:
        print(find(arguments[0]))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
