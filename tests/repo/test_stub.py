"""python/qlora_native/_C.pyi is what nanobind says of the extension."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys

import pytest

from _sources import ROOT

STUB = ROOT / "python" / "qlora_native" / "_C.pyi"


def declarations(text: str) -> list[str]:
    """Return the stub's statements in one spelling, whatever its formatting and order."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = inspect.cleandoc(node.value)
    return sorted(ast.unparse(statement) for statement in tree.body)


def test_the_stub_is_current(tmp_path):
    for module in ("nanobind", "qlora_native"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    generated = tmp_path / "_C.pyi"
    command = [sys.executable, str(ROOT / "tools" / "make_stub.py"), str(generated)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert declarations(STUB.read_text()) == declarations(generated.read_text()), (
        "the extension has changed; run: python tools/make_stub.py"
    )


def test_a_stale_stub_is_found():
    text = STUB.read_text()
    assert declarations(text) != declarations(text + "\ndef added(x: int) -> None: ...\n")
    assert declarations(text) != declarations(text.replace("block_size: int", "block_size: str"))
