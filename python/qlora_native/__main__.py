"""`python -m qlora_native` and the `qlora-native` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    from qlora_native.cli import app, folders

    if folders.is_asked_for(sys.argv[1:]):
        folders.show(sys.argv[1:])
    else:
        app()


if __name__ == "__main__":
    main()
