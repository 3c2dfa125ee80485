"""`python -m qlora_native` and the `qlora-native` command."""

from __future__ import annotations


def main() -> None:
    """Runs the command line and exits with its code."""
    from qlora_native.cli import app

    app()


if __name__ == "__main__":
    main()
