"""The files of the project, for the tests of its rules."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = {".git", ".venv", "build", "dist", "__pycache__"}

CPP_SUFFIXES = (".h", ".c", ".cpp", ".cu", ".cuh")


@lru_cache(maxsize=1)
def all_files() -> tuple[str, ...]:
    """Return every file that is or would be committed, relative to the root, with / in it."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.decode().split("\0")
    else:
        # A copy of the sources without their history.
        names = [
            path.relative_to(ROOT).as_posix()
            for path in ROOT.rglob("*")
            if not _NOT_OURS.intersection(path.relative_to(ROOT).parts)
        ]
    return tuple(sorted(name for name in names if name and (ROOT / name).is_file()))


def read_texts(suffixes: tuple[str, ...] = (), folders: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Return {name: text} of the text files below `folders` that end in one of `suffixes`."""
    texts = {}
    for name in all_files():
        if name.startswith(folders) and (not suffixes or name.endswith(suffixes)):
            try:
                texts[name] = (ROOT / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                # Images and other binary files hold no sources.
                continue
    return texts
