"""One picture of a report: times against a dense product, and bandwidth against a copy.

    python bench/plot.py bench/results/machine.json machine.png

On a CPU the records with reused memory are drawn. torchao, many times slower, stays in the tables.
Reports of qn_bench (--json) are drawn by kernel_plot.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))

import matplotlib

matplotlib.use("Agg")
import kernel_plot
import matplotlib.pyplot as plt

from records import DENSE, OURS, Record, Row, is_cpu, is_of_qn_bench, load, rows_of, steady

STYLES = {
    OURS: {"color": "#1f6feb", "marker": "o", "zorder": 4},
    "bitsandbytes": {"color": "#d29922", "marker": "s", "zorder": 3},
    "bitsandbytes packed": {"color": "#a371f7", "marker": "D", "zorder": 3},
    DENSE: {"color": "#6e7681", "marker": "", "linestyle": "--", "zorder": 2},
}
BARS = (("quantize", None), ("dequantize", None), ("linear", 1))
"""The operations that only move data, and so have the copy for a limit."""


def draw(report: dict[str, Any], target: Path) -> None:
    """Draw a report; the suffix of `target` says as what."""
    if is_of_qn_bench(report):
        kernel_plot.draw(report, target)
        return
    rows = rows_of(steady(report["records"]))
    if not rows:
        raise ValueError("there are no records to draw")
    shapes = sorted({key[1] for key in rows})
    figure = plt.figure(figsize=(10, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.12, 1))
    _draw_times(upper, rows, shapes)
    _draw_bandwidth(lower, rows, shapes, report)
    threads = f", {report['threads']} threads" if is_cpu(report) else ""
    dtype = next(iter(next(iter(rows.values())).values())).get("dtype", "")
    figure.suptitle(
        f"{report['device']}{threads}: NF4, double quantization, {dtype}",
        x=0.01,
        ha="left",
        fontsize=12,
        weight="bold",
    )
    figure.savefig(target, dpi=110, metadata={"Software": None} if target.suffix == ".png" else {})
    plt.close(figure)


def _tidy(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


def _draw_times(figure: Any, rows: dict[tuple[Any, ...], Row], shapes: Sequence[tuple]) -> None:
    """Draw the forward product's time over that of the dense product, a panel for each shape."""
    figure.suptitle(
        "linear: time relative to the dense product; lower is better",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    axes = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    highest = 1.0
    for axis, shape in zip(axes, shapes, strict=True):
        by_m = {
            m: row
            for (op, its_shape, m, _), row in rows.items()
            if op == "linear" and its_shape == shape and DENSE in row
        }
        ms = sorted(by_m)
        for name, style in STYLES.items():
            points = [(m, _relative(by_m[m], name)) for m in ms if name in by_m[m]]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name, markersize=5, linewidth=1.8, **style
                )
        _tidy(axis)
        axis.set_title("x".join(map(str, shape)), fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ms, [str(m) for m in ms])
        axis.minorticks_off()
        axis.set_xlabel("M, rows of activations", fontsize=8)
        highest = max([highest, *(y for line in axis.lines for y in line.get_ydata())])
    axes[0].set_ylim(0, highest * 1.08)
    axes[0].set_ylabel("time, dense = 1", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=8)


def _relative(row: Row, name: str) -> float:
    return row[name]["median_us"] / row[DENSE]["median_us"]


def _draw_bandwidth(
    figure: Any, rows: dict[tuple[Any, ...], Row], shapes: Sequence[tuple], report: dict[str, Any]
) -> None:
    """Draw bytes per second, a panel for each operation, below the rate of a copy."""
    title = "bandwidth: the bytes that have to move, over the time"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    scale, unit = (1, "TB/s") if report["copy_tb_per_s"] >= 0.1 else (1000, "GB/s")
    axes = figure.subplots(1, len(BARS), sharey=True, squeeze=False)[0]
    ceiling = report["copy_tb_per_s"] * scale
    for axis, (op, m) in zip(axes, BARS, strict=True):
        found = [_row(rows, op, shape, m) for shape in shapes]
        names = [name for name in STYLES if any(name in row for row in found)]
        width = 0.82 / max(len(names), 1)
        for index, name in enumerate(names):
            places = [place for place, row in enumerate(found) if name in row]
            records = [found[place][name] for place in places]
            offset = (index - (len(names) - 1) / 2) * width
            _bars(axis, [place + offset for place in places], records, width, name, scale)
        _tidy(axis)
        axis.axhline(ceiling, color="#cf222e", linewidth=1.2, linestyle="--")
        axis.set_title(_bar_title(op, m, found), fontsize=9)
        axis.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes])
        axis.tick_params(axis="x", labelsize=7 if len(shapes) > 2 else 8)
        margin = 0.6 if len(shapes) > 1 else 1.0
        axis.set_xlim(-margin, len(shapes) - 1 + margin)
    highest = max((patch.get_height() for axis in axes for patch in axis.patches), default=0)
    axes[0].set_ylim(0, max(ceiling, highest) * 1.12)
    axes[0].set_ylabel(unit, fontsize=8)
    axes[-1].annotate(
        f"copy: {ceiling:.3g} {unit}",
        (0.02, ceiling),  # small weights come first, and do not reach it
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#cf222e",
    )


def _bar_title(op: str, m: int | None, found: Sequence[Row]) -> str:
    title = op if m is None else f"{op}, M = {m}"
    for row in found:
        if OURS in row and DENSE in row:
            return f"{title} (dense: {row[DENSE]['bytes'] / row[OURS]['bytes']:.1f} x the bytes)"
    return title


def _row(rows: dict[tuple[Any, ...], Row], op: str, shape: tuple, m: int | None) -> Row:
    for (its_op, its_shape, its_m, _), row in rows.items():
        if (its_op, its_shape, its_m) == (op, shape, m):
            return row
    return {}


def _bars(
    axis: plt.Axes,
    places: list[float],
    records: list[Record],
    width: float,
    name: str,
    scale: float,
) -> None:
    bars = axis.bar(
        places,
        [record["tb_per_s"] * scale for record in records],
        width,
        color=STYLES[name]["color"],
        label=name,
    )
    labels = [f"{record['fraction_of_copy']:.0%}" for record in records]
    axis.bar_label(bars, labels, fontsize=6.5, padding=1)


def main() -> int:
    """Draw one report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="JSON from bench/python/peers.py or qn_bench")
    parser.add_argument("target", type=Path, help="image to write: .png, .svg or .pdf")
    options = parser.parse_args()
    draw(load(options.report), options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
