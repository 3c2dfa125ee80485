"""Shares torch's CPU threads with the core.

torch computes on the threads of an OpenMP runtime, which spin for milliseconds after every
operation. Threads of our own would compete with them for the same cores: alternating decode and
matrix product, that made a linear layer ten times slower on two cores.
"""

from __future__ import annotations

from pathlib import Path

from qlora_native import _C

_RUNTIMES = ("libgomp", "libiomp5", "libomp")


def loaded_openmp_runtimes(maps: str) -> list[str]:
    """Return the paths of OpenMP runtimes in the text of /proc/self/maps, in order, once each."""
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
    found = (path for path in paths if path.rpartition("/")[2].startswith(_RUNTIMES))
    return list(dict.fromkeys(found))


def share_torch_threads() -> str | None:
    """Run the core on torch's OpenMP threads; return the runtime's path, None without one."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    runtimes = loaded_openmp_runtimes(maps.read_text(encoding="utf-8", errors="replace"))
    # Several can be loaded (scikit-learn brings its own): torch's lies in torch's folder.
    runtimes.sort(key=lambda path: "/torch" not in path)
    return next((path for path in runtimes if _C.use_openmp(path)), None)
