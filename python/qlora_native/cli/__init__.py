"""The command line `qlora-native`. `app` is callable and exits the process with its code."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["app"]

_DEPENDENCIES = (
    "accelerate",
    "datasets",
    "matplotlib",
    "rich",
    "safetensors",
    "transformers",
    "typer",
    "yaml",
)


def _missing_dependencies() -> list[str]:
    return [name for name in _DEPENDENCIES if importlib.util.find_spec(name) is None]


def _explain_missing() -> None:
    """Takes the place of the commands when the package was installed without its extra."""
    print(
        f"error: the command line needs {', '.join(_missing_dependencies())}; "
        "install it with: pip install 'qlora-native[cli]'",
        file=sys.stderr,
    )
    sys.exit(2)


if _missing_dependencies():
    app = _explain_missing
else:
    from qlora_native.cli.commands import app
