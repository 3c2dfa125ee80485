"""bench/python: arguments, checks that can fail, errors, records and tables."""

from __future__ import annotations

import json

import pytest
import torch

import accuracy
import implementations
import measure
import peers
import records as records_module
import report
import verify

SETTING = implementations.Setting("nf4", 64, torch.bfloat16, torch.device("cpu"))


class Wrong(implementations.Ours):
    """Ours, with one wrong element in one of its results."""

    def __init__(self, where: str) -> None:
        super().__init__(SETTING)
        self._where = where

    def dequantize(self, quantized):
        dense = super().dequantize(quantized)
        if self._where == "dequantize":
            dense[0, 3] += 3 * dense.abs().max()
        return dense

    def linear(self, x, quantized):
        y = super().linear(x, quantized)
        if self._where == "linear":
            y = y.clone()
            y[-1, -1] += 0.5
        if self._where == "dx":
            y = y + 0.01 * x.sum(dim=1, keepdim=True)
        return y


@pytest.fixture
def problem():
    weight = (torch.randn(48, 128) * 0.02).bfloat16()
    return weight, torch.randn(3, 128).bfloat16(), torch.randn(3, 48).bfloat16()


def test_every_rival_that_is_there_passes_the_checks(problem):
    weight, x, dy = (torch.cat([part, part], dim=0) for part in problem)
    dy = torch.cat([dy, dy], dim=1)
    found = list(implementations.available(SETTING))
    assert found[0].name == "qlora_native"
    assert found[-1].name == "dense"
    for impl in found:
        assert impl.name in implementations.NAMES
        if impl.name == "torchao":
            continue  # Its groups of 256 blocks want a larger weight.
        quantized = impl.quantize(weight)
        verify.check_linear(impl, x, dy, quantized)
        assert impl.nbytes(quantized) > 0
        assert impl.exact(quantized).dtype == torch.float32


@pytest.mark.parametrize("where", ["linear", "dx"])
def test_a_wrong_product_is_caught(problem, where):
    weight, x, dy = problem
    impl = Wrong(where)
    with pytest.raises(verify.WrongResultError, match="off fp64"):
        verify.check_linear(impl, x, dy, impl.quantize(weight))


def test_a_wrong_dequantization_is_caught(problem):
    weight, _, _ = problem
    impl = Wrong("dequantize")
    with pytest.raises(verify.WrongResultError, match="absmax off"):
        verify.check_dequantized(
            impl.name, weight, impl.dequantize(impl.quantize(weight)), "nf4", 64
        )


def test_errors_are_relative_to_fp64_and_show_a_wrong_element(problem):
    weight, x, dy = problem
    ours, wrong = implementations.Ours(SETTING), Wrong("linear")
    for op in implementations.PRODUCTS:
        error, plain = accuracy.errors(op, ours, x, dy, ours.quantize(weight))
        assert 0 < error < 0.01
        assert 0 < plain < 0.01
    assert accuracy.errors("linear", wrong, x, dy, wrong.quantize(weight))[0] > 0.1


def test_products_in_fp64_do_not_depend_on_their_parts(monkeypatch):
    left, right = torch.randn(5, 7), torch.randn(7, 11)
    monkeypatch.setattr(accuracy, "_CHUNK_ELEMENTS", 20)
    expected = left.double() @ right.double()
    torch.testing.assert_close(accuracy.product_fp64(left, right), expected)
    assert accuracy.relative_error(2 * expected, expected) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad",
    [
        ["--shapes", "64"],
        ["--shapes", "7x9"],
        ["--m", "0"],
        ["--device", "meta"],
        ["--ops", "nothing"],
        ["--impl", "nobody"],
    ],
)
def test_bad_arguments_are_refused(bad, capsys):
    arguments = bad if "--device" in bad else ["--device", "cpu", *bad]
    with pytest.raises(SystemExit):
        peers.parse_arguments(arguments)
    assert bad[-1] in capsys.readouterr().err or bad[0] == "--shapes"


