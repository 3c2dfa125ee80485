"""Records: what is kept of a run, as JSON and as tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from records import OURS, SHORT, Record, ratio_text, rows_of

SCHEMA_VERSION = 2
"""Of the JSON; reports without the key are of version 1. bench/README.md says what it holds."""


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
    for peer in ("bitsandbytes", "torchao"):
        try:
            found[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            found[peer] = ""
    return found


def machine(device: torch.device, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return the head of a report."""
    head: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "driver": driver_version() if device.type == "cuda" else "",
        "versions": versions(),
        **ceilings,
    }
    if device.type == "cpu":
        head["threads"] = torch.get_num_threads()
    return head


def slug(head: dict[str, Any]) -> str:
    """Return the machine's name as that of a file: NVIDIA H200 -> nvidia-h200."""
    name = re.sub(r"\((?:r|tm)\)", "", head["device"].lower())
    if "threads" in head:
        name += f" {head['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def head_lines(head: dict[str, Any]) -> Iterator[str]:
    """Yield what a reader of the figures has to know."""
    yield f"{head['device']}  (commit {head['commit'][:12]}, {head['date']})"
    if "threads" in head:
        yield f"threads: {head['threads']}"
    if head["driver"]:
        yield f"driver: {head['driver']}"
    yield "  ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
    yield f"ceiling, a large copy: {head['copy_tb_per_s']:.4f} TB/s, bytes read plus written"
    if "graph_node_us" in head:
        yield f"floor, a kernel that does nothing in a CUDA graph: {head['graph_node_us']:.2f} us"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def tables(records: Sequence[Record]) -> str:
    """Return the records as text: times, then errors, then times with the host's part."""
    parts = [time_table(records)]
    if any("relative_error" in record for record in records):
        parts.append("relative error against fp64\n" + error_table(records))
    if any("eager_us" in record for record in records):
        parts.append("wall time a call, launched eagerly\n" + eager_table(records))
    return "\n\n".join(parts)


def time_table(records: Sequence[Record]) -> str:
    """Return times, each with its fraction of the copy rate, and ratios to ours."""

    def cells(record: Record) -> tuple[str, ...]:
        return f"{record['median_us']:.1f}", f"{record['fraction_of_copy']:.0%}"

    return _table(records, lambda name: (f"{name} us", "of copy"), cells, "median_us")


def error_table(records: Sequence[Record]) -> str:
    """Return the errors of products, and of a dense product with the decoded weight."""

    def cells(record: Record) -> tuple[str, ...]:
        own = f"{record['relative_error']:.1e}"
        if record["impl"] == "dense":
            return (own,)
        return own, f"{record['relative_error_dequantized']:.1e}"

    def heads(name: str) -> tuple[str, ...]:
        return (name,) if name == "dense" else (name, "decoded + dense")

    measured = [record for record in records if "relative_error" in record]
    return _table(measured, heads, cells)


def eager_table(records: Sequence[Record]) -> str:
    """Return wall times of eager calls, and ratios to ours."""
    measured = [record for record in records if "eager_us" in record]
    return _table(
        measured,
        lambda name: (f"{name} us",),
        lambda record: (f"{record['eager_us']:.1f}",),
        "eager_us",
    )


def _table(
    records: Sequence[Record],
    heads: Callable[[str], tuple[str, ...]],
    cells: Callable[[Record], tuple[str, ...]],
    ratio_field: str = "",
) -> str:
    names = list(dict.fromkeys(record["impl"] for record in records))
    rivals = [name for name in names if name != OURS] if ratio_field and OURS in names else []
    keys = ["op", "shape", "M"]
    has_memory = any("memory" in record for record in records)
    if has_memory:
        keys.append("memory")
    short = {name: SHORT.get(name, name) for name in names}
    head = keys + [head for name in names for head in heads(short[name])]
    lines = [head + [f"x {short[name]}" for name in rivals]]
    for (op, shape, m, memory), row in rows_of(records).items():
        line = [op, "x".join(map(str, shape)), "" if m is None else str(m)]
        if has_memory:
            line.append(memory or "")
        for name in names:
            line += cells(row[name]) if name in row else ["-"] * len(heads(short[name]))
        lines.append(line + [ratio_text(row, name, ratio_field) for name in rivals])
    return _aligned(lines)


def _aligned(cells: Iterable[Sequence[str]]) -> str:
    cells = list(cells)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
