"""One picture of a report of qn_bench: times by rows of activations, or rates by shape or case.

plot.py calls it. A dashed line shows what the ceiling allows: the time of the bytes at the rate of
a copy, or that rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from records import Record, is_cpu

CEILING = "#24292f"
_VARIANTS = ("rank", "dtype", "quant_type", "block_size", "double_quant")
_COLUMNS = 3


def draw(report: dict[str, Any], target: Path) -> None:
    """Draw a report; the suffix of `target` says as what."""
    records = [record for record in report["records"] if "median_us" in record]
    if not records:
        raise ValueError("there are no records to draw")
    series = series_of(records)
    panels = panels_of(records)
    rows = -(-len(panels) // _COLUMNS)
    figure, axes = plt.subplots(
        rows,
        min(len(panels), _COLUMNS),
        figsize=(4.2 * min(len(panels), _COLUMNS) + 0.6, 3.4 * rows + 0.9),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, chosen) in zip(axes.flat, panels.items(), strict=False):
        named = [(series[id(record)], record) for record in chosen]
        _draw_rows(axis, named) if "m" in chosen[0] else _draw_bars(axis, named)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#d0d7de", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    threads = f", {report['threads']} threads" if is_cpu(report) else ""
    figure.suptitle(f"qn_bench {report['command']}, {report['device']}{threads}", fontsize=11)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 5),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(target, dpi=110, metadata={"Software": None} if target.suffix == ".png" else {})
    plt.close(figure)


def series_of(records: Sequence[Record]) -> dict[int, str]:
    """Return {id of a record: the name of its line}: what differs between records, but for M.

    Kernels have lines of their own where they were compared; the library's own choice, which
    changes with M, is one line.
    """
    varying = [key for key in _VARIANTS if len({str(record.get(key)) for record in records}) > 1]
    names = {}
    for record in records:
        parts = [record["kernel"] if "is_choice" in record else "qlora_native"]
        parts += [_variant(key, record[key]) for key in varying if key in record]
        names[id(record)] = ", ".join(parts)
    return names


def _variant(key: str, value: Any) -> str:
    if key == "double_quant":
        return "8-bit scales" if value else "fp32 scales"
    if key == "rank":
        return f"rank {value}"
    return f"blocks of {value}" if key == "block_size" else str(value)


def panels_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return {title: records}: a panel per operation and shape of products, else per operation."""
    panels: dict[str, list[Record]] = {}
    for record in records:
        title = record["op"]
        if "m" in record:
            title += " " + "x".join(map(str, record["shape"]))
        elif "case" in record and record["op"] == "optimizer":
            title = f"{record['case']}: {record['parameters'] / 1e6:.3g} M parameters"
        panels.setdefault(title, []).append(record)
    return panels


def _draw_rows(axis: plt.Axes, named: Sequence[tuple[str, Record]]) -> None:
    """Draw times by M."""
    lines: dict[str, list[Record]] = {}
    for name, record in named:
        lines.setdefault(name, []).append(record)
    for name, records in lines.items():
        records.sort(key=lambda record: record["m"])
        rows = [record["m"] for record in records]
        axis.plot(rows, [r["median_us"] for r in records], marker="o", markersize=4, label=name)
    longest = max(lines.values(), key=len)
    if all("fraction_of_copy" in record for record in longest):
        floor = [record["median_us"] * record["fraction_of_copy"] for record in longest]
        axis.plot(
            [record["m"] for record in longest],
            floor,
            color=CEILING,
            linestyle="--",
            linewidth=1.2,
            label="the bytes at the copy's rate",
        )
    ms = sorted({record["m"] for _, record in named})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ms, [str(m) for m in ms])
    axis.minorticks_off()
    axis.set_xlabel("M, rows of activations", fontsize=8)
    axis.set_ylabel("µs", fontsize=8)


def _draw_bars(axis: plt.Axes, named: Sequence[tuple[str, Record]]) -> None:
    """Draw bytes per second relative to the ceiling, or times where nothing had to move."""
    places = list(dict.fromkeys(_place(record) for _, record in named))
    names = list(dict.fromkeys(name for name, _ in named))
    width = 0.8 / len(names)
    relative = any(_fraction(record) is not None for _, record in named)
    for index, name in enumerate(names):
        chosen = [record for its_name, record in named if its_name == name]
        offset = (index - (len(names) - 1) / 2) * width
        heights = [
            (_fraction(record) or 0) * 100 if relative else record["median_us"] for record in chosen
        ]
        bars = axis.bar(
            [places.index(_place(record)) + offset for record in chosen], heights, width, label=name
        )
        axis.bar_label(bars, [_time(record["median_us"]) for record in chosen], fontsize=6.5)
    if relative:
        axis.axhline(100, color=CEILING, linestyle="--", linewidth=1.2, label="the ceiling")
    axis.set_ylabel("% of the ceiling" if relative else "µs", fontsize=8)
    axis.set_xticks(range(len(places)), places)
    axis.margins(y=0.12)


def _place(record: Record) -> str:
    if "shape" in record:
        return "x".join(map(str, record["shape"]))
    if "optimizer" in record:
        return record["optimizer"]
    return f"{record['backing']}\n{record['case']}\n{record['ranges']} ranges"


def _fraction(record: Record) -> float | None:
    return record.get("fraction_of_copy", record.get("fraction_of_link"))


def _time(us: float) -> str:
    value, unit = (us / 1000, "ms") if us >= 1000 else (us, "µs")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
