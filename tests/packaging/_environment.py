"""Virtual environments that hold chosen packages of the running one, and no compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from pathlib import Path


def requirements(name: str, extra: str = "") -> list[str]:
    """Return the names of what a distribution requires, by itself or for one of its extras."""
    found = []
    for line in importlib.metadata.requires(name) or []:
        marker = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if (marker.group(1) if marker else "") == extra:
            found.append(re.match(r"[\w.-]+", line).group())
    return found


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed ones among distributions and all that they require, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # wanted on another platform only
        waiting += requirements(name)
    return found


def _top_level(distribution: importlib.metadata.Distribution) -> Iterator[Path]:
    names = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
    for name in names - {"__pycache__"}:
        yield Path(str(distribution.locate_file(name)))


class EmptyEnvironment:
    """A virtual environment without pip, whose processes find no program but its own."""

    def __init__(self, folder: Path, packages: Iterable[str] = ()) -> None:
        """Make it, with links to `packages` and all that they require, and nothing else."""
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for distribution in closure(packages).values():
            for path in _top_level(distribution):
                if not (borrowed / path.name).exists():
                    (borrowed / path.name).symlink_to(path)
        (self.site_packages / "borrowed.pth").write_text(f"{borrowed}\n")

    @property
    def site_packages(self) -> Path:
        """Where packages are installed."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def install(self, wheel: Path) -> None:
        """Install one wheel, and nothing that it requires."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install"]
        command += ["--no-index", "--no-deps", "--quiet", str(wheel)]
        subprocess.run(command, check=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, without a GPU and with nothing else on PATH."""
        kept = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ}
        variables = {
            **kept,
            "PATH": str(self.folder / "bin"),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        program = self.folder / "bin" / command[0]
        return subprocess.run(
            [str(program), *command[1:]],
            cwd=self.folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
