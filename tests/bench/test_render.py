"""bench/render.py and bench/plot.py: README shows what bench/results holds."""

from __future__ import annotations

import copy
import json

import pytest
import render

from records import load

VERSION_1 = {
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
    "device": "Some GPU",
    "driver": "1.2.3",
    "versions": {"torch": "2.11", "bitsandbytes": "0.50"},
    "copy_tb_per_s": 4.0,
}


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    import plot

    return plot


def record(op, m, impl, us, **more):
    moved = 1000 * us
    fields = {"op": op, "shape": [64, 128], "m": m, "dtype": "bf16", "impl": impl}
    return {
        **fields,
        "median_us": us,
        "bytes": moved,
        "tb_per_s": 2.0,
        "fraction_of_copy": 0.5,
        **more,
    }


def report(**more):
    records = [
        record("quantize", None, "qlora_native", 10.0),
        record("quantize", None, "bitsandbytes", 155.0),
        *(record("linear", m, "qlora_native", 5.0 * m) for m in (1, 2)),
        *(record("linear", m, "bitsandbytes", 10.0) for m in (1, 2)),
        *(record("linear", m, "dense", 20.0) for m in (1, 2)),
        *(record("linear_backward", m, "qlora_native", 50.0) for m in (1, 2)),
    ]
    return {**copy.deepcopy(VERSION_1), **more, "records": records}


def test_the_readme_shows_what_the_records_say():
    assert render.is_current(), "python bench/render.py"


def test_every_machine_has_a_picture():
    for name in render.reports():
        assert (render.RESULTS / f"{name}.png").is_file(), "python bench/render.py"


def test_a_change_of_a_record_makes_the_readme_stale(tmp_path):
    readme = tmp_path / "README.md"
    results = tmp_path / "results"
    results.mkdir()
    written = report()
    (results / "gpu.json").write_text(json.dumps(written))
    marks = f"# Title\n{render.BEGIN}\nold\n{render.END}\nafter\n"
    readme.write_text(marks)
    assert not render.is_current(readme, results)
    readme.write_text(render.rewritten(marks, render.region(render.reports(results))))
    assert render.is_current(readme, results)
    assert readme.read_text().startswith("# Title\n")
    assert readme.read_text().endswith("\nafter\n")
    written["records"][0]["median_us"] = 11.0
    (results / "gpu.json").write_text(json.dumps(written))
    assert not render.is_current(readme, results)


@pytest.mark.parametrize("text", ["", render.BEGIN, f"{render.END}\n{render.BEGIN}"])
def test_a_readme_without_marks_is_refused(text):
    with pytest.raises(ValueError, match="bench:begin"):
        render.rewritten(text, "figures")


def test_a_table_of_version_1_has_times_and_ratios():
    lines = render.table(report()).splitlines()
    assert lines[0] == (
        "|  | M | qlora_native | bitsandbytes | dense bf16 | x bnb | x dense | of copy |"
    )
    assert "| quantize 64x128 |  | 10.0 | 155 |  | 16 |  | 50% |" in lines
    assert "| linear 64x128 | 1 | 5.00 | 10.0 | 20.0 | 2.00 | 4.00 | 50% |" in lines
    # Shapes and rows that the README does not ask for are shown for want of others, and of the
    # backward pass the largest.
    assert sum("linear and dX" in line for line in lines) == 1
    assert "bench/results/gpu.png" in render.region({"gpu": report()})


def test_a_table_of_version_2_has_errors_and_eager_times():
    found = report(schema_version=2)
    for each in found["records"]:
        each["eager_us"] = 30.0
        if each["op"] != "quantize":
            each |= {"relative_error": 1.23e-3, "relative_error_dequantized": 2e-3}
    lines = render.table(found).splitlines()
    assert lines[0].endswith("| error | eager: ours / bnb / dense |")
    quantize = next(line for line in lines if "quantize" in line)
    assert quantize.endswith("|  | 30.0 / 30.0 / - |")
    assert any(line.endswith("| 1.2e-03 (2.0e-03) | 30.0 / 30.0 / 30.0 |") for line in lines)


def test_a_cpu_has_milliseconds_and_shows_reused_memory():
    found = report(threads=4, driver="")
    for each in found["records"]:
        each["memory"] = "fresh"
    reused = copy.deepcopy(found["records"])
    for each in reused:
        each |= {"memory": "reused", "median_us": each["median_us"] * 1000}
    found["records"] += reused
    lines = render.table(found).splitlines()
    assert "| linear 64x128 | 1 | 5.00 | 10.0 | 20.0 | 2.00 | 4.00 | 50% |" in lines
    assert render.heading(found).endswith("; ms")
    assert "4 threads" in render.heading(found)
    assert list(render.in_order({"cpu": found, "gpu": report()})) == ["gpu", "cpu"]


def test_what_is_no_report_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"device": "x"}')
    with pytest.raises(ValueError, match="no commit, copy_tb_per_s, date, records, versions"):
        load(path)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_small_report_is_drawn(plot, tmp_path, suffix):
    target = tmp_path / f"gpu.{suffix}"
    plot.draw(report(), target)
    assert target.stat().st_size > 5000


def test_a_report_without_rivals_is_drawn(plot, tmp_path):
    found = report()
    found["records"] = [r for r in found["records"] if r["impl"] == "qlora_native"]
    plot.draw(found, tmp_path / "gpu.png")
    with pytest.raises(ValueError, match="no records"):
        plot.draw({**found, "records": []}, tmp_path / "gpu.png")