def test_quick_means_less():
    full, quick = (peers.parse_arguments(["--device", "cpu", *more]) for more in ([], ["--quick"]))
    assert full.m == [1, 2, 4, 8, 16, 32, 64, 512]
    assert set(quick.m) < set(full.m)
    assert quick.rounds < full.rounds
    assert quick.budget < full.budget


def test_rivals_take_turns_and_are_summed_up_by_medians():
    order = []
    works = {
        name: measure.Work([lambda name=name: order.append(name) or torch.zeros(1)])
        for name in "ab"
    }
    timings = measure.time_works(works, torch.device("cpu"), rounds=3, budget_s=0.0)
    assert order == ["a", "b"] * 4
    assert [timing.rounds for timing in timings.values()] == [3, 3]
    assert all(t.quartiles_us[0] <= t.median_us <= t.quartiles_us[1] for t in timings.values())


def test_a_run_writes_records_and_prints_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "copy_tb_per_s", lambda device: 0.01)
    monkeypatch.setattr(peers.OutputMemory, "_POOL_BYTES", 1 << 20)
    target = tmp_path / "cpu.json"
    command = (
        "--device cpu --shapes 64x128 --m 2 --rounds 3 --budget 0.01 --impl qlora_native dense"
    )
    # One mode, so that the rest of the tests keeps the allocator as it is.
    monkeypatch.setattr(peers.OutputMemory, "use", lambda self, mode: None)
    assert peers.main([*command.split(), "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert written["schema_version"] == report.SCHEMA_VERSION
    assert written["copy_tb_per_s"] == 0.01
    records = [r for r in written["records"] if r["impl"] == "qlora_native"]
    assert {r["op"] for r in records} == set(implementations.OPS)
    linear = next(r for r in records if r["op"] == "linear")
    assert linear["bytes"] == linear["weight_bytes"] + 2 * (64 + 128) * 2
    assert linear["relative_error"] < 0.01
    assert linear["kernel"]
    assert linear["fraction_of_copy"] == pytest.approx(
        linear["bytes"] / linear["median_us"] / 1e6 / 0.01, rel=0.05, abs=1e-3
    )
    printed = capsys.readouterr().out
    for expected in ("ours us", "of copy", "x dense", "decoded + dense", "ceiling"):
        assert expected in printed


def _record(impl: str, **more):
    fields = {"op": "linear", "shape": [8, 8], "m": 1, "impl": impl, "median_us": 10.0}
    return {**fields, "fraction_of_copy": 0.5, **more}


def test_ratios_say_how_many_times_as_long_the_rival_takes():
    records = [_record("qlora_native"), _record("dense", median_us=25.0)]
    row = next(iter(records_module.rows_of(records).values()))
    assert records_module.ratio(row, "dense") == 2.5
    assert records_module.ratio(row, "bitsandbytes") is None
    assert "2.50x" in report.time_table(records)


def test_tables_have_dashes_for_what_a_rival_does_not_do():
    records = [_record("qlora_native"), _record("dense"), _record("qlora_native", m=2)]
    lines = report.tables(records).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split().count("-") == 3


def test_eager_times_have_a_table_of_their_own():
    records = [_record("qlora_native", eager_us=4.0), _record("dense", eager_us=2.0)]
    assert "0.50x" in report.tables(records).split("launched eagerly")[1]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"device": "NVIDIA H200"}, "nvidia-h200"),
        ({"device": "Some(R) Chip(TM) 12", "threads": 2}, "some-chip-12-2-threads"),
    ],
)
def test_a_machine_has_one_file_name(head, expected):
    assert report.slug(head) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_eager_and_graph_times_on_cuda():
    x = torch.zeros(1 << 20, device="cuda")
    works = {"add": measure.Work([lambda: x + 1] * 4)}
    assert measure.time_eagerly(works, 5, 1.0)["add"].median_us > 0
    assert 0 < measure.graph_node_us() < 50
