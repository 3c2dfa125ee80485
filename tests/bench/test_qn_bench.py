"""Reports of qn_bench: read, described and drawn; what bench/README.md says of it is true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from records import load

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def kernel_plot():
    pytest.importorskip("matplotlib")
    import kernel_plot

    return kernel_plot


@pytest.fixture(scope="module")
def program():
    """Return the program, which is there when Google Benchmark is."""
    path = Path(os.environ.get("QN_BENCH", ROOT / "build" / "python" / "bench" / "qn_bench"))
    if not path.is_file():
        pytest.skip("qn_bench was not built")
    return path


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


COMMANDS = {
    "quantize": ["--shapes", "64x128", "--double-quant", "yes,no"],
    "matmul": ["--shapes", "64x128,32x64", "--m", "1,4", "--kernel", "all"],
    "lora": ["--shapes", "64x128", "--m", "1,4", "--rank", "8,16"],
    "optimizer": ["--case", "tiny"],
    "paged": ["--budget", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_reports_are_described_and_drawn(program, kernel_plot, tmp_path, command):
    written = tmp_path / "report.json"
    brief = ["--device", "cpu", "--min-time", "0.001", "--json", str(written)]
    ran = run(program, command, *COMMANDS[command], *brief)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = load(written)
    assert report["command"] == command
    assert report["records"]
    fields = {*report, *(key for record in report["records"] for key in record)}
    assert {f for f in fields if f'"{f}"' not in README} == set()
    for record in report["records"]:
        low, high = record["quartiles_us"]
        assert 0 < low <= record["median_us"] <= high
        assert record["rounds"] >= 5
        if "fraction_of_copy" in record:
            rate = record["bytes"] / record["median_us"] / 1e6
            assert record["tb_per_s"] == pytest.approx(rate, rel=1e-4)
            expected = rate / report["copy_tb_per_s"]
            assert record["fraction_of_copy"] == pytest.approx(expected, rel=1e-4)
        if record["op"] == "matmul":
            n, k = record["shape"]
            flops = 2 * record["m"] * n * k
            expected = flops / record["median_us"] / 1e6
            assert record["tflop_per_s"] == pytest.approx(expected, rel=1e-4)
    target = tmp_path / "report.png"
    kernel_plot.draw(report, target)
    assert target.stat().st_size > 5000


def test_one_kernel_of_each_case_is_the_librarys_choice(program, tmp_path):
    written = tmp_path / "report.json"
    run(program, "matmul", *COMMANDS["matmul"], "--device=cpu", "--min-time=0.001",
        f"--json={written}")  # fmt: skip
    choices: dict[str, int] = {}
    for record in load(written)["records"]:
        case = f"{record['shape']} {record['m']}"
        choices[case] = choices.get(case, 0) + record["is_choice"]
    assert len(choices) == 4
    assert set(choices.values()) == {1}


def test_the_commands_of_the_readme_are_understood(program):
    found = re.findall(r"^qn_bench ([^#\n]*)|`qn_bench (\w+ -[^`]*[^.`])`", README, re.MULTILINE)
    commands = [line.split("  ")[0].strip() for pair in found for line in pair if line]
    measured = [line for line in commands if not line.startswith(("paged", "lora"))]
    assert len(measured) > 6
    for line in measured:
        # The last --kernel counts: with it, nothing is measured.
        ran = run(program, *shlex.split(line), "--kernel", "list")
        assert ran.returncode == 0, f"{line}: {ran.stderr}"


def _record(**more):
    fields = {"op": "matmul", "shape": [8, 16], "m": 1, "dtype": "bf16", "quant_type": "nf4"}
    return {**fields, "kernel": "a", "median_us": 2.0, "fraction_of_copy": 0.5, **more}


def test_lines_are_named_by_what_differs(kernel_plot):
    def names(*records):
        return [kernel_plot.series_of(records)[id(record)] for record in records]

    assert names(_record(kernel="a"), _record(kernel="b", m=64)) == ["qlora_native"] * 2
    assert names(_record(is_choice=True), _record(kernel="b", is_choice=False)) == ["a", "b"]
    assert names(_record(), _record(dtype="fp32")) == ["qlora_native, bf16", "qlora_native, fp32"]
    assert names(_record(double_quant=True), _record(double_quant=False))[1].endswith("fp32 scales")


def test_panels_are_those_of_shapes_and_cases(kernel_plot):
    records = [_record(), _record(m=4), _record(shape=[8, 32])]
    assert list(kernel_plot.panels_of(records)) == ["matmul 8x16", "matmul 8x32"]


def test_what_failed_is_not_drawn(kernel_plot, tmp_path):
    failed = {"op": "matmul", "shape": [8, 16], "m": 1, "error": "wrong result"}
    report = {"program": "qn_bench", "command": "matmul", "device": "x", "records": [failed]}
    with pytest.raises(ValueError, match="no records"):
        kernel_plot.draw(report, tmp_path / "x.png")
    kernel_plot.draw({**report, "records": [failed, _record()]}, tmp_path / "x.png")


def test_plot_knows_its_reports(tmp_path, kernel_plot):
    import plot

    report = {"program": "qn_bench", "command": "matmul", "device": "x", "date": "today"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**report, "records": [_record()]}))
    plot.draw(load(path), tmp_path / "x.svg")
    assert (tmp_path / "x.svg").is_file()
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="no records"):
        load(path)
