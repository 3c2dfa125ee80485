"""What the public headers say, as Doxygen's XML for breathe, and one page of reference for each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_HERE = Path(__file__).resolve().parent
_INCLUDE = _HERE.parents[1] / "cpp" / "include"
# Headers with nothing to look up: a macro, and a list of the others.
WITHOUT_NAMES = ("export.h", "qlora_native.h")


def _write_if_changed(path: Path, text: str) -> None:
    """Write a page; one that stays as it is need not be read again by Sphinx."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _run_doxygen(xml: Path) -> None:
    program = shutil.which("doxygen")
    if program is None:
        raise ExtensionError("doxygen is not installed: apt-get install doxygen")
    settings = f"""
        INPUT = {_INCLUDE}
        FILE_PATTERNS = *.h
        RECURSIVE = YES
        STRIP_FROM_PATH = {_INCLUDE}
        STRIP_FROM_INC_PATH = {_INCLUDE}
        FILTER_PATTERNS = "*.h={sys.executable} {_HERE / "header_comments.py"}"
        EXCLUDE_SYMBOLS = qlora_native::detail qlora_native::detail::*
        MACRO_EXPANSION = YES
        EXPAND_ONLY_PREDEF = YES
        PREDEFINED = QN_API=
        EXTRACT_ALL = YES
        MAX_INITIALIZER_LINES = 1
        SORT_MEMBER_DOCS = NO
        AUTOLINK_SUPPORT = NO
        GENERATE_HTML = NO
        GENERATE_LATEX = NO
        GENERATE_XML = YES
        XML_PROGRAMLISTING = NO
        OUTPUT_DIRECTORY = {xml.parent}
        XML_OUTPUT = {xml.name}
        WARN_AS_ERROR = FAIL_ON_WARNINGS
        QUIET = YES
    """
    xml.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        [program, "-"], input=settings, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise ExtensionError(f"doxygen: {result.stderr.strip()}")


def _write_pages(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for header in sorted((_INCLUDE / "qlora_native").glob("*.h")):
        if header.name in WITHOUT_NAMES:
            continue
        title = f"``{header.name}``"
        _write_if_changed(
            folder / f"{header.stem}.rst",
            f"{title}\n{'=' * len(title)}\n\n.. doxygenfile:: {header.name}\n",
        )


def _generate(app: Sphinx) -> None:
    xml = Path(app.doctreedir).parent / "doxygen" / "xml"
    _run_doxygen(xml)
    app.config.breathe_projects = {"headers": str(xml)}
    _write_pages(Path(app.srcdir) / "_generated" / "headers")


def setup(app: Sphinx) -> dict[str, Any]:
    """Run Doxygen before anything is read."""
    app.connect("builder-inited", _generate, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
