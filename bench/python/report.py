"""Records: what is kept of a run, as JSON and as a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


def commit() -> str:
    """Return the checked-out commit, with "+" after it when tracked files differ from it."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        # A copy of the sources without their history; whoever copied it may know.
        return os.environ.get("QLORA_NATIVE_COMMIT", "unknown")


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver_version() -> str:
    """Return the NVIDIA driver's version, or "" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return output.splitlines()[0].strip() if output else ""


def versions() -> dict[str, str]:
    """Return the versions of everything that a figure depends on."""
    import qlora_native

    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["torch_cuda"] = torch.version.cuda
    found["qlora_native"] = qlora_native.__version__
    found.update({f"core_{key}": value for key, value in qlora_native.build_info().items()})
    try:
        found["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        found["bitsandbytes"] = ""
    return found


def machine(device: torch.device, copy_tb_per_s: float) -> dict[str, Any]:
    """Return the head of a report."""
    head: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "driver": driver_version() if device.type == "cuda" else "",
        "versions": versions(),
        "copy_tb_per_s": copy_tb_per_s,
    }
    if device.type == "cpu":
        head["threads"] = torch.get_num_threads()
    return head


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def _row_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["op"], tuple(record["shape"]), record["m"], record.get("memory")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as text: a row per problem, a column per implementation."""
    names = list(dict.fromkeys(record["impl"] for record in records))
    rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(_row_key(record), {})[record["impl"]] = record
    head = ["op", "shape", "M", "memory", *(f"{name} us" for name in names)]
    head += [f"{name}: of copy" for name in names[:1]] + [f"vs {name}" for name in names[1:]]
    cells = [head]
    for (op, shape, m, memory), by_name in rows.items():
        ours = by_name.get(names[0])
        line = [op, "x".join(map(str, shape)), "" if m is None else str(m), memory or ""]
        line += [f"{by_name[name]['median_us']:.1f}" if name in by_name else "-" for name in names]
        line.append(f"{ours['fraction_of_copy']:.0%}" if ours else "-")
        for name in names[1:]:
            both = ours and name in by_name
            line.append(f"{by_name[name]['median_us'] / ours['median_us']:.2f}x" if both else "-")
        cells.append(line)
    return _aligned(cells)


def _aligned(cells: Iterable[Sequence[str]]) -> str:
    cells = list(cells)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
