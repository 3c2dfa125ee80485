"""Bars per operation from the JSON that bench/python/peers.py writes.

    python bench/plot.py bench/results/machine.json machine.png

Bars are medians relative to the fastest of the problem, with their microseconds above them; on a
CPU those with reused memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {
    "quantize": "quantize to 4 bits",
    "dequantize": "dequantize",
    "linear": "linear, forward",
    "linear_backward": "linear, forward + dX",
}
COLORS = {"qlora_native": "#1f6feb", "bitsandbytes": "#d29922", "dense": "#8b949e"}


def _label(record: dict[str, Any]) -> str:
    shape = "x".join(map(str, record["shape"]))
    return shape if record["m"] is None else f"{shape}\nM={record['m']}"


def draw(report: dict[str, Any], target: Path) -> None:
    """Draw one panel per operation; on a CPU, of the measurements with reused memory."""
    records = [r for r in report["records"] if r.get("memory", "reused") == "reused"]
    ops = [op for op in TITLES if any(record["op"] == op for record in records)]
    if not ops:
        raise SystemExit("there are no records to draw")
    labels = {
        op: list(dict.fromkeys(_label(record) for record in records if record["op"] == op))
        for op in ops
    }
    slots = max(len(found) for found in labels.values())
    width = max(7.0, 1.5 + 0.85 * slots)
    figure, axes = plt.subplots(
        len(ops), 1, figsize=(width, 3.1 * len(ops) + 0.8), squeeze=False, layout="constrained"
    )
    for axis, op in zip(axes[:, 0], ops, strict=True):
        _draw_panel(axis, [record for record in records if record["op"] == op], labels[op], slots)
        axis.set_title(TITLES[op], loc="left", fontsize=11)
    shown = {}
    for axis in axes[:, 0]:
        shown.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        shown.values(), shown.keys(), loc="outside upper right", ncols=len(shown), frameon=False
    )
    figure.suptitle(f"{report['device']}, {records[0]['dtype']}", x=0.01, ha="left", fontsize=12)
    figure.savefig(target, dpi=140)
    plt.close(figure)


def _draw_panel(
    axis: plt.Axes, records: list[dict[str, Any]], labels: list[str], slots: int
) -> None:
    fastest = {
        label: min(record["median_us"] for record in records if _label(record) == label)
        for label in labels
    }
    names = [name for name in COLORS if any(record["impl"] == name for record in records)]
    bar = 0.8 / len(names)
    for index, name in enumerate(names):
        times = {_label(r): r["median_us"] for r in records if r["impl"] == name}
        places = [place for place, label in enumerate(labels) if label in times]
        found = [times[labels[place]] for place in places]
        container = axis.bar(
            [place + (index - (len(names) - 1) / 2) * bar for place in places],
            [us / fastest[labels[place]] for us, place in zip(found, places, strict=True)],
            bar,
            label=name,
            color=COLORS[name],
        )
        axis.bar_label(container, [_time(us) for us in found], fontsize=6.5, rotation=90, padding=2)
    axis.set_xticks(range(len(labels)), labels, fontsize=7.5)
    axis.set_xlim(-0.6, slots - 0.4)
    axis.set_ylabel("time, fastest = 1")
    axis.margins(y=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _time(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="JSON from bench/python/peers.py")
    parser.add_argument("target", type=Path, help="image to write: .png, .svg or .pdf")
    options = parser.parse_args()
    draw(json.loads(options.report.read_text()), options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
