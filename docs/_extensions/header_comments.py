"""Doxygen's input filter: gives the comments of a public header the marks that Doxygen looks for.

The headers are written to be read as they are. What Doxygen has to be told: which comment is the
file's, that C's comments are documentation too, that one comment above several declarations is for
each of them, and that indented lines keep their lines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_SECTION = re.compile(r"^----.*----$", re.DOTALL)
_LIST_ITEM = re.compile(r"^(?:[-*]|\d+\.) ")


def with_verbatim(lines: list[str]) -> list[str]:
    """Put runs of indented lines, such as formulas, between marks that keep their lines."""
    found: list[str] = []
    inside = in_list = False
    for line in lines:
        is_indented = line.startswith("  ") and not in_list
        if is_indented and not inside:
            found.append("@verbatim")
        elif inside and not is_indented:
            found.append("@endverbatim")
        inside = is_indented
        found.append(line)
        if not line.startswith(" "):
            in_list = bool(_LIST_ITEM.match(line))
    return [*found, "@endverbatim"] if inside else found


def _block(lines: list[str]) -> list[str]:
    """Return lines of text as one comment of Doxygen's."""
    # Without asterisks down the side: Doxygen would keep those of lines that keep their form.
    return ["/**", *with_verbatim([line.rstrip() for line in lines]), "*/"]


def _text_of(comment: str) -> list[str]:
    """Return the lines of a C comment, without its marks."""
    lines = comment.strip().removeprefix("/*").removesuffix("*/").split("\n")
    return [re.sub(r"^\s*\* ?", "", line) if i else line.strip() for i, line in enumerate(lines)]


def _runs(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield ("//", text lines), ("///", text lines), ("/*", text lines) and ("code", [line])."""
    i = 0
    while i < len(lines):
        line = lines[i]
        stripped = line.lstrip()
        for mark in ("///", "//"):
            if stripped.startswith(mark) and not stripped.startswith("///<"):
                end = i
                while end < len(lines) and lines[end].lstrip().startswith(mark):
                    end += 1
                text = [re.sub(rf"^\s*{mark} ?", "", text) for text in lines[i:end]]
                yield mark, text
                i = end
                break
        else:
            if stripped.startswith("/*"):
                end = i
                while "*/" not in lines[end]:
                    end += 1
                yield "/*", _text_of("\n".join(lines[i : end + 1]))
                i = end + 1
            else:
                yield "code", [line]
                i += 1


def _trailing(lines: list[str]) -> Iterator[str]:
    """Turn `code; /* text */` to what Doxygen takes for the description of what is before it."""
    inside = False
    for line in lines:
        if not inside and re.search(r"[;,}\w)]\s+/\*", line) and not line.lstrip().startswith("/*"):
            line = line.replace("/*", "/**<", 1)
            inside = "*/" not in line
        elif inside and "*/" in line:
            inside = False
        yield line


def convert(text: str) -> str:
    """Return a header with Doxygen's comments."""
    # To Sphinx a struct and a typedef of its name are two declarations of one thing.
    text = re.sub(r"^typedef (struct (\w+) \{.*?^\}) \2;", r"\1;", text, flags=re.M | re.S)
    # C11 has no enums of a fixed width: the values of such a type stand in an enum without a name.
    text = re.sub(
        r"^typedef int32_t (\w+);\nenum \{",
        r"/* An `int32_t` with one of these values. */\nenum \1 {",
        text,
        flags=re.M,
    )
    out: list[str] = []
    shared: list[str] | None = None  # a comment, while declarations follow it without a blank line
    used = is_head = True
    for kind, lines in _runs(list(_trailing(text.split("\n")))):
        if kind == "code":
            is_declaration = lines[0].lstrip().startswith("QN_API")
            if is_declaration and shared and used:
                out += _block(shared)
            used = used or bool(is_declaration)
            if not lines[0].strip():
                shared = None
            out += lines
            continue
        if is_head:
            is_head = False
            out += _block(["@file", *lines])
        elif _SECTION.match("\n".join(lines).strip()) or kind == "//":
            out.append("")  # headings and remarks for those who read the file
        else:
            out += _block(lines)
            shared, used = lines, False
    return "\n".join(out)


if __name__ == "__main__":
    sys.stdout.write(convert(Path(sys.argv[1]).read_text(encoding="utf-8")))
