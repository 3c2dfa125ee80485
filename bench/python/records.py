"""Reports as they were written, of any version of the JSON: read, grouped and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
OURS = "qlora_native"
DENSE = "dense"
SHORT = {OURS: "ours", "bitsandbytes": "bnb", "bitsandbytes packed": "bnb packed"}
"""What the tables call an implementation, where its name is too long."""

Record = dict[str, Any]
Row = dict[str, Record]


def load(path: Path) -> dict[str, Any]:
    """Return a report. What version 1 of the JSON lacks stays out: readers ask with `get`."""
    report = json.loads(path.read_text())
    needed = {"device", "date", "records"}
    needed |= {"command"} if is_of_qn_bench(report) else {"commit", "versions", "copy_tb_per_s"}
    missing = needed - set(report)
    if missing:
        raise ValueError(f"{path} is no report: it has no {', '.join(sorted(missing))}")
    return report


def is_of_qn_bench(report: dict[str, Any]) -> bool:
    """Whether the report was written by the C++ program, whose records have no rivals."""
    return report.get("program") == "qn_bench"


def is_cpu(report: dict[str, Any]) -> bool:
    """Whether the report is that of a processor, not of a GPU."""
    return "threads" in report


def steady(records: Sequence[Record]) -> list[Record]:
    """Return the records to show: on a CPU, those whose outputs lie in reused memory."""
    return [record for record in records if record.get("memory", "reused") == "reused"]


def rows_of(records: Sequence[Record]) -> dict[tuple[Any, ...], Row]:
    """Return {(op, shape, m, memory): {implementation: record}}, in the order of the records."""
    rows: dict[tuple[Any, ...], Row] = {}
    for record in records:
        key = record["op"], tuple(record["shape"]), record["m"], record.get("memory")
        rows.setdefault(key, {})[record["impl"]] = record
    return rows


def ratio(row: Row, rival: str, field: str = "median_us") -> float | None:
    """Return how many times as long as ours the rival takes; more than 1: ours is faster."""
    ours, other = (row.get(name, {}).get(field) for name in (OURS, rival))
    return other / ours if ours and other else None


def ratio_text(row: Row, rival: str, field: str = "median_us") -> str:
    """Return the ratio as text, or a dash where one of the two was not measured."""
    value = ratio(row, rival, field)
    return "-" if value is None else f"{value:.2f}x"
