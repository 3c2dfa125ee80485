"""The reference of the command line: what `--help` says, as a page."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx

from qlora_native.cli import app as commands

_GENERAL = "General"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default in (None, (), "") or callable(parameter.default):
        return ""
    if isinstance(parameter.default, bool):
        names = parameter.opts if parameter.default else parameter.secondary_opts
        return f"`{names[0]}`" if names else ""
    return f"`{parameter.default}`"


def _row(parameter: Any) -> str:
    is_option = parameter.opts[0].startswith("-")
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = " ".join(f"`{name if is_option else name.upper()}`" for name in names)
    text = " ".join((parameter.help or "").split()).replace("|", "\\|")
    return f"| {shown} | {_default(parameter)} | {text} |"


def page() -> str:
    """Return the page in Markdown: a section for each command, a table for each of its panels."""
    lines = [
        "# Command line",
        "",
        "`qlora-native COMMAND`, or `python -m qlora_native COMMAND`.",
        "",
    ]
    for name, command in typer.main.get_command(commands).commands.items():
        lines += [f"## `{name}`", "", command.help, ""]

        def panel(parameter: Any) -> str:
            return getattr(parameter, "rich_help_panel", None) or _GENERAL

        for title, parameters in groupby(command.params, key=panel):
            lines += [f"**{title}**", "", "| option | default | |", "|---|---|---|"]
            lines += [*map(_row, parameters), ""]
    return "\n".join(lines)


def _write(app: Sphinx) -> None:
    path = Path(app.srcdir) / "_generated" / "command_line.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the page before anything is read."""
    app.connect("builder-inited", _write, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
