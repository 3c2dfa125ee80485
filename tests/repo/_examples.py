"""The code of a Markdown file: fenced blocks, and how to run them."""

from __future__ import annotations

import re
from typing import NamedTuple

NOT_RUN = "<!-- not run -->"
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
