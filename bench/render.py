"""Rewrites the figures in README.md, and draws the plots, from bench/results/*.json.

python bench/render.py              # README.md and bench/results/*.png
python bench/render.py --check      # only says whether README.md is up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))

from records import (
    DENSE,
    OURS,
    RESULTS,
    SHORT,
    Record,
    Row,
    is_cpu,
    load,
    ratio,
    rows_of,
    steady,
)

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 4, 16, 64, 512)
"""What of a report the README shows; all of it where it has none of these."""

TITLES = {
    "quantize": "quantize",
    "dequantize": "dequantize",
    "linear": "linear",
    "linear_backward": "linear and dX",
}
LEGEND = """\
Medians of rivals that took turns in one process, on the same random weights: NF4 in blocks of 64,
double quantization. "x bnb", "x dense": how many times as long bitsandbytes and torch's product
over the dense weight take, so more than 1 means that ours is faster. "Of copy": the bytes that have
to move, over the time, relative to a large copy in the same process. "Error": of the product,
relative to fp64; in brackets that of decoding the weight and multiplying by the dense result.
"Eager", on a GPU: wall time of a call with the host's part in it; the other times have none. On a
CPU, outputs lie in memory that was used before, and a weight of a few megabytes partly in the
caches; into fresh memory page faults cost as much again (the records have both)."""


def reports(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return {machine: report}, GPUs first."""
    return in_order({path.stem: load(path) for path in folder.glob("*.json")})


def in_order(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the reports, GPUs first."""
    return dict(sorted(found.items(), key=lambda item: (is_cpu(item[1]), item[0])))


def region(found: dict[str, dict[str, Any]], image_folder: str = "bench/results") -> str:
    """Return what stands between the marks of README.md."""
    parts = [LEGEND]
    for name, report in found.items():
        parts.append(heading(report))
        parts.append(table(report))
        parts.append(f"![{report['device']}: time and bandwidth]({image_folder}/{name}.png)")
    return "\n\n".join(parts)


def heading(report: dict[str, Any]) -> str:
    """Return the line over a machine's table: what the figures depend on."""
    versions = report["versions"]
    facts = [f"{report['threads']} threads"] if is_cpu(report) else [f"driver {report['driver']}"]
    facts += [
        f"{name} {versions[name]}" for name in ("torch", "bitsandbytes") if versions.get(name)
    ]
    facts.append(f"commit {report['commit'][:7]}")
    facts.append(report["date"][:10])
    facts.append(f"a large copy: {_tb_per_s(report['copy_tb_per_s'])}")
    return f"**{report['device']}** ({', '.join(facts)}); {unit(report)[0]}"


def unit(report: dict[str, Any]) -> tuple[str, float]:
    """Return the unit of a machine's times, and how many microseconds it has."""
    return ("ms", 1000.0) if is_cpu(report) else ("µs", 1.0)


def _tb_per_s(rate: float) -> str:
    return f"{rate:.2f} TB/s" if rate >= 0.1 else f"{rate * 1000:.1f} GB/s"


def shown(records: Sequence[Record]) -> dict[tuple[Any, ...], Row]:
    """Return the rows that the README shows, by shape, then in the order of the operations."""
    rows = rows_of(steady(records))
    shapes = {key[1] for key in rows}
    shapes = shapes.intersection(SHAPES) or shapes
    found = {}
    for shape in sorted(shapes):
        for op in TITLES:
            of_op = {key: row for key, row in rows.items() if key[:2] == (op, shape)}
            wanted = {key: row for key, row in of_op.items() if key[2] in (None, *ROWS)} or of_op
            if op == "linear_backward" and wanted:
                most = max(wanted, key=lambda key: key[2])
                wanted = {most: wanted[most]}
            found.update(wanted)
    return found


def table(report: dict[str, Any]) -> str:
    """Return a machine's table, with the columns that its records have."""
    rows = shown(report["records"])
    present = dict.fromkeys(name for row in rows.values() for name in row)
    rivals = [name for name in present if name != OURS]
    dtype = report["records"][0]["dtype"]
    has_errors = any("relative_error" in row.get(OURS, {}) for row in rows.values())
    has_eager = any("eager_us" in row.get(OURS, {}) for row in rows.values())
    head = ["", "M", OURS, *(_long(name, dtype) for name in rivals)]
    head += [f"x {SHORT.get(name, name)}" for name in rivals] + ["of copy"]
    head += ["error"] * has_errors + ["eager: ours / bnb / dense"] * has_eager
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for (op, shape, m, _), row in rows.items():
        line = [f"{TITLES[op]} {shape[0]}x{shape[1]}", "" if m is None else str(m)]
        line += [_time(row.get(name), report) for name in (OURS, *rivals)]
        line += [_ratio(row, name) for name in rivals]
        line.append(_fraction(row.get(OURS)))
        if has_errors:
            line.append(_error(row.get(OURS)))
        if has_eager:
            eager = [_time(row.get(n), report, "eager_us") for n in (OURS, "bitsandbytes", DENSE)]
            line.append(" / ".join(text or "-" for text in eager))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _long(name: str, dtype: str) -> str:
    return f"dense {dtype}" if name == DENSE else name


def _time(record: Record | None, report: dict[str, Any], field: str = "median_us") -> str:
    if record is None or field not in record:
        return ""
    value = record[field] / unit(report)[1]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(row: Row, rival: str) -> str:
    value = ratio(row, rival)
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _fraction(record: Record | None) -> str:
    return "" if record is None else f"{record['fraction_of_copy']:.0%}"


def _error(record: Record | None) -> str:
    if record is None or "relative_error" not in record:
        return ""
    return f"{record['relative_error']:.1e} ({record['relative_error_dequantized']:.1e})"


def rewritten(text: str, content: str) -> str:
    """Return `text` with `content` between the marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"there must be one {BEGIN} and one {END} after it")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def is_current(readme: Path = README, folder: Path = RESULTS) -> bool:
    """Whether the README shows what the records say."""
    text = readme.read_text(encoding="utf-8")
    return text == rewritten(text, region(reports(folder)))


def draw_all(found: dict[str, dict[str, Any]], folder: Path = RESULTS) -> Iterator[Path]:
    """Draw every report; yield the images."""
    import plot

    for name, report in found.items():
        target = folder / f"{name}.png"
        plot.draw(report, target)
        yield target


def main() -> int:
    """Render, or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
    parser.add_argument("--no-plots", action="store_true", help="README.md only")
    options = parser.parse_args()
    if options.check:
        current = is_current()
        print("README.md is up to date" if current else "README.md is stale: run bench/render.py")
        return 0 if current else 1
    found = reports()
    text = README.read_text(encoding="utf-8")
    README.write_text(rewritten(text, region(found)), encoding="utf-8")
    print(f"wrote the figures of {', '.join(found)} into {README.name}")
    if not options.no_plots:
        for target in draw_all(found):
            print(f"drew {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
