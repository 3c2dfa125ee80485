"""The README's examples work: Python blocks run, C and C++ blocks are compiled first."""

from __future__ import annotations

import pytest

from _examples import NOT_RUN, Example, examples, run_compiled, run_python
from _sources import ROOT

README = ROOT / "README.md"
EXAMPLES = examples(README.read_text(encoding="utf-8"))


def _selected(*languages: str) -> list:
    chosen = [e for e in EXAMPLES if e.is_run and e.language in languages]
    return [pytest.param(example, id=f"line {example.line}") for example in chosen]


@pytest.mark.parametrize("example", _selected("python", "py"))
def test_python_example_runs(example, tmp_path):
    result = run_python(example, tmp_path)
    assert result.returncode == 0, result.stderr


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
