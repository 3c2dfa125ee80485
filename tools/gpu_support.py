"""Programs, processes and the GPU, for gpu.py."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "gpu"
PREFIX = OUT / "prefix"
PACKAGE = PREFIX / "qlora_native"


class StepFailedError(Exception):
    """A step did not succeed; the message says why."""


class StepSkippedError(Exception):
    """A step could not be tried here; the message says why."""


@dataclasses.dataclass
class Counts:
    """Outcomes of the tests of one step."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    def require_success(self, what: str) -> None:
        """Raise unless something ran and nothing failed."""
        if self.failed:
            raise StepFailedError(f"{what}: {self}")
        if not self.passed:
            raise StepFailedError(f"{what}: no test ran on the GPU ({self})")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The device that everything runs on."""

    name: str
    capability: str

    @property
    def slug(self) -> str:
        """The name as part of a file name: NVIDIA H200 -> nvidia-h200."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def find_gpu() -> Gpu:
    """Return the current device; StepFailedError says what is missing."""
    try:
        import torch
    except ImportError as error:
        raise StepFailedError(f"{sys.executable} cannot import torch: {error}") from error
    if not torch.version.cuda:
        raise StepFailedError(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise StepFailedError(
            f"there is no GPU: torch {torch.__version__} finds no CUDA device; look at nvidia-smi"
        )
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}{minor}")


def tool(name: str, *places: Path) -> str:
    """Return the path of a program, beside this Python, on PATH or in `places`."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *map(str, places)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise StepFailedError(f"{name} was not found beside {sys.executable} or on PATH")
    return found


def cuda_home() -> Path:
    """Return where the CUDA toolkit would be."""
    return Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")


def run(
    log: Path, command: Sequence[str | Path], env: dict[str, str] | None = None, limit_s: int = 3600
) -> int:
    """Run a command, add what it prints to `log`, return its exit status."""
    with log.open("a") as sink:
        sink.write(f"$ {' '.join(map(str, command))}\n")
        sink.flush()
        process = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=env,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
        )
    return process.returncode


def package_env() -> dict[str, str]:
    """Return the environment in which the built package is the one that is imported."""
    path = os.pathsep.join(filter(None, [str(PREFIX), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def tail(path: Path, lines: int = 25) -> str:
    """Return the end of a log."""
    text = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return "\n".join(f"    {line}" for line in text[-lines:])
