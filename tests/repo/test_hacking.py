"""HACKING.md has a place for every source file."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from _sources import ROOT, all_files

SUFFIXES = (".h", ".c", ".cpp", ".cu", ".cuh", ".cmake", ".py", ".sh", ".map")
FOLDERS = ("cmake/", "cpp/", "cuda/", "python/", "tools/", "bench/", "examples/")
# Folders that HACKING.md describes as one.
DESCRIBED_WHOLE = ("bench/cpp/",)


def unmentioned(paths: list[str], text: str) -> list[str]:
    """Return the source files whose stem the text does not hold as a word."""
    words = set(re.findall(r"\w+", text))
    return [
        path
        for path in paths
        if path.startswith(FOLDERS)
        and not path.startswith(DESCRIBED_WHOLE)
        and path.endswith(SUFFIXES)
        and PurePosixPath(path).name != "__init__.py"
        and PurePosixPath(path).stem not in words
    ]


def test_every_source_file_is_mentioned():
    text = (ROOT / "HACKING.md").read_text(encoding="utf-8")
    assert unmentioned(list(all_files()), text) == []


def test_a_file_without_a_mention_is_found():
    assert unmentioned(["cpp/src/new_thing.cpp", "cpp/src/known.cpp"], "known.cpp: is known") == [
        "cpp/src/new_thing.cpp"
    ]
