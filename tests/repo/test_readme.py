"""The README's examples work: Python blocks run, C and C++ blocks are compiled first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from _examples import NOT_RUN, Example, examples
from _sources import ROOT

README = ROOT / "README.md"
EXAMPLES = examples(README.read_text(encoding="utf-8"))
LIMIT_S = 240


def _selected(*languages: str) -> list:
    chosen = [e for e in EXAMPLES if e.is_run and e.language in languages]
    return [pytest.param(example, id=f"line {example.line}") for example in chosen]


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


@pytest.mark.parametrize("example", _selected("python", "py"))
def test_python_example_runs(example, tmp_path):
    result = run_python(example, tmp_path)
    assert result.returncode == 0, result.stderr


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


@pytest.mark.parametrize("example", _selected("c", "cpp", "c++"))
def test_compiled_example_runs(example, tmp_path):
    result = run_compiled(example, tmp_path)
    assert result.returncode == 0, result.stderr


MARKDOWN = f"""
# Title
```python
import sys
```
```
no language
```
{NOT_RUN}
```python
raise SystemExit("heavy")
```
1. In a list:
   ```cpp
   int main() {{
     return 0;
   }}
   ```
"""


def test_blocks_are_found_and_marks_are_seen():
    found = [(e.language, e.line, e.is_run) for e in examples(MARKDOWN)]
    assert found == [("python", 4, True), ("python", 11, False), ("cpp", 15, True)]
    assert examples(MARKDOWN)[2].code == "int main() {\n  return 0;\n}\n"


def test_a_broken_example_is_found(tmp_path):
    broken = Example("python", 1, "import qlora_native\nqlora_native.no_such_name\n", True)
    result = run_python(broken, tmp_path)
    assert result.returncode != 0
    assert "no_such_name" in result.stderr


@pytest.mark.parametrize(
    ("language", "code", "words"),
    [
        ("c", "int main(void) { return no_such_name; }", "no_such_name"),
        ("cpp", "int main() { return no_such_name; }", "no_such_name"),
        ("c", "int main(void) { return 3; }", ""),
    ],
)
def test_a_broken_compiled_example_is_found(tmp_path, language, code, words):
    result = run_compiled(Example(language, 1, code, True), tmp_path)
    assert result.returncode != 0
    assert words in result.stderr
