"""The code of a Markdown file: fenced blocks, and how to run them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

NOT_RUN = "<!-- not run -->"
LIMIT_S = 240
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S
)


class Example(NamedTuple):
    """A fenced block."""

    language: str
    line: int
    code: str
    is_run: bool
    """False after a line that says "not run"."""


def examples(markdown: str) -> list[Example]:
    """Return the fenced blocks of a Markdown text that name a language."""
    found = []
    for match in _FENCE.finditer(markdown):
        before = markdown[: match.start()].rstrip().rsplit("\n", 1)[-1]
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
        line = markdown.count("\n", 0, match.start()) + 2
        found.append(Example(match["language"], line, code, before.strip() != NOT_RUN))
    return found


def run_python(example: Example, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in a process and a folder of its own, offline."""
    script = folder / "example.py"
    script.write_text(example.code)
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def _installed_core() -> Path:
    spec = importlib.util.find_spec("qlora_native")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [
        Path(folder) for folder in folders if (Path(folder) / "lib/libqlora_native.so").is_file()
    ]
    if not found:
        pytest.skip("the library is not built")
    return found[0]


def run_compiled(example: Example, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile a block, link it to the installed core and run it."""
    is_c = example.language == "c"
    # Not CC and CXX: what other tests load sets them for itself, and gcc does not link C++.
    names = ("gcc", "cc", "clang") if is_c else ("g++", "c++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        pytest.skip(f"there is no {'C' if is_c else 'C++'} compiler")
    core = _installed_core()
    source, program = folder / f"example.{'c' if is_c else 'cpp'}", folder / "example"
    source.write_text(example.code)
    command = [compiler, "-std=c11" if is_c else "-std=c++20", f"-I{core / 'include'}", str(source)]
    command += ["-o", str(program), f"-L{core / 'lib'}", "-lqlora_native"]
    command += [f"-Wl,-rpath,{core / 'lib'}"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        return built
    return subprocess.run(
        [str(program)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
