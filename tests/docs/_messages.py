"""The messages that the sources hold, as templates: what is filled in is "…"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

ANY = "…"
_CPP_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|[;{}]|[^\s"]')


def collapse(template: str) -> str:
    """Return a template with one "…" for several in a row, and one space for several."""
    return re.sub(f"{ANY}(?:{ANY})+", ANY, re.sub(r"\s+", " ", template)).strip()


def _of_expression(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_of_expression(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _of_expression(node.left) + _of_expression(node.right)
    return ANY


def of_python(text: str) -> Iterator[str]:
    """Yield every text that a Python module builds of literals."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            yield collapse(_of_expression(node))


def of_cpp(text: str) -> Iterator[str]:
    """Yield, for every statement of a C++ source, its literals with "…" between them."""
    parts: list[str] = []
    for token in _CPP_TOKEN.findall(text):
        if token.startswith("//"):
            continue
        if token in (";", "{", "}"):
            yield collapse("".join(parts))
            parts = []
        elif token.startswith('"'):
            parts.append(token[1:-1].replace('\\"', '"').replace("\\n", "\n"))
        elif token not in "<>+,()":
            parts.append(ANY)
    yield collapse("".join(parts))


def of_cmake(text: str) -> Iterator[str]:
    """Yield the joined literals of every message() of a CMake file."""
    for call in re.findall(r"message\(FATAL_ERROR([^)]*)\)", text):
        joined = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', call))
        yield collapse(re.sub(r"\$\{\w+\}", ANY, joined))


def templates(sources: Mapping[str, str]) -> set[str]:
    """Return the templates of all sources {name: text}."""
    readers = {".py": of_python, ".cpp": of_cpp, ".h": of_cpp, ".cu": of_cpp, ".cmake": of_cmake}
    found: set[str] = set()
    for name, text in sources.items():
        reader = readers.get("." + name.rpartition(".")[2])
        if reader:
            found.update(reader(text))
    return found - {"", ANY}


def quoted(markdown: str) -> list[str]:
    """Return the messages that head the sections of a page."""
    return [heading.strip().strip("`") for heading in re.findall(r"^### (`.*`)$", markdown, re.M)]


def unknown(messages: list[str], known: set[str]) -> list[str]:
    """Return the messages that are no part of any template."""
    return [m for m in messages if not any(collapse(m) in template for template in known)]
